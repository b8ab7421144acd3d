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
  using Quad = __m512i;
  static constexpr Form bf16_form = Form::f32;
  static constexpr bool signed_bytes = false;
  static constexpr int narrow_bits = 0;
  static constexpr int tile_panels = 2, tile_rows = 6, float_rows = 6, stream_rows = 8, fine_rows = 8, split_rows = 8;
  template <int Bits>
  static constexpr int together = 1;
  static constexpr int rows_together = 6, blocks_together = 16;
  static constexpr bool bfloat_minima = false, adds_exponents = false;

  static Bytes load(const uint8_t *p) { return _mm512_loadu_si512(p); }
  static void store(uint8_t *p, Bytes a) { _mm512_storeu_si512(p, a); }
  // Left alone, GCC reads codes from memory again for each row and for each group of rows, or keeps so many of them
  // that it spills the totals.
  static Bytes in_register(Bytes a) {
    __asm__ volatile("" : "+v"(a));
    return a;
  }
  template <int Shift>
  static Bytes shift(Bytes a) {
    if constexpr (Shift > 0) a = _mm512_slli_epi16(a, Shift);
    if constexpr (Shift < 0) a = _mm512_srli_epi16(a, -Shift);
    return a;
  }
  template <int Shift, int Mask>
  static Bytes bits(Bytes a) {
    return _mm512_and_si512(shift<Shift>(a), _mm512_set1_epi8(Mask));
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

  // The scales of up to 16 blocks, and their quants. With several such groups, the next one's scales come first:
  // these are a long chain of steps, which the quants of the group before hide.
  struct Scales {
    alignas(64) float inverses[16], powers[2][16];  // powers[0]: of blocks 0, 1, 4, 5 and so on
  };
  template <int Parts>
  static void find_scales(const float *const *x, int count, Scales &scales) {
    static_assert(blocks_together == 16, "a lane for each");
    alignas(64) float largest[16] = {};
    for (int i = 0; i < count; i += 4) _mm_store_ps(largest + i, largest_of_four(x + i));
    __m512 first, second;
    _mm512_store_ps(scales.inverses, split_scales<Parts>(_mm512_load_ps(largest), first, second));
    _mm512_store_ps(scales.powers[0], _mm512_unpacklo_ps(first, second));
    _mm512_store_ps(scales.powers[1], _mm512_unpackhi_ps(first, second));
  }
  // With `Powers`, blocks get two powers of two, and sums in bfloat16.
  template <int Parts, bool Powers>
  static void quantize_together(const float *const *x, const Scales &scales, QuantBlock<Parts> *const *blocks,
                                int count) {
    for (int i = 0; i < count; i += 2)
      quantize_pair<Parts, Powers>(x + i, scales.inverses + i, scales.powers[i / 2 % 2] + i / 4 * 4, blocks + i);
  }

  // Scales as sums of two powers, as `split_scale` does it; returns their inverses.
  template <int Parts>
  static __m512 split_scales(__m512 largest, __m512 &first, __m512 &second) {
    const __m512 power = _mm512_castsi512_ps(_mm512_set1_epi32(0x7f800000)), one = _mm512_set1_ps(1);
    const __mmask16 plain = _mm512_cmp_ps_mask(largest, _mm512_set1_ps(smallest_magnitude), _CMP_NLE_UQ);
    const __mmask16 immense = _mm512_cmp_ps_mask(largest, _mm512_set1_ps(largest_magnitude), _CMP_NLE_UQ);
    const __m512 scale = _mm512_div_ps(largest, _mm512_set1_ps(largest_quant<Parts>));
    const __m512 low = _mm512_and_ps(scale, power), high = _mm512_add_ps(low, low);
    const __m512 least = _mm512_mul_ps(low, _mm512_set1_ps(finest_step));
    const __m512 lack = _mm512_sub_ps(high, scale), rest = _mm512_max_ps(_mm512_sub_ps(scale, low), least);
    const __m512i above_rest = _mm512_add_epi32(_mm512_castps_si512(rest), _mm512_set1_epi32(0x007fffff));
    const __m512 up = _mm512_and_ps(_mm512_castsi512_ps(above_rest), power);
    const __m512 down = _mm512_maskz_and_ps(_mm512_cmp_ps_mask(lack, least, _CMP_NLT_UQ), lack, power);
    const __mmask16 above = _mm512_cmp_ps_mask(_mm512_sub_ps(high, down), _mm512_add_ps(low, up), _CMP_LT_OQ);
    first = _mm512_mask_mov_ps(one, plain, _mm512_mask_mov_ps(low, above, high));
    second = _mm512_mask_mov_ps(one, plain, _mm512_mask_xor_ps(up, above, down, _mm512_set1_ps(-0.0f)));
    const __m512 inverse =
        _mm512_maskz_div_ps(plain & static_cast<__mmask16>(~immense), one, _mm512_add_ps(first, second));
    first = _mm512_mask_mov_ps(first, immense, _mm512_set1_ps(-infinity));
    second = _mm512_mask_mov_ps(second, immense, _mm512_set1_ps(infinity));
    return inverse;
  }

  // The largest magnitude of each of four blocks. Magnitudes are ordered like their bits, with NaN above
  // all numbers.
  static __m128 largest_of_four(const float *const *x) {
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
    __m512 most[4];
    for (int i = 0; i < 4; i++) {
      const __m512i low = _mm512_loadu_si512(x[i]), high = _mm512_loadu_si512(x[i] + 16);
      most[i] = larger(_mm512_castsi512_ps(_mm512_and_si512(low, magnitude)),
                       _mm512_castsi512_ps(_mm512_and_si512(high, magnitude)));
    }
    const __m512 a = larger(_mm512_unpacklo_ps(most[0], most[1]), _mm512_unpackhi_ps(most[0], most[1]));
    const __m512 b = larger(_mm512_unpacklo_ps(most[2], most[3]), _mm512_unpackhi_ps(most[2], most[3]));
    const __m512i all = _mm512_castps_si512(
        larger(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee)));  // lane i % 4: block i
    const __m256i half = _mm256_max_epi32(_mm512_castsi512_si256(all), _mm512_extracti32x8_epi32(all, 1));
    return _mm_castsi128_ps(_mm_max_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1)));
  }
  static __m512 larger(__m512 a, __m512 b) {
    return _mm512_castsi512_ps(_mm512_max_epi32(_mm512_castps_si512(a), _mm512_castps_si512(b)));
  }

  template <int Parts, bool Powers>
  static void quantize_pair(const float *const *x, const float *inverses, const float *powers,
                            QuantBlock<Parts> *const *blocks) {
    __m512i values[4];
    for (int i = 0; i < 4; i++) {
      const __m512 value = _mm512_loadu_ps(x[i / 2] + i % 2 * 16);
      values[i] = _mm512_cvtps_epi32(_mm512_mul_ps(value, _mm512_set1_ps(inverses[i / 2])));
    }
    __m128i counts = _mm_setzero_si128();
    if constexpr (Parts == 2) {
      __m512i first[4];
      for (int i = 0; i < 4; i++) {
        first[i] = _mm512_srai_epi32(_mm512_add_epi32(values[i], _mm512_set1_epi32(64)), 7);
        values[i] = _mm512_sub_epi32(values[i], _mm512_slli_epi32(first[i], 7));
      }
      counts = _mm_slli_epi32(store_part(first, blocks[0]->parts[0], blocks[1]->parts[0]), 7);
    }
    counts = _mm_add_epi32(counts, store_part(values, blocks[0]->parts[Parts - 1], blocks[1]->parts[Parts - 1]));
    // Lanes 0 and 1 are the halves' counts of the first block, 2 and 3 those of the second.
    const __m128i totals = _mm_add_epi32(counts, _mm_shuffle_epi32(counts, 0xb1));
    const __m128i starts = _mm_mask_slli_epi32(counts, 0xa, _mm_sub_epi32(_mm_setzero_si128(), totals), 3);
    const __m128 pairs = _mm_load_ps(powers), scales = _mm_add_ps(pairs, _mm_shuffle_ps(pairs, pairs, 0xb1));
    const __m128 products = _mm_mul_ps(scales, _mm_cvtepi32_ps(totals));
    const __m128 terms = Powers ? pairs : _mm_blend_ps(scales, _mm_setzero_ps(), 0xa);
    static_assert(offsetof(QuantBlock<Parts>, sums) == Parts * 32 + 16,
                  "terms, first count and start follow the parts");
    store_rest(blocks[0], _mm_shuffle_ps(terms, _mm_castsi128_ps(starts), 0x44));
    store_rest(blocks[1], _mm_shuffle_ps(terms, _mm_castsi128_ps(starts), 0xee));
    if constexpr (!Powers) {
      _mm_store_ss(&blocks[0]->sum, products);
      _mm_store_ss(&blocks[1]->sum, _mm_movehl_ps(products, products));
      return;
    }
    const __m128i rounded = _mm_add_epi32(_mm_castps_si128(products), _mm_set1_epi32(0x8000));
    const __m128i high_halves = _mm_setr_epi8(2, 3, 10, 11, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
    const int32_t sums = _mm_cvtsi128_si32(_mm_shuffle_epi8(rounded, high_halves));
    __builtin_memcpy(blocks[0]->sums, &sums, 4);
  }
  template <int Parts>
  static void store_rest(QuantBlock<Parts> *block, __m128 rest) {
    _mm_storeu_ps(reinterpret_cast<float *>(block->parts[0] + Parts * 32), rest);
  }

  // Stores the values of two blocks, one byte each; returns the sum of each half.
  static __m128i store_part(const __m512i *values, int8_t *first, int8_t *second) {
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i words[2] = {_mm512_packs_epi32(values[0], values[1]), _mm512_packs_epi32(values[2], values[3])};
    const __m512i bytes = _mm512_permutexvar_epi32(order, _mm512_packs_epi16(words[0], words[1]));
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(first), _mm512_castsi512_si256(bytes));
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(second), _mm512_extracti64x4_epi64(bytes, 1));
    // 128 is added to each byte, so that none has a sign, then eight at a time are summed.
    const __m512i eights = _mm512_sad_epu8(_mm512_xor_si512(bytes, _mm512_set1_epi8(-128)), _mm512_setzero_si512());
    const __m512i halves = _mm512_add_epi32(eights, _mm512_bsrli_epi128(eights, 8));
    const __m512i every_fourth = _mm512_setr_epi32(0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12);
    const __m128i sums = _mm512_castsi512_si128(_mm512_permutexvar_epi32(every_fourth, halves));
    return _mm_sub_epi32(sums, _mm_set1_epi32(16 * 128));
  }
};

}  // namespace
}  // namespace mnemos
