#include "quantize/encode.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <limits>

#include "system/cpu.h"
#include "system/denormals.h"
#include "system/error.h"

namespace mnemos {

extern const EncodeKernels scalar_encode_kernels;
#if defined(__x86_64__)
extern const EncodeKernels avx2_encode_kernels, avx512_encode_kernels;
#endif

namespace {

const EncodeKernels &kernels() {
#if defined(__x86_64__)
  const Isa isa = current_isa(OperatorClass::quantized);
  if (isa >= Isa::avx512) return avx512_encode_kernels;
  if (isa >= Isa::avx2) return avx2_encode_kernels;
#endif
  return scalar_encode_kernels;
}

EncodeKernels::Encode encoder_of(WeightType type) {
  switch (type) {
    case WeightType::f16: return kernels().f16;
    case WeightType::bf16: return kernels().bf16;
    case WeightType::q4_0: return kernels().q4_0;
    case WeightType::q4_1: return kernels().q4_1;
    case WeightType::q5_0: return kernels().q5_0;
    case WeightType::q5_1: return kernels().q5_1;
    case WeightType::q8_0: return kernels().q8_0;
    case WeightType::q2_k: return kernels().q2_k;
    case WeightType::q3_k: return kernels().q3_k;
    case WeightType::q4_k: return kernels().q4_k;
    case WeightType::q5_k: return kernels().q5_k;
    case WeightType::q6_k: return kernels().q6_k;
    case WeightType::iq4_nl: return kernels().iq4_nl;
    case WeightType::iq4_xs: return kernels().iq4_xs;
    case WeightType::f32: break;
  }
  throw config_error("there is nothing to encode in float32");
}

// Beyond what the scales of any type reach (65504 * 128 * 32), and far below what overflows in the search for scales.
constexpr float largest_quantized = 1e9f;

bool all_within(float limit, const float *values, int64_t count) {
  uint32_t largest = 0, most;
  std::memcpy(&most, &limit, 4);
  for (int64_t i = 0; i < count; i++) {
    uint32_t bits;
    std::memcpy(&bits, values + i, 4);
    largest = std::max(largest, bits & 0x7fffffff);
  }
  return largest < most;
}

}  // namespace

int64_t encode_rows(WeightType type, const float *values, int64_t rows, int64_t columns, const float *importance,
                    uint8_t *out, Pool &pool) {
  const EncodeKernels::Encode encode = encoder_of(type);
  const int64_t width = row_bytes(type, columns);
  const float limit = type == WeightType::bf16 ? std::numeric_limits<float>::infinity() : largest_quantized;
  const auto fits = [&](int64_t begin, int64_t count) {
    const float *first = values + begin * columns;
    return all_within(limit, first, count * columns) & encode(first, count, columns, importance, out + begin * width);
  };
  std::atomic<int64_t> failed{rows};
  const int64_t chunk = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, columns) / 8 * 8);
  pool.for_each(rows, chunk, [&](int64_t begin, int64_t end, int) {
    const DenormalsCount as_in_ggml;
    if (fits(begin, end - begin)) return;
    int64_t row = begin;
    while (row < end && fits(row, 1)) row++;
    int64_t least = failed.load();
    while (row < least && !failed.compare_exchange_weak(least, row)) {
    }
  });
  return failed.load() < rows ? failed.load() : -1;
}

}  // namespace mnemos
