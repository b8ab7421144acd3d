// Sixteen groups of weights at a time, one a lane. A group's sums are taken in the order of its weights, as a loop over
// one group would, so the bits are the same for every vector width. Compiled once for each instruction set.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace mnemos {
namespace {

constexpr int lanes = 16;
#if defined(__AVX512F__)
constexpr int width = 16;
#elif defined(__AVX2__)
constexpr int width = 8;
#else
constexpr int width = 4;
#endif
constexpr int parts = lanes / width;
// A register of the processor. Wider ones than it has would be taken apart number by number.
typedef float FloatPart __attribute__((vector_size(4 * width), may_alias));
typedef int32_t IntPart __attribute__((vector_size(4 * width), may_alias));

struct Floats {
  FloatPart part[parts];
};
// What a comparison gives: all bits set or none, lane by lane.
struct Mask {
  IntPart part[parts];
};

#define MNEMOS_EACH(result, type, expression)              \
  type result;                                             \
  for (int k = 0; k < parts; k++) result.part[k] = expression; \
  return result;
#define MNEMOS_OPERATOR(op)                                                                         \
  inline Floats operator op(Floats a, Floats b) { MNEMOS_EACH(y, Floats, a.part[k] op b.part[k]) }  \
  inline Floats operator op(Floats a, float b) { MNEMOS_EACH(y, Floats, a.part[k] op b) }           \
  inline Floats operator op(float a, Floats b) { MNEMOS_EACH(y, Floats, a op b.part[k]) }           \
  inline Floats &operator op##=(Floats &a, Floats b) { return a = a op b; }
MNEMOS_OPERATOR(+)
MNEMOS_OPERATOR(-)
MNEMOS_OPERATOR(*)
MNEMOS_OPERATOR(/)
#define MNEMOS_COMPARISON(op)                                                                    \
  inline Mask operator op(Floats a, Floats b) { MNEMOS_EACH(y, Mask, a.part[k] op b.part[k]) }   \
  inline Mask operator op(Floats a, float b) { MNEMOS_EACH(y, Mask, a.part[k] op b) }
MNEMOS_COMPARISON(<)
MNEMOS_COMPARISON(>)
MNEMOS_COMPARISON(<=)
MNEMOS_COMPARISON(>=)
MNEMOS_COMPARISON(==)
MNEMOS_COMPARISON(!=)
inline Floats operator-(Floats a) { MNEMOS_EACH(y, Floats, -a.part[k]) }
inline Mask operator&(Mask a, Mask b) { MNEMOS_EACH(y, Mask, a.part[k] & b.part[k]) }
inline Mask operator|(Mask a, Mask b) { MNEMOS_EACH(y, Mask, a.part[k] | b.part[k]) }
inline Floats select(Mask mask, Floats a, Floats b) { MNEMOS_EACH(y, Floats, mask.part[k] ? a.part[k] : b.part[k]) }
#undef MNEMOS_COMPARISON
#undef MNEMOS_OPERATOR

inline Floats all(float x) { return Floats{} + x; }
inline Floats magnitude(Floats x) {
  MNEMOS_EACH(y, Floats, reinterpret_cast<FloatPart>(reinterpret_cast<IntPart>(x.part[k]) & 0x7fffffff))
}
#undef MNEMOS_EACH
inline Floats clamp(Floats x, float low, float high) {
  x = select(x < low, all(low), x);
  return select(x > high, all(high), x);
}
// To the nearest integer, halves to even; for magnitudes below 2^22.
inline Floats nearest(Floats x) { return (x + 12582912.f) - 12582912.f; }
inline float nearest(float x) { return (x + 12582912.f) - 12582912.f; }
// Halves away from zero.
inline Floats rounded(Floats x) {
  const Floats even = nearest(x), rest = x - even;
  const Floats up = select((rest == 0.5f) & (x > 0.f), even + 1.f, even);
  return select((rest == -0.5f) & (x < 0.f), up - 1.f, up);
}
inline bool any(Mask mask) {
  IntPart found = mask.part[0];
  for (int k = 1; k < parts; k++) found |= mask.part[k];
  int32_t set = 0;
  for (int l = 0; l < width; l++) set |= found[l];
  return set != 0;
}
inline void store(Floats x, float *y) { std::memcpy(y, &x, sizeof(x)); }
inline Floats load(const float *y) {
  Floats x;
  std::memcpy(&x, y, sizeof(x));
  return x;
}
inline Floats roots(Floats x) {
  alignas(64) float y[lanes];
  store(x, y);
  for (int l = 0; l < lanes; l++) y[l] = std::sqrt(y[l]);
  return load(y);
}

// The weights of up to 16 groups of n, which follow each other at p: x[i] holds the i-th of each. Lanes beyond `count`
// are 0.
template <int n>
inline void load_groups(const float *p, int count, Floats (&x)[n]) {
  float *y = reinterpret_cast<float *>(x);
  if (count < lanes) std::memset(y, 0, sizeof(x));
  for (int l = 0; l < count; l++) {
    for (int i = 0; i < n; i++) y[i * lanes + l] = p[l * n + i];
  }
}
// The same for what is given once a column: the first group begins at column `start` of a row of `columns`.
template <int n>
inline void load_columns(const float *p, int64_t start, int64_t columns, Floats (&x)[n]) {
  float *y = reinterpret_cast<float *>(x);
  for (int l = 0; l < lanes; l++) {
    for (int i = 0; i < n; i++) y[i * lanes + l] = p[start + i];
    start = start + n == columns ? 0 : start + n;
  }
}
// Integers in lanes to bytes in the order of the weights.
template <int n>
inline void store_codes(const Floats (&q)[n], uint8_t *codes) {
  for (int i = 0; i < n; i++) {
    alignas(64) int32_t integers[lanes];
    for (int k = 0; k < parts; k++) {
      const IntPart part = __builtin_convertvector(q[i].part[k], IntPart);
      std::memcpy(integers + k * width, &part, sizeof(part));
    }
    for (int l = 0; l < lanes; l++) codes[l * n + i] = static_cast<uint8_t>(integers[l]);
  }
}

// float16, halves to even; beyond its range infinite.
inline uint16_t half_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t sign = bits >> 16 & 0x8000;
  bits &= 0x7fffffff;
  const uint32_t normal = (bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13;
  // Below 2^-14 the unit is 2^-24, that of a float32 between 0.5 and 1.
  float small;
  std::memcpy(&small, &bits, 4);
  small += 0.5f;
  uint32_t tiny;
  std::memcpy(&tiny, &small, 4);
  tiny -= 0x3f000000;
  const uint32_t special = bits > 0x7f800000 ? 0x7e00 : 0x7c00;
  const uint32_t value = bits >= 0x477ff000 ? special : bits < 0x38800000 ? tiny : normal;
  return static_cast<uint16_t>(sign | value);
}
inline float float_of(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16, rest = half & 0x7fff;
  const float tiny = static_cast<float>(rest) * 0x1p-24f;
  uint32_t bits = rest >= 0x7c00 ? 0x7f800000 | rest << 13 : (rest << 13) + 0x38000000;
  if (rest < 0x400) std::memcpy(&bits, &tiny, 4);
  bits |= sign;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline bool store_half(uint8_t *p, float x) {
  const uint16_t half = half_of(x);
  std::memcpy(p, &half, 2);
  return (half & 0x7c00) != 0x7c00;
}
inline float load_half(const uint8_t *p) {
  uint16_t half;
  std::memcpy(&half, p, 2);
  return float_of(half);
}

}  // namespace
}  // namespace mnemos
