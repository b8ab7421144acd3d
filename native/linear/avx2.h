// The vector policies of AVX2 (with FMA and F16C) and of AVX-VNNI: a panel's 16 rows are two registers.
#pragma once

#include <immintrin.h>

#include "linear/product.h"

namespace mnemos {
namespace {

struct IntPair {
  __m256i low, high;
};
struct FloatPair {
  __m256 low, high;
};

struct Avx2 {
  using Bytes = IntPair;
  using Ints = IntPair;
  using Floats = FloatPair;
  using Quad = __m256i;
  static constexpr Form bf16_form = Form::f32;
  static constexpr bool signed_bytes = true;  // pairs of products of two full bytes overflow 16 bits: see `dot`
  static constexpr int narrow_bits = 4;
  template <int Bits>
  static constexpr int together = Bits == 5 || Bits == 6 ? 2 : 1;
  static constexpr int tile_panels = 1, tile_rows = 4, float_rows = 2, stream_rows = 4, fine_rows = 3, split_rows = 0;
  static constexpr int rows_together = 8, blocks_together = 1;
  static constexpr bool bfloat_minima = false, adds_exponents = false;

  template <class Lane>
  static IntPair each(IntPair a, Lane lane) {
    return {lane(a.low), lane(a.high)};
  }
  static __m256i load_ints(const void *p) { return _mm256_loadu_si256(static_cast<const __m256i *>(p)); }
  static __m128i load_ints_half(const void *p) { return _mm_loadu_si128(static_cast<const __m128i *>(p)); }

