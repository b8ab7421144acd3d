#include "system/cpu.h"

#include <array>
#include <atomic>
#include <cstdlib>
#include <sstream>

#include "linear/compare.h"
#include "system/error.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif
#if defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace mnemos {
namespace {

#if defined(__x86_64__)
// The state that the operating system saves for us; without it the registers cannot be used.
unsigned long long enabled_state() {
  unsigned low = 0, high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<unsigned long long>(high) << 32) | low;
}

// Linux provides the AMX tile registers only on request.
bool request_tiles() {
#if defined(__linux__)
  constexpr long request_permission = 0x1023, tile_data = 18;
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}

CpuFeatures detect() {
  CpuFeatures features;
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return features;
  const bool saves_state = c & (1u << 27);
  if (!saves_state) return features;
  const bool fma = c & (1u << 12), f16c = c & (1u << 29);
  const unsigned long long state = enabled_state();
  const bool ymm = (state & 0x6) == 0x6, zmm = (state & 0xe6) == 0xe6, tiles = (state & 0x60000) == 0x60000;
  unsigned a1 = 0, b1 = 0, c1 = 0, d1 = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return features;
  __get_cpuid_count(7, 1, &a1, &b1, &c1, &d1);
  features.avx2 = ymm && fma && f16c && (b & (1u << 5)) && (b & (1u << 8));
  features.avx_vnni = features.avx2 && (a1 & (1u << 4));
  const unsigned needed = (1u << 16) | (1u << 17) | (1u << 30) | (1u << 31);  // F, DQ, BW, VL
  features.avx512 = features.avx2 && zmm && (b & needed) == needed && (c & (1u << 11));
  features.avx512_bf16 = features.avx512 && (a1 & (1u << 5));
  const bool tile_units = (d & (1u << 22)) && (d & (1u << 24)) && (d & (1u << 25));  // BF16, TILE, INT8
  features.amx =
      features.avx512_bf16 && tiles && tile_units && request_tiles() && same_products(amx_kernels, avx512_kernels);
  features.amx_bf16 = features.amx && (d & (1u << 23)) && right_products(amxbf16_kernels, avx512_kernels);
  return features;
}
#elif defined(__aarch64__)
CpuFeatures detect() {
  CpuFeatures features;
  features.neon = true;
#if defined(__linux__)
  features.neon_dotprod = getauxval(AT_HWCAP) & (1ul << 20);
  features.neon_i8mm = getauxval(AT_HWCAP2) & (1ul << 13);
#elif defined(__APPLE__)
  features.neon_dotprod = true;
  int i8mm = 0;  // stays 0 if the system does not know the name
  size_t size = sizeof i8mm;
  sysctlbyname("hw.optional.arm.FEAT_I8MM", &i8mm, &size, nullptr, 0);
  features.neon_i8mm = i8mm != 0;
#endif
  return features;
}
#else
CpuFeatures detect() { return {}; }
#endif

std::vector<Isa> available_levels() {
  const CpuFeatures &features = cpu_features();
  std::vector<Isa> levels{Isa::scalar};
  if (features.neon_dotprod) levels.push_back(Isa::neon);
  if (features.neon_i8mm) levels.push_back(Isa::neon_i8mm);
  if (features.avx2) levels.push_back(Isa::avx2);
  if (features.avx_vnni) levels.push_back(Isa::avxvnni);
  if (features.avx512) levels.push_back(Isa::avx512);
  if (features.avx512_bf16) levels.push_back(Isa::avx512_bf16);
  if (features.amx) levels.push_back(Isa::amx);
  if (features.amx_bf16) levels.push_back(Isa::amx_bf16);
  return levels;
}

constexpr int unset = -1;
using Levels = std::array<int, operator_classes>;  // by class; unset if not specified

