// The vector policy of AVX-512 with VNNI: a panel's 16 rows are one register.
#pragma once

// GCC 12's own headers initialise "undefined" vectors with themselves and warn of it here.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#include "linear/product.h"

namespace mnemos {
namespace {

struct Avx512 {
  using Bytes = __m512i;
  using Ints = __m512i;
  using Floats = __m512;
  static constexpr Form bf16_form = Form::f32;
  static constexpr bool signed_bytes = false;
  static constexpr int narrow_bits = 0;
  static constexpr int tile_panels = 2, tile_rows = 6, float_rows = 6, stream_rows = 8;

  static Bytes load(const uint8_t *p) { return _mm512_loadu_si512(p); }
  static void store(uint8_t *p, Bytes a) { _mm512_storeu_si512(p, a); }
  template <int Shift, int Mask>
  static Bytes bits(Bytes a) {
    if constexpr (Shift > 0) a = _mm512_slli_epi16(a, Shift);
    if constexpr (Shift < 0) a = _mm512_srli_epi16(a, -Shift);
    return _mm512_and_si512(a, _mm512_set1_epi8(Mask));
  }
  static Bytes either(Bytes a, Bytes b) { return _mm512_or_si512(a, b); }
  static Bytes lookup(Bytes a, const uint8_t *table) {
    const __m128i values = _mm_loadu_si128(reinterpret_cast<const __m128i *>(table));
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(values), a);
  }

  static Ints broadcast_int(int32_t value) { return _mm512_set1_epi32(value); }
  static Ints broadcast_quad(const int8_t *p) {
    int32_t quad;
    __builtin_memcpy(&quad, p, 4);
    return _mm512_set1_epi32(quad);
  }
  template <int Bits>
  static Ints begin(int32_t start) {
    return broadcast_int(start);
  }
  template <int Bits>
  static Ints end(Ints sum, int32_t) {
    return sum;
  }
  template <int Bits>
  static Ints dot(Ints sum, Bytes codes, Ints x) {
    return _mm512_dpbusd_epi32(sum, codes, x);
  }

  static Ints add_ints(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
  static Ints shift_part(Ints a) { return _mm512_slli_epi32(a, 7); }

  static Floats zero() { return _mm512_setzero_ps(); }
  static Floats broadcast(float value) { return _mm512_set1_ps(value); }
  static Floats load(const float *p) { return _mm512_loadu_ps(p); }
  static void store(float *p, Floats a) { _mm512_storeu_ps(p, a); }
  static Floats load_halves(const uint8_t *p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)));
  }
  static Floats load_int8s(const uint8_t *p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p))));
  }
  static Floats load_low_bfloats(const uint8_t *p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(p), 16));
  }
  static Floats load_high_bfloats(const uint8_t *p) {
    return _mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi32(int(0xffff0000))));
  }
  static Floats to_floats(Ints a) { return _mm512_cvtepi32_ps(a); }
  static Floats negate(Floats a) { return _mm512_xor_ps(a, _mm512_set1_ps(-0.0f)); }
  static Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
  static Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
  static Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }

  static float largest_magnitude(const float *x) {
    const __m512 a = _mm512_loadu_ps(x), b = _mm512_loadu_ps(x + 16);
    return _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(a), _mm512_abs_ps(b)));
  }
  template <int Parts>
  static void quantize(const float *x, float inverse, int8_t *quants, int32_t *counts) {
    for (int half = 0; half < 2; half++, x += 16, quants += 16) {
      __m512i value = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x), _mm512_set1_ps(inverse)));
      counts[half] = _mm512_reduce_add_epi32(value);
      if constexpr (Parts == 2) {
        const __m512i first = _mm512_srai_epi32(_mm512_add_epi32(value, _mm512_set1_epi32(64)), 7);
        store_int8s(quants, first);
        value = _mm512_sub_epi32(value, _mm512_slli_epi32(first, 7));
      }
      store_int8s(quants + (Parts - 1) * 32, value);
    }
  }
  static void store_int8s(int8_t *p, __m512i a) {
    _mm_storeu_si128(reinterpret_cast<__m128i *>(p), _mm512_cvtepi32_epi8(a));
  }
};

}  // namespace
}  // namespace mnemos
