// How well pages suit many rows, with AMX tiles of signed bytes: the numbers that recall_impl.h gives.
//
// Keys are the rows of the products and queries their columns, so that the best key of a page is a maximum of whole
// vectors.
#pragma once

#include "linear/amx_tiles.h"
#include "vector/recall_impl.h"

namespace mnemos {
namespace {

constexpr int64_t tile_queries = 16, tile_groups = 16;  // columns, and groups of four components, of a tile

// Queries as columns of tiles: 64 bytes for each group, with the four components of 16 queries; zero beyond the last.
inline void queries_in_columns(const IndexLayout &layout, const IndexedQueries &queries, uint8_t *columns) {
  for (int64_t first = 0; first < queries.rows; first += tile_queries) {
    std::memset(columns, 0, static_cast<size_t>(layout.groups * 64));
    for (int64_t r = 0; r < tile_queries && first + r < queries.rows; r++) {
      const int8_t *codes = queries.codes + (first + r) * layout.groups * 4;
      for (int64_t g = 0; g < layout.groups; g++) std::memcpy(columns + g * 64 + r * 4, codes + g * 4, 4);
    }
    columns += layout.groups * 64;
  }
}

// The keys of a run in signed bytes, each with its components after each other, in any order of the keys.
inline void keys_in_rows(const IndexLayout &layout, const uint8_t *run, uint8_t *keys) {
  const uint8_t *lows = run + layout.lows(), *steps = run + layout.steps();
  const int64_t key_bytes = layout.groups * 4;
  const __m512i offset = _mm512_set1_epi8(static_cast<char>(index_offset));
  for (int64_t g = 0; g < layout.groups; g += 4) {
    for (int half = 0; half < 2; half++) {
      const auto at = [&](int64_t group) {
        return keys_of_group(pairs_of(run, group), thirds_of(layout, run, group, half), half,
                             _mm512_sub_epi8(four_of(lows, group), offset), four_of(steps, group));
      };
      const __m512i a = at(g), b = at(g + 1), c = at(g + 2), d = at(g + 3);
      const __m512i ab[2] = {_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b)};
      const __m512i cd[2] = {_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d)};
      for (int i = 0; i < 2; i++) {
        const __m512i whole[2] = {_mm512_unpacklo_epi64(ab[i], cd[i]), _mm512_unpackhi_epi64(ab[i], cd[i])};
        for (int j = 0; j < 2; j++) {
          uint8_t *into = keys + (16 * half + 8 * i + 4 * j) * key_bytes + g * 4;
          const auto store_key = [&](int64_t key, __m128i x) {
            _mm_storeu_si128(reinterpret_cast<__m128i *>(into + key * key_bytes), x);
          };
          store_key(0, _mm512_castsi512_si128(whole[j]));
          store_key(1, _mm512_extracti32x4_epi32(whole[j], 1));
          store_key(2, _mm512_extracti32x4_epi32(whole[j], 2));
          store_key(3, _mm512_extracti32x4_epi32(whole[j], 3));
        }
      }
    }
  }
}

// sums (32, 16) = the products of a run's keys with 16 queries. Uses the tiles Sums, Sums + 1 and B, and with one block of
// groups the keys in tiles 0 and 1.
template <int Sums, int B>
inline void multiply_tile(const IndexLayout &layout, const uint8_t *keys, const uint8_t *columns, int32_t *sums) {
  const int64_t key_bytes = layout.groups * 4;
  AmxTiles::zero<Sums>(), AmxTiles::zero<Sums + 1>();
  for (int64_t g = 0; g < layout.groups; g += tile_groups) {
    if (layout.groups > tile_groups) {
      AmxTiles::load<0>(keys + g * 4, key_bytes), AmxTiles::load<1>(keys + 16 * key_bytes + g * 4, key_bytes);
    }
    AmxTiles::load<B>(columns + g * 64, 64);
    AmxTiles::dot<Sums, 0, B>(), AmxTiles::dot<Sums + 1, 1, B>();
  }
  AmxTiles::store<Sums>(sums, 64), AmxTiles::store<Sums + 1>(sums + 256, 64);
}

// best = the larger of it, but for the first run, and the scores of 16 queries in a run.
inline void reduce_tile(const int32_t *sums, Vec scale, bool first, float *best) {
  __m512i most[4];
  for (int i = 0; i < 4; i++) most[i] = _mm512_load_si512(sums + 16 * i);
  for (int key = 4; key < index_run; key += 4) {
    for (int i = 0; i < 4; i++) most[i] = _mm512_max_epi32(most[i], _mm512_load_si512(sums + 16 * (key + i)));
  }
  const __m512i all = _mm512_max_epi32(_mm512_max_epi32(most[0], most[1]), _mm512_max_epi32(most[2], most[3]));
  const Vec score = mul(_mm512_cvtepi32_ps(all), scale);
  store(best, first ? score : max(score, load(best)));
}

// y[c * stride + r] = x[16 r + c] for 16 or fewer columns and rows.
inline void transpose(const float *x, float *y, int64_t stride, int64_t columns, int64_t rows) {
  __m512i a[16], b[16];
  for (int r = 0; r < 16; r++) a[r] = _mm512_loadu_si512(x + 16 * r);
  for (int r = 0; r < 16; r += 2) {
    b[r] = _mm512_unpacklo_epi32(a[r], a[r + 1]);
    b[r + 1] = _mm512_unpackhi_epi32(a[r], a[r + 1]);
  }
  for (int r = 0; r < 16; r += 4) {
    for (int i = 0; i < 2; i++) {
      a[r + 2 * i] = _mm512_unpacklo_epi64(b[r + i], b[r + 2 + i]);
      a[r + 2 * i + 1] = _mm512_unpackhi_epi64(b[r + i], b[r + 2 + i]);
    }
  }
  for (int i = 0; i < 4; i++) {
    for (int half = 0; half < 2; half++) {
      b[8 * half + i] = _mm512_shuffle_i32x4(a[8 * half + i], a[8 * half + 4 + i], 0x88);
      b[8 * half + 4 + i] = _mm512_shuffle_i32x4(a[8 * half + i], a[8 * half + 4 + i], 0xdd);
    }
  }
  for (int i = 0; i < 8; i++) {
    a[i % 4 + i / 4 * 4] = _mm512_shuffle_i32x4(b[i], b[8 + i], 0x88);
    a[8 + i % 4 + i / 4 * 4] = _mm512_shuffle_i32x4(b[i], b[8 + i], 0xdd);
  }
  const auto written = static_cast<__mmask16>((1u << rows) - 1);
  for (int64_t c = 0; c < columns; c++) _mm512_mask_storeu_epi32(y + c * stride, written, a[c]);
}

}  // namespace
}  // namespace mnemos
