// The vector policy of AVX-512 with VNNI and the bfloat16 dot product.
#pragma once

#include "linear/avx512.h"

namespace mnemos {
namespace {

// Whether additions of integers and of floats have separate execution units, so that three of them cost less than
// the product they replace: AMD's Zen 4 and 5 (Software Optimization Guides). Intel's run on the units of the dot
// products.
inline bool adds_beside_products() {
  static const bool amd = __builtin_cpu_is("amd");
  return amd;
}

struct Avx512Bf16 : Avx512 {
  static constexpr Form bf16_form = Form::bf16;
  static constexpr int rows_together = 3;
  static constexpr bool bfloat_minima = true, adds_exponents = true;

  static __m512bh as_bfloats(__m512i a) { return reinterpret_cast<__m512bh>(a); }
  static Bytes as_bytes(Floats a) { return _mm512_castps_si512(a); }
  static __m512i broadcast_bfloats(const uint16_t *p) { return broadcast_quad(reinterpret_cast<const int8_t *>(p)); }
  static Floats dot_bfloats(Floats sum, Bytes weights, __m512i x) {
    return _mm512_dpbf16_ps(sum, as_bfloats(weights), as_bfloats(x));
  }
  // Both rounded to bfloat16, side by side.
  static Floats pair_bfloats(Floats even, Floats odd) {
    const __m512i half = _mm512_set1_epi32(0x8000);
    const __m512i low = _mm512_srli_epi32(_mm512_add_epi32(_mm512_castps_si512(even), half), 16);
    const __m512i high = _mm512_add_epi32(_mm512_castps_si512(odd), half);
    return _mm512_castsi512_ps(_mm512_mask_blend_epi16(0xaaaaaaaa, low, high));
  }

  // Whether all are numbers that `multiply_powers` can multiply by any powers of activations: 2^-30 to 2^30.
  static bool ordinary(Floats scales) {
    if (!adds_beside_products()) return false;
    const __m512i bits = _mm512_and_si512(_mm512_castps_si512(scales), _mm512_set1_epi32(0x7fffffff));
    const __m512i above = _mm512_sub_epi32(bits, _mm512_set1_epi32((127 - 30) << 23));
    return _mm512_cmpge_epu32_mask(above, _mm512_set1_epi32(60 << 23)) == 0;
  }
  // scales * (powers[0] + powers[1]), rounded once as a product is: both terms are exact.
  static Floats multiply_powers(Floats scales, const float *powers) {
    const __m512i unbiased = _mm512_sub_epi32(_mm512_castps_si512(scales), _mm512_set1_epi32(127 << 23));
    const __m512i first = _mm512_add_epi32(unbiased, _mm512_castps_si512(broadcast(powers[0])));
    const __m512i second = _mm512_add_epi32(unbiased, _mm512_castps_si512(broadcast(powers[1])));
    return _mm512_add_ps(_mm512_castsi512_ps(first), _mm512_castsi512_ps(second));
  }
};

}  // namespace
}  // namespace mnemos