Levels parse_levels(const std::string &text, const char *what) {
  Levels levels;
  levels.fill(unset);
  if (text.empty()) return levels;
  if (text.find('=') == std::string::npos) {
    levels.fill(static_cast<int>(find_level(text, what)));
    return levels;
  }
  std::istringstream parts(text);
  for (std::string part; std::getline(parts, part, ',');) {
    const size_t equals = part.find('=');
    const std::string name = part.substr(0, equals);
    std::string names;
    bool found = false;
    for (int c = 0; c < operator_classes; c++) {
      names += (c > 0 ? ", " : "") + std::string(class_name(static_cast<OperatorClass>(c)));
      if (name != class_name(static_cast<OperatorClass>(c)) || equals == std::string::npos) continue;
      levels[static_cast<size_t>(c)] = static_cast<int>(find_level(part.substr(equals + 1), what));
      found = true;
    }
    if (!found) {
      throw unsupported_error(std::string(what) + " is '" + text + "'; '" + part +
                              "' must be a level for one of these operators, as in attention=scalar: " + names);
    }
  }
  return levels;
}

std::atomic<int> selected[operator_classes]{unset, unset, unset}, preferred[operator_classes]{unset, unset, unset};

void store(std::atomic<int> (&into)[operator_classes], const Levels &levels) {
  for (size_t c = 0; c < levels.size(); c++) into[c].store(levels[c]);
}

// The level that select_isa or MNEMOS_ISA names, or unset.
int specified_isa(OperatorClass which) {
  static const Levels environment = [] {
    const char *text = std::getenv("MNEMOS_ISA");
    return parse_levels(text == nullptr ? "" : text, "MNEMOS_ISA");
  }();
  const auto c = static_cast<size_t>(which);
  const int level = selected[c].load(std::memory_order_relaxed);
  return level != unset ? level : environment[c];
}

bool is_intel() {
#if defined(__x86_64__)
  return __builtin_cpu_is("intel");
#else
  return false;
#endif
}

}  // namespace

const CpuFeatures &cpu_features() {
  static const CpuFeatures features = detect();
  return features;
}

Isa find_level(const std::string &name, const char *what) {
  std::string names;
  for (Isa level : available_levels()) {
    if (name == isa_name(level)) return level;
    names += (names.empty() ? "" : ", ") + std::string(isa_name(level));
  }
  throw unsupported_error(std::string(what) + " is '" + name +
                          "', which is unknown or not a feature of this CPU; it has: " + names);
}

Isa current_isa(OperatorClass which) {
  for (const int level :
       {specified_isa(which), preferred[static_cast<size_t>(which)].load(std::memory_order_relaxed)}) {
    if (level != unset) return static_cast<Isa>(level);
  }
  return likely_isa(which);
}

Isa brief_isa(OperatorClass which) {
  const Isa level = current_isa(which);
  return is_intel() && specified_isa(which) == unset && level >= Isa::avx512 ? Isa::avx2 : level;
}

void select_isa(const std::string &levels) { store(selected, parse_levels(levels, "the instruction set")); }
void prefer_isas(const std::string &levels) { store(preferred, parse_levels(levels, "the preferred instruction set")); }

Isa likely_isa(OperatorClass) {
  // Intel's bfloat16 dot products have half the rate of float32's multiply-adds; those of AMD's Zen 4 and 5 have twice.
  if (cpu_features().avx512_bf16 && !cpu_features().amx && is_intel()) return Isa::avx512;
  if (cpu_features().amx) return Isa::amx;  // amx_bf16 is for those who ask for it: single rows are slower
  return available_levels().back();
}

bool bypassing_is_fast() { return !is_intel(); }

int64_t near_cache_bytes() { return is_intel() ? 1 << 20 : 4 << 20; }

const char *class_name(OperatorClass which) {
  switch (which) {
    case OperatorClass::quantized: return "quantized";
    case OperatorClass::floats: return "floats";
    case OperatorClass::attention: return "attention";
  }
  return "unknown";
}

const char *isa_name(Isa isa) {
  switch (isa) {
    case Isa::scalar: return "scalar";
    case Isa::neon: return "neon";
    case Isa::neon_i8mm: return "neon_i8mm";
    case Isa::avx2: return "avx2";
    case Isa::avxvnni: return "avxvnni";
    case Isa::avx512: return "avx512";
    case Isa::avx512_bf16: return "avx512_bf16";
    case Isa::amx: return "amx";
    case Isa::amx_bf16: return "amx_bf16";
  }
  return "unknown";
}

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (Isa level : available_levels()) names.emplace_back(isa_name(level));
  return names;
}

}  // namespace mnemos
