// Small vectors of float32 for one instruction set: the file that includes this is compiled for exactly that set.
// Everything is in an unnamed namespace so that code for different sets never meets in the linker.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace mnemos {
namespace {

#if defined(__AVX512F__)

constexpr int width = 16;
using Vec = __m512;
using Mask = __mmask16;
inline Vec zero() { return _mm512_setzero_ps(); }
inline Vec splat(float x) { return _mm512_set1_ps(x); }
inline Vec load(const float *p) { return _mm512_loadu_ps(p); }
inline void store(float *p, Vec x) { _mm512_storeu_ps(p, x); }
inline Vec load_part(const float *p, int n) { return _mm512_maskz_loadu_ps(static_cast<Mask>((1u << n) - 1), p); }
inline void store_part(float *p, Vec x, int n) { _mm512_mask_storeu_ps(p, static_cast<Mask>((1u << n) - 1), x); }
inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
inline Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
inline Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
inline Vec abs(Vec a) { return _mm512_abs_ps(a); }
inline Vec nearest(Vec a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Mask less(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
inline Vec select(Mask m, Vec yes, Vec no) { return _mm512_mask_blend_ps(m, no, yes); }
inline Vec times_power_of_two(Vec x, Vec n) { return _mm512_scalef_ps(x, n); }  // n whole, -126 to 127
inline Vec copy_sign(Vec magnitude, Vec sign) {
  const __m512i bit = _mm512_set1_epi32(static_cast<int>(0x80000000u));
  return _mm512_castsi512_ps(_mm512_or_epi32(_mm512_andnot_epi32(bit, _mm512_castps_si512(magnitude)),
                                             _mm512_and_epi32(bit, _mm512_castps_si512(sign))));
}
inline float sum(Vec a) { return _mm512_reduce_add_ps(a); }
inline float largest(Vec a) { return _mm512_reduce_max_ps(a); }
inline unsigned bits(Mask m) { return m; }
inline Vec load_half(const uint16_t *p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)));
}
inline void store_half(uint16_t *p, Vec x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
inline Vec load_low_brain(const uint32_t *pairs) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(pairs), 16));
}
inline Vec load_high_brain(const uint32_t *pairs) {
  return _mm512_castsi512_ps(
      _mm512_and_si512(_mm512_loadu_si512(pairs), _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}
inline Vec load_byte(const int8_t *p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p))));
}

#elif defined(__AVX2__)

constexpr int width = 8;
using Vec = __m256;
using Mask = __m256;
inline Vec zero() { return _mm256_setzero_ps(); }
inline Vec splat(float x) { return _mm256_set1_ps(x); }
inline Vec load(const float *p) { return _mm256_loadu_ps(p); }
inline void store(float *p, Vec x) { _mm256_storeu_ps(p, x); }
inline __m256i first_lanes(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline Vec load_part(const float *p, int n) { return _mm256_maskload_ps(p, first_lanes(n)); }
inline void store_part(float *p, Vec x, int n) { _mm256_maskstore_ps(p, first_lanes(n), x); }
inline Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
inline Vec div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
inline Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
inline Vec min(Vec a, Vec b) { return _mm256_min_ps(a, b); }
inline Vec abs(Vec a) { return _mm256_andnot_ps(splat(-0.0f), a); }
inline Vec nearest(Vec a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Mask less(Vec a, Vec b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
inline Vec select(Mask m, Vec yes, Vec no) { return _mm256_blendv_ps(no, yes, m); }
inline Vec times_power_of_two(Vec x, Vec n) {
  return mul(x, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtps_epi32(add(n, splat(127.0f))), 23)));
}
inline Vec copy_sign(Vec magnitude, Vec sign) {
  const Vec bit = splat(-0.0f);
  return _mm256_or_ps(_mm256_andnot_ps(bit, magnitude), _mm256_and_ps(bit, sign));
}
inline float sum(Vec a) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_shuffle_ps(x, x, 1)));
}
inline float largest(Vec a) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_shuffle_ps(x, x, 1)));
}
inline unsigned bits(Mask m) { return static_cast<unsigned>(_mm256_movemask_ps(m)); }
inline Vec load_half(const uint16_t *p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
}
inline void store_half(uint16_t *p, Vec x) {
  _mm_storeu_si128(reinterpret_cast<__m128i *>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
inline Vec load_low_brain(const uint32_t *pairs) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(pairs)), 16));
}
inline Vec load_high_brain(const uint32_t *pairs) {
  const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(pairs));
  return _mm256_castsi256_ps(_mm256_and_si256(raw, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
}
inline Vec load_byte(const int8_t *p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(p))));
}

