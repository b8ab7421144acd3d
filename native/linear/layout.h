// The layout of a storage type in a panel of 16 output rows.
//
// Quantized types: a panel is a sequence of records, one for each block of the file's form (`group` blocks of 32
// columns). A record holds the codes of its blocks, then the scales:
//
//   codes of a block    [base plane][high plane]; "vector v" below is the 64 bytes of columns 4v..4v+3 of the block,
//                       byte 4r + i for row r, column 4v + i:
//     base 8 bits       8 vectors of 64 bytes
//     base 4 bits       4 vectors; j holds vector j in its low nibbles, vector 4 + j in its high ones
//     base 2 bits       2 vectors; k holds vector 2i + k in bits 2i and 2i + 1
//     high 1 bit        1 vector; holds vector v in bit v: the bit above the base ones
//     high 2 bits       2 vectors, as base 2 bits: the bits above the base ones
//   scales
//     half              float16 scale [16]
//     half_min          float16 scale [16], float16 minimum [16]
//     sub32             int8 [8][16] for each block, then float16 scale [16] of the record
//     sub32_min         int8 [8][16], uint8 minima [8][16], float16 scale [16], float16 scale of the minima [16]
//     sub16             like sub32, with a scale for every 16 columns: [16][16]
//     sub16_min         like sub32_min, [16][16]
//
// A code stands for scale * (code - offset) + minimum (sub*_min: minus), after a lookup in `table` if there is one.
// A broadcast of four activations thus meets 16 rows at once, and no kernel sums across lanes.
//
// Float types: column after column, 16 rows side by side; bfloat16 in pairs of columns, (c, c + 1) side by side for
// each row, with a column of zeros after an odd last one.
#pragma once

#include "linear/linear.h"

namespace mnemos {

enum class Scales : uint8_t { none, half, half_min, sub32, sub32_min, sub16, sub16_min };

struct Layout {
  WeightType type;  // f32, f16 or bf16 for the float layouts
  int base, high;  // bits of a code in the base plane and in the high one
  Scales scales;
  int offset;  // subtracted from the code (after the table)
  bool table;  // codes are indices of iq4_values
  int group;  // blocks of 32 columns in a record

  constexpr int bits() const { return table ? 8 : base + high; }
  constexpr int code_bytes() const { return 64 * (base + high); }
  constexpr bool halves() const { return scales == Scales::sub16 || scales == Scales::sub16_min; }
  constexpr bool minimum() const {
    return scales == Scales::half_min || scales == Scales::sub32_min || scales == Scales::sub16_min;
  }
  // What kernels that round minima to bfloat16 subtract from a code: where a code has a minimum, half of the codes'
  // range, so that what then remains of the minimum is small. (Not for `halves`.)
  constexpr int centre() const { return minimum() && !halves() ? 1 << (bits() - 1) : offset; }
  constexpr int subscales() const { return group == 1 ? 0 : halves() ? 16 : 8; }  // of a record
  constexpr int scale_bytes() const { return (subscales() * 16 + 32) * (minimum() ? 2 : 1); }
  constexpr int record_bytes() const { return group * code_bytes() + scale_bytes(); }
  constexpr bool quantized() const { return scales != Scales::none; }
};

namespace layouts {
constexpr Layout f32{WeightType::f32, 0, 0, Scales::none, 0, false, 0};
constexpr Layout f16{WeightType::f16, 0, 0, Scales::none, 0, false, 0};
constexpr Layout bf16{WeightType::bf16, 0, 0, Scales::none, 0, false, 0};
constexpr Layout q4_0{WeightType::q4_0, 4, 0, Scales::half, 8, false, 1};
constexpr Layout q4_1{WeightType::q4_1, 4, 0, Scales::half_min, 0, false, 1};
constexpr Layout q5_0{WeightType::q5_0, 4, 1, Scales::half, 16, false, 1};
constexpr Layout q5_1{WeightType::q5_1, 4, 1, Scales::half_min, 0, false, 1};
constexpr Layout q8_0{WeightType::q8_0, 8, 0, Scales::half, 128, false, 1};
constexpr Layout q2_k{WeightType::q2_k, 2, 0, Scales::sub16_min, 0, false, 8};
constexpr Layout q3_k{WeightType::q3_k, 2, 1, Scales::sub16, 4, false, 8};
constexpr Layout q4_k{WeightType::q4_k, 4, 0, Scales::sub32_min, 0, false, 8};
constexpr Layout q5_k{WeightType::q5_k, 4, 1, Scales::sub32_min, 0, false, 8};
constexpr Layout q6_k{WeightType::q6_k, 4, 2, Scales::sub16, 32, false, 8};
constexpr Layout iq4_nl{WeightType::iq4_nl, 4, 0, Scales::half, 128, true, 1};
constexpr Layout iq4_xs{WeightType::iq4_xs, 4, 0, Scales::sub32, 128, true, 8};
}  // namespace layouts

// The values of IQ4_NL and IQ4_XS, plus 128 so that all codes are unsigned.
constexpr uint8_t iq4_values[16] = {1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241};

const Layout &layout_of(WeightType type);
size_t panel_bytes_of(const Layout &layout, int64_t columns);

static inline float from_bits(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

static inline uint32_t to_bits(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  return bits;
}

static inline float half_to_float(uint16_t half) {
  const uint32_t sign = uint32_t(half & 0x8000) << 16, magnitude = half & 0x7fff;
  if (magnitude >= 0x7c00) return from_bits(sign | 0x7f800000 | (magnitude << 13));  // infinity, NaN
  if (magnitude < 0x0400) {  // zero, subnormal
    const float value = float(magnitude) * 0x1p-24f;
    return sign ? -value : value;
  }
  return from_bits(sign | ((magnitude << 13) + (112u << 23)));
}

static inline float bfloat_to_float(uint16_t value) { return from_bits(uint32_t(value) << 16); }

// Round to nearest even; NaN stays NaN.
static inline uint16_t float_to_bfloat(float value) {
  const uint32_t bits = to_bits(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t((bits >> 16) | 0x40);
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

}  // namespace mnemos
