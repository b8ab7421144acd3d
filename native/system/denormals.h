// Numbers below float32's normal range: as operands and results of this thread's vector arithmetic they count as zero.
// Many processors take a hundred cycles for an operation with one. The tile units and the bfloat16 dot products of x86
// treat them as zero in any case.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace mnemos {

// In effect while it lives. All threads that work on one result have one, so that its bits do not depend on the thread.
class Denormals {
 public:
  Denormals(const Denormals &) = delete;
  Denormals &operator=(const Denormals &) = delete;
  ~Denormals() { set_state(before_); }

 protected:
  explicit Denormals(bool are_zero) : before_(state()) { set_state(are_zero ? before_ | flags : before_ & ~flags); }

 private:
#if defined(__x86_64__)
  static constexpr uint64_t flags = 0x8040;  // MXCSR: flush to zero, denormals are zero
  static uint64_t state() { return _mm_getcsr(); }
  static void set_state(uint64_t value) { _mm_setcsr(static_cast<unsigned>(value)); }
#elif defined(__aarch64__)
  static constexpr uint64_t flags = uint64_t(1) << 24;  // FPCR: flush to zero
  static uint64_t state() {
    uint64_t value;
    __asm__ volatile("mrs %0, fpcr" : "=r"(value));
    return value;
  }
  static void set_state(uint64_t value) { __asm__ volatile("msr fpcr, %0" : : "r"(value)); }
#else
  static constexpr uint64_t flags = 0;
  static uint64_t state() { return 0; }
  static void set_state(uint64_t) {}
#endif
  const uint64_t before_;
};

struct DenormalsAreZero : Denormals {
  DenormalsAreZero() : Denormals(true) {}
};
struct DenormalsCount : Denormals {
  DenormalsCount() : Denormals(false) {}
};

}  // namespace mnemos