#else  // any machine: GCC's and Clang's portable vectors, which become SSE2 or NEON or plain code

constexpr int width = 8;
typedef float Vec __attribute__((vector_size(32), aligned(4)));
typedef int32_t Mask __attribute__((vector_size(32), aligned(4)));
inline Vec splat(float x) { return Vec{x, x, x, x, x, x, x, x}; }
inline Vec zero() { return splat(0.0f); }
inline Vec load(const float *p) {
  Vec x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
inline void store(float *p, Vec x) { std::memcpy(p, &x, sizeof x); }
inline Vec load_part(const float *p, int n) {
  Vec x = zero();
  for (int i = 0; i < n; i++) x[i] = p[i];
  return x;
}
inline void store_part(float *p, Vec x, int n) {
  for (int i = 0; i < n; i++) p[i] = x[i];
}
inline Vec add(Vec a, Vec b) { return a + b; }
inline Vec sub(Vec a, Vec b) { return a - b; }
inline Vec mul(Vec a, Vec b) { return a * b; }
inline Vec div(Vec a, Vec b) { return a / b; }
#if defined(__aarch64__)
inline Vec fma(Vec a, Vec b, Vec c) {
  float32x4_t x[2], y[2], z[2];
  std::memcpy(x, &a, sizeof a), std::memcpy(y, &b, sizeof b), std::memcpy(z, &c, sizeof c);
  for (int i = 0; i < 2; i++) z[i] = vfmaq_f32(z[i], x[i], y[i]);
  std::memcpy(&c, z, sizeof c);
  return c;
}
#else
inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }  // rounded twice: no fused unit on every machine
#endif
inline Vec select(Mask m, Vec yes, Vec no) {
  Mask a, b;
  std::memcpy(&a, &yes, sizeof a), std::memcpy(&b, &no, sizeof b);
  a = (a & m) | (b & ~m);
  std::memcpy(&yes, &a, sizeof a);
  return yes;
}
inline Mask less(Vec a, Vec b) { return a < b; }
inline Vec max(Vec a, Vec b) { return select(a > b, a, b); }
inline Vec min(Vec a, Vec b) { return select(a < b, a, b); }
inline Vec nearest(Vec a) {  // exact for |a| < 2^22
  const Vec magic = splat(12582912.0f);
  return (a + magic) - magic;
}
inline Vec copy_sign(Vec magnitude, Vec sign) {
  Mask a, b;
  std::memcpy(&a, &magnitude, sizeof a), std::memcpy(&b, &sign, sizeof b);
  a = (a & 0x7fffffff) | (b & static_cast<int32_t>(0x80000000u));
  std::memcpy(&magnitude, &a, sizeof a);
  return magnitude;
}
inline Vec abs(Vec a) { return copy_sign(a, zero()); }
inline Vec times_power_of_two(Vec x, Vec n) {
  const Mask exponent = (__builtin_convertvector(n, Mask) + 127) << 23;
  Vec power;
  std::memcpy(&power, &exponent, sizeof power);
  return x * power;
}
inline float sum(Vec a) { return ((a[0] + a[4]) + (a[2] + a[6])) + ((a[1] + a[5]) + (a[3] + a[7])); }
inline float largest(Vec a) {
  float most = a[0];
  for (int i = 1; i < width; i++) most = a[i] > most ? a[i] : most;
  return most;
}
inline unsigned bits(Mask m) {
  unsigned result = 0;
  for (int i = 0; i < width; i++) result |= (m[i] ? 1u : 0u) << i;
  return result;
}
inline float half_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16, body = half & 0x7fff;
  uint32_t value = (body << 13) + 0x38000000u;  // normal numbers: a larger bias
  if (body >= 0x7c00) value = (body << 13) | 0x7f800000u;  // infinity and NaN
  float x;
  if (body < 0x0400) {  // subnormal: a multiple of 2^-24
    x = static_cast<float>(body) * 5.9604644775390625e-8f;
    std::memcpy(&value, &x, 4);
  }
  value |= sign;
  std::memcpy(&x, &value, 4);
  return x;
}
inline uint16_t float_to_half(float x) {
  uint32_t value;
  std::memcpy(&value, &x, 4);
  const uint32_t sign = (value >> 16) & 0x8000, body = value & 0x7fffffff;
  if (body > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00);
  if (body >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00);
  if (body < 0x38800000u) {  // subnormal: let the float unit round to a multiple of 2^-24
    float magnitude;
    std::memcpy(&magnitude, &body, 4);
    const float shifted = magnitude + 0.5f;
    std::memcpy(&value, &shifted, 4);
    return static_cast<uint16_t>(sign | (value - 0x3f000000u));
  }
  return static_cast<uint16_t>(sign | ((body - 0x38000000u + 0xfff + ((body >> 13) & 1)) >> 13));
}
inline Vec load_half(const uint16_t *p) {
  Vec x;
  for (int i = 0; i < width; i++) x[i] = half_to_float(p[i]);
  return x;
}
inline void store_half(uint16_t *p, Vec x) {
  for (int i = 0; i < width; i++) p[i] = float_to_half(x[i]);
}
inline Vec load_low_brain(const uint32_t *pairs) {
  uint32_t raw[width];
  for (int i = 0; i < width; i++) raw[i] = pairs[i] << 16;
  Vec x;
  std::memcpy(&x, raw, sizeof x);
  return x;
}
inline Vec load_high_brain(const uint32_t *pairs) {
  uint32_t raw[width];
  for (int i = 0; i < width; i++) raw[i] = pairs[i] & 0xffff0000u;
  Vec x;
  std::memcpy(&x, raw, sizeof x);
  return x;
}
inline Vec load_byte(const int8_t *p) {
  Vec x;
  for (int i = 0; i < width; i++) x[i] = static_cast<float>(p[i]);
  return x;
}

