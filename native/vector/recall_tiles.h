// How well pages suit many rows, with AMX tiles of signed bytes: the numbers that recall_impl.h gives.
#pragma once

#include "linear/amx_tiles.h"
#include "vector/attention_dots.h"

namespace mnemos {
namespace {

constexpr int64_t score_rows_tile = 16, tile_groups = 16;  // rows, and groups of four components, of a tile

// The codes of a run's keys less index_offset: bytes of `groups` times 64, of even keys and of odd ones.
inline void unpack_run(const IndexLayout &layout, const uint8_t *index, uint8_t *even, uint8_t *odd) {
  const __m512i low = _mm512_set1_epi8(15), offset = _mm512_set1_epi8(index_offset);
  for (int64_t g = 0; g < layout.groups; g++) {
    const __m512i pairs = _mm512_loadu_si512(index + g * 64);
    _mm512_store_si512(even + g * 64, _mm512_sub_epi8(_mm512_and_si512(pairs, low), offset));
    _mm512_store_si512(odd + g * 64,
                       _mm512_sub_epi8(_mm512_and_si512(_mm512_srli_epi16(pairs, 4), low), offset));
  }
}

inline Vec scales_of(const IndexLayout &layout, const uint8_t *index, int64_t half) {
  const auto *words = reinterpret_cast<const __m256i *>(index + layout.groups * 64 + half * index_run);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(words)), 16));
}

// Scores of 16 rows, or the last ones, against one page: the largest of each goes to scores[r * stride].
inline void score_tile_rows(const IndexLayout &layout, const uint8_t *index, const uint8_t *keys,
                            const IndexedQueries &queries, int64_t row, int64_t rows, float *scores, int64_t stride) {
  alignas(64) int32_t sums[2][score_rows_tile * width];
  Vec best[score_rows_tile];
  for (int64_t r = 0; r < score_rows_tile; r++) best[r] = splat(-INFINITY);
  const int64_t row_bytes = layout.groups * 4;
  for (int64_t run = 0; run < layout.runs; run++) {
    const uint8_t *even = keys + run * 2 * layout.groups * 64, *odd = even + layout.groups * 64;
    AmxTiles::zero<0>(), AmxTiles::zero<1>();
    for (int64_t g = 0; g < layout.groups; g += tile_groups) {
      AmxTiles::load<2>(queries.codes + row * row_bytes + g * 4, row_bytes);
      AmxTiles::load<3>(even + g * 64, 64), AmxTiles::load<4>(odd + g * 64, 64);
      AmxTiles::dot<0, 2, 3>(), AmxTiles::dot<1, 2, 4>();
    }
    AmxTiles::store<0>(sums[0], width * 4), AmxTiles::store<1>(sums[1], width * 4);
    const uint8_t *own = index + run * layout.run_bytes;
    const Vec even_scales = scales_of(layout, own, 0), odd_scales = scales_of(layout, own, 1);
    for (int64_t r = 0; r < rows; r++) {
      const Vec a = mul(_mm512_cvtepi32_ps(_mm512_load_si512(sums[0] + r * width)), even_scales);
      const Vec b = mul(_mm512_cvtepi32_ps(_mm512_load_si512(sums[1] + r * width)), odd_scales);
      best[r] = max(max(a, b), best[r]);
    }
  }
  float largest[score_rows_tile];
  for (int64_t r = 0; r < score_rows_tile; r += 4)
    _mm_storeu_ps(largest + r, reduce_four(best + r, [](Vec a, Vec b) { return max(a, b); }));
  for (int64_t r = 0; r < rows; r++) scores[(row + r) * stride] = largest[r];
}

}  // namespace
}  // namespace mnemos
