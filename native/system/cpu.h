// Which instruction sets this processor has, and which one the kernels use.
#pragma once

#include <string>
#include <vector>

namespace mnemos {

// Levels of kernels; their names are those of the matrix products' kernels too.
enum class Isa { scalar, neon, neon_i8mm, avx2, avxvnni, avx512, avx512_bf16, amx };

struct CpuFeatures {
  bool avx2 = false;         // with FMA, F16C and BMI2
  bool avx_vnni = false;     // 256-bit VNNI without AVX-512
  bool avx512 = false;       // F, BW, VL, DQ and VNNI
  bool avx512_bf16 = false;  // bf16 dot products
  bool amx = false;          // int8 and bfloat16 tiles; the operating system lets us use them, and they gave the right bits
  bool neon = false;
  bool neon_dotprod = false;
  bool neon_i8mm = false;
};

const CpuFeatures &cpu_features();

// The level in use: the best that the processor has, or a lower one that MNEMOS_ISA or select_isa names.
// A matrix or program keeps the level that it was made under. Throws Error (unsupported) if MNEMOS_ISA is wrong.
Isa current_isa();

// Changes the level for what is made from now on; an empty name goes back to MNEMOS_ISA or the best.
void select_isa(const std::string &name);

const char *isa_name(Isa isa);

// The names that this processor can run, lowest first.
std::vector<std::string> available_isas();

}  // namespace mnemos