  static Bytes load(const uint8_t *p) { return {load_ints(p), load_ints(p + 32)}; }
  static Bytes in_register(Bytes a) { return a; }
  static void store(uint8_t *p, Bytes a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), a.low);
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(p + 32), a.high);
  }
  template <int Shift>
  static Bytes shift(Bytes a) {
    return each(a, [](__m256i v) {
      if constexpr (Shift > 0) v = _mm256_slli_epi16(v, Shift);
      if constexpr (Shift < 0) v = _mm256_srli_epi16(v, -Shift);
      return v;
    });
  }
  template <int Shift, int Mask>
  static Bytes bits(Bytes a) {
    return each(shift<Shift>(a), [](__m256i v) { return _mm256_and_si256(v, _mm256_set1_epi8(Mask)); });
  }
  static Bytes either(Bytes a, Bytes b) { return {_mm256_or_si256(a.low, b.low), _mm256_or_si256(a.high, b.high)}; }
  static Bytes lookup(Bytes a, const uint8_t *table) {
    const __m256i values = _mm256_broadcastsi128_si256(load_ints_half(table));
    return each(a, [&](__m256i v) { return _mm256_shuffle_epi8(values, v); });
  }

  static Ints broadcast_int(int32_t value) { return {_mm256_set1_epi32(value), _mm256_set1_epi32(value)}; }
  static Ints add_ints(Ints a, Ints b) { return {_mm256_add_epi32(a.low, b.low), _mm256_add_epi32(a.high, b.high)}; }
  static Ints shift_part(Ints a) { return {_mm256_slli_epi32(a.low, 7), _mm256_slli_epi32(a.high, 7)}; }
  static Quad broadcast_quad(const int8_t *p) {
    int32_t quad;
    __builtin_memcpy(&quad, p, 4);
    return _mm256_set1_epi32(quad);
  }

  // Sums of small codes stay in 16 bits until the block ends: 16 products of at most 15 * 127.
  template <int Bits>
  static Ints begin(int32_t start) {
    return broadcast_int(Bits <= narrow_bits ? 0 : start);
  }
  template <int Bits>
  static Ints dot(Ints sum, Bytes codes, Quad x) {
    return {in_order(dot_half<Bits>(sum.low, codes.low, x)), in_order(dot_half<Bits>(sum.high, codes.high, x))};
  }
  // Four products of at most 63 * 127 fit into 16 bits.
  template <int Bits>
  static Ints dot_two(Ints sum, const Bytes (&codes)[2], const Quad (&x)[2]) {
    auto add = [&](__m256i sum, __m256i first, __m256i second) {
      const __m256i fours = _mm256_add_epi16(_mm256_maddubs_epi16(first, x[0]), _mm256_maddubs_epi16(second, x[1]));
      return in_order(_mm256_add_epi32(sum, _mm256_madd_epi16(fours, _mm256_set1_epi16(1))));
    };
    return {add(sum.low, codes[0].low, codes[1].low), add(sum.high, codes[0].high, codes[1].high)};
  }
  // Left alone, GCC adds up in another order, which needs so many live terms that it spills them.
  static __m256i in_order(__m256i sum) {
    __asm__("" : "+x"(sum));
    return sum;
  }
  template <int Bits>
  static Ints end(Ints sum, int32_t start) {
    if constexpr (Bits > narrow_bits) return sum;
    const __m256i ones = _mm256_set1_epi16(1);
    return add_ints(each(sum, [&](__m256i v) { return _mm256_madd_epi16(v, ones); }), broadcast_int(start));
  }
  template <int Bits>
  static __m256i dot_half(__m256i sum, __m256i codes, __m256i x) {
    if constexpr (Bits <= narrow_bits) return _mm256_add_epi16(sum, _mm256_maddubs_epi16(codes, x));
    if constexpr (Bits == 8) {  // |code - 128| times the activation with the sign of code - 128
      const __m256i value = _mm256_xor_si256(codes, _mm256_set1_epi8(-128));
      x = _mm256_sign_epi8(x, value);
      codes = _mm256_abs_epi8(value);
    }
    const __m256i pairs = _mm256_maddubs_epi16(codes, x);
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }

  static Floats zero() { return broadcast(0); }
  static Floats broadcast(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
  static Floats load(const float *p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  static void store(float *p, Floats a) {
    _mm256_storeu_ps(p, a.low);
    _mm256_storeu_ps(p + 8, a.high);
  }
  static Floats load_halves(const uint8_t *p) {
    return {_mm256_cvtph_ps(load_ints_half(p)), _mm256_cvtph_ps(load_ints_half(p + 16))};
  }
  static Floats load_int8s(const uint8_t *p) {
    const __m128i bytes = load_ints_half(p);
    return to_floats({_mm256_cvtepi8_epi32(bytes), _mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8))});
  }
  static Floats load_low_bfloats(const uint8_t *p) {
    return as_floats(each(load(p), [](__m256i v) { return _mm256_slli_epi32(v, 16); }));
  }
  static Floats load_high_bfloats(const uint8_t *p) {
    return as_floats(each(load(p), [](__m256i v) { return _mm256_and_si256(v, _mm256_set1_epi32(int(0xffff0000))); }));
  }
  static Floats as_floats(Ints a) { return {_mm256_castsi256_ps(a.low), _mm256_castsi256_ps(a.high)}; }
  static Floats to_floats(Ints a) { return {_mm256_cvtepi32_ps(a.low), _mm256_cvtepi32_ps(a.high)}; }
  static Floats negate(Floats a) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_xor_ps(a.low, sign), _mm256_xor_ps(a.high, sign)};
  }
  static Floats add(Floats a, Floats b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
  static Floats multiply(Floats a, Floats b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
  static Floats fma(Floats a, Floats b, Floats c) {
    return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
  }

  static __m128i fold(__m256i a) { return _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1)); }
  static int32_t sum_lanes(__m256i a) {
    __m128i four = fold(a);
    four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
  }
  // Magnitudes are ordered like their bits, with NaN above all numbers.
  static float largest_magnitude(const float *x) {
    __m256i most = _mm256_setzero_si256();
    for (int i = 0; i < 4; i++) {
      const __m256i bits = _mm256_castps_si256(_mm256_loadu_ps(x + i * 8));
      most = _mm256_max_epi32(most, _mm256_and_si256(bits, _mm256_set1_epi32(0x7fffffff)));
    }
    __m128i four = _mm_max_epi32(_mm256_castsi256_si128(most), _mm256_extracti128_si256(most, 1));
    four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    return from_bits(uint32_t(_mm_cvtsi128_si32(_mm_max_epi32(four, _mm_shuffle_epi32(four, 0xb1)))));
  }
  template <int Parts>
  static void quantize(const float *x, float inverse, int8_t *quants, int32_t *counts) {
    __m256i values[4];
    for (int i = 0; i < 4; i++)
      values[i] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + i * 8), _mm256_set1_ps(inverse)));
    for (int half = 0; half < 2; half++)
      counts[half] = sum_lanes(_mm256_add_epi32(values[2 * half], values[2 * half + 1]));
    if constexpr (Parts == 2) {
      __m256i first[4];
      for (int i = 0; i < 4; i++) {
        first[i] = _mm256_srai_epi32(_mm256_add_epi32(values[i], _mm256_set1_epi32(64)), 7);
        values[i] = _mm256_sub_epi32(values[i], _mm256_slli_epi32(first[i], 7));
      }
      store_int8s(quants, first);
    }
    store_int8s(quants + (Parts - 1) * 32, values);
  }
  static void store_int8s(int8_t *p, const __m256i *a) {
    const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(a[0], a[1]), _mm256_packs_epi32(a[2], a[3]));
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), _mm256_permutevar8x32_epi32(bytes, order));
  }
};

#if defined(__AVXVNNI__)
struct AvxVnni : Avx2 {
  static constexpr bool signed_bytes = false;
  static constexpr int narrow_bits = 0, split_rows = 2;
  template <int Bits>
  static constexpr int together = 1;

  template <int Bits>
  static Ints begin(int32_t start) {
    return broadcast_int(start);
  }
  template <int Bits>
  static Ints dot(Ints sum, Bytes codes, Quad x) {
    return {_mm256_dpbusd_avx_epi32(sum.low, codes.low, x), _mm256_dpbusd_avx_epi32(sum.high, codes.high, x)};
  }
  template <int Bits>
  static Ints end(Ints sum, int32_t) {
    return sum;
  }
};
#endif

}  // namespace
}  // namespace mnemos
