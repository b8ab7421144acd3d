// Which instruction sets this processor has, and which one the kernels use.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace mnemos {

// Levels of kernels; their names are those of the matrix products' kernels too.
enum class Isa { scalar, neon, neon_i8mm, avx2, avxvnni, avx512, avx512_bf16, amx, amx_bf16 };

struct CpuFeatures {
  bool avx2 = false;  // with FMA, F16C and BMI2
  bool avx_vnni = false;  // 256-bit VNNI without AVX-512
  bool avx512 = false;  // F, BW, VL, DQ and VNNI
  bool avx512_bf16 = false;  // bf16 dot products
  bool amx = false;  // int8 and bfloat16 tiles; the operating system permits them, and they computed the right bits
  bool amx_bf16 = false;  // float16 arithmetic, for quantized weights in bfloat16 tiles
  bool neon = false;
  bool neon_dotprod = false;
  bool neon_i8mm = false;
};

const CpuFeatures &cpu_features();

// Operators that can run at separate levels: products with quantized weights; with weights in float32, float16 and
// bfloat16; attention and everything else. A cache's automatic type follows attention's level.
enum class OperatorClass { quantized, floats, attention };
constexpr int operator_classes = 3;
const char *class_name(OperatorClass which);

// The level in use: that of MNEMOS_ISA or select_isa, else that of prefer_isas, else the likely best of the
// processor's. A matrix or program keeps the level it was created with. Throws Error (unsupported) if MNEMOS_ISA is
// wrong.
Isa current_isa(OperatorClass which);

// Changes levels for objects created from now on: a level's name, for all; or "attention=avx512,floats=amx", where
// operators not named go back to the ones above, as all do with an empty text. MNEMOS_ISA has the same form.
void select_isa(const std::string &levels);
// The same for when nothing else was specified, for example from measurements on this machine.
void prefer_isas(const std::string &levels);

// The processor's likely best level for an operator, from what is known about its maker's units.
Isa likely_isa(OperatorClass which);

// The level for operators of microseconds between which a caller's own code runs on the same core: the level in use, but
// on Intel's processors AVX2 at most if nobody specified one. 512-bit arithmetic slows a core's clock there for what
// follows, by 7% on a Xeon with AMX.
Isa brief_isa(OperatorClass which);

// Whether reads that bypass the caches (non-temporal prefetches) are as fast as others. On Intel's processors they are
// not: the second-level cache's prefetcher, which keeps most requests under way, does not take part in them, and
// weights come at half the speed or less.
bool bypassing_is_fast();

// How much a core can read ahead and then find in caches that are much faster than memory: where the third-level cache
// is such a one (AMD), a share of it; where it is not (Intel's servers), part of the second-level one.
int64_t near_cache_bytes();

// Whether the level's attention has bfloat16 dot products, for which caches keep bfloat16 rather than float16.
inline bool keeps_bfloats(Isa isa) { return isa == Isa::avx512_bf16 || isa >= Isa::amx; }

const char *isa_name(Isa isa);
// The level with that name; Error (unsupported) that names `what` if the processor has none.
Isa find_level(const std::string &name, const char *what);

// The names that this processor can run, lowest first.
std::vector<std::string> available_isas();

}  // namespace mnemos