#endif

// e^x within 1 ulp; 0 below -87.3, and the largest finite power above 88.3.
inline Vec exp(Vec x) {
  const Mask vanishes = less(x, splat(-87.33654f));
  const Vec clamped = min(max(x, splat(-87.33654f)), splat(88.37626f));
  const Vec n = nearest(mul(clamped, splat(1.44269504f)));
  Vec r = fma(n, splat(-0.693359375f), clamped);
  r = fma(n, splat(2.12194440e-4f), r);
  Vec p = splat(1.9875691500e-4f);  // e^r = 1 + r + r^2 p(r) for |r| < ln(2) / 2
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  const Vec y = add(fma(mul(r, r), p, r), splat(1.0f));
  return select(vanishes, zero(), times_power_of_two(y, n));
}

// Into the second-level cache: the first one has room for few requests, and further ones wait.
inline void prefetch(const uint8_t *p) { __builtin_prefetch(p, 0, 2); }

// Calls body(offset, n) with n = width for whole vectors and once with the rest.
template <typename Body>
inline void for_vectors(int64_t count, const Body &body) {
  int64_t i = 0;
  for (; i + width <= count; i += width) body(i, width);
  if (i < count) body(i, static_cast<int>(count - i));
}
inline Vec load_any(const float *p, int n) { return n == width ? load(p) : load_part(p, n); }
inline void store_any(float *p, Vec x, int n) { n == width ? store(p, x) : store_part(p, x, n); }

}  // namespace
}  // namespace mnemos
