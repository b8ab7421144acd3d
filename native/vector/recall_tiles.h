// How well pages suit many queries, with AMX tiles of signed bytes: the numbers that recall_impl.h gives.
//
// Keys are the rows of the products and queries their columns, so that the best key of a run is a maximum of whole
// vectors.
#pragma once

#include "linear/amx_tiles.h"
#include "vector/recall_impl.h"

namespace mnemos {
namespace {

constexpr int64_t tile_groups = 16;  // of four components, in a tile

// 16 keys' components in four groups, with each key's after each other, in any order of the keys.
inline void keys_in_rows(const __m512i *groups, int64_t key_bytes, uint8_t *keys) {
  const __m512i ab[2] = {_mm512_unpacklo_epi32(groups[0], groups[1]), _mm512_unpackhi_epi32(groups[0], groups[1])};
  const __m512i cd[2] = {_mm512_unpacklo_epi32(groups[2], groups[3]), _mm512_unpackhi_epi32(groups[2], groups[3])};
  for (int i = 0; i < 2; i++) {
    const __m512i whole[2] = {_mm512_unpacklo_epi64(ab[i], cd[i]), _mm512_unpackhi_epi64(ab[i], cd[i])};
    for (int j = 0; j < 2; j++) {
      uint8_t *into = keys + (8 * i + 4 * j) * key_bytes;
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

// The keys of a run's halves in signed bytes.
inline void expand_in_rows(const IndexLayout &layout, const uint8_t *run, uint8_t *keys) {
  const int64_t key_bytes = layout.groups * 4;
  for (int64_t group = 0; group < layout.groups; group += 4) {
    __m512i both[2][4];
    keys_of_groups<index_offset>(layout, run, group, both);
    keys_in_rows(both[0], key_bytes, keys + group * 4);
    keys_in_rows(both[1], key_bytes, keys + index_half * key_bytes + group * 4);
  }
}

// Halves of runs whose keys are in rows, one after the other from a page's first on, and queries of one or two tiles.
struct TilesOfQueries {
  const IndexLayout &layout;
  const NamingQueries &queries;
  const uint8_t *keys;
  const float *scales;  // of the halves
  int64_t row, page, halves;  // the first query and the first page, and how many halves there are

  const uint8_t *columns(int64_t tile) const {
    return reinterpret_cast<const uint8_t *>(queries.columns) + (row + tile * query_columns) * layout.groups * 4;
  }
};

// Products of the keys of half `n` in tiles of sums from tile Sums on. Tiles 7 and 6, with one block of groups, have the
// queries.
template <int Tiles, int Sums, int Keys>
inline void multiply_half(const TilesOfQueries &own, int64_t n) {
  const int64_t key_bytes = own.layout.groups * 4;
  const uint8_t *keys = own.keys + n * index_half * key_bytes;
  AmxTiles::zero<Sums>();
  if constexpr (Tiles == 2) AmxTiles::zero<Sums + 1>();
  for (int64_t g = 0; g < own.layout.groups; g += tile_groups) {
    AmxTiles::load<Keys>(keys + g * 4, key_bytes);
    if (own.layout.groups > tile_groups) AmxTiles::load<7>(own.columns(0) + g * group_bytes, group_bytes);
    AmxTiles::dot<Sums, Keys, 7>();
    if constexpr (Tiles == 2) {
      if (own.layout.groups > tile_groups) AmxTiles::load<6>(own.columns(1) + g * group_bytes, group_bytes);
      AmxTiles::dot<Sums + 1, Keys, 6>();
    }
  }
}

inline __m512i largest_of_rows(const int32_t *sums) {
  __m512i most[4];
  for (int i = 0; i < 4; i++) most[i] = _mm512_load_si512(sums + 16 * i);
  for (int key = 4; key < index_half; key += 4) {
    for (int i = 0; i < 4; i++) most[i] = _mm512_max_epi32(most[i], _mm512_load_si512(sums + 16 * (key + i)));
  }
  return _mm512_max_epi32(_mm512_max_epi32(most[0], most[1]), _mm512_max_epi32(most[2], most[3]));
}

template <int N>
struct Number {
  static constexpr int value = N;
};

// Products go through four tiles of sums: while some are made, earlier ones are stored and still earlier ones reduced,
// as each of these takes a while to arrive. Keys are loaded once for two tiles of queries.
template <int Tiles>
inline void name_in_tiles(const TilesOfQueries &own) {
  constexpr int late = 4 / Tiles;
  alignas(64) int32_t sums[4][index_half * query_columns];
  if (own.layout.groups <= tile_groups) {
    AmxTiles::load<7>(own.columns(0), group_bytes);
    if constexpr (Tiles == 2) AmxTiles::load<6>(own.columns(1), group_bytes);
  }
  const Named &named = own.queries.named;
  Vec most[Tiles], best[Tiles];
  for (int t = 0; t < Tiles; t++) most[t] = load(named.most + own.row + t * query_columns);
  int64_t half = 0, page = own.page;  // of the products that come next
  const auto reduce = [&](int64_t n, const int32_t (*products)[index_half * query_columns]) {
    for (int t = 0; t < Tiles; t++) {
      const Vec score = mul(_mm512_cvtepi32_ps(largest_of_rows(products[t])), splat(own.scales[n]));
      best[t] = half == 0 ? score : max(score, best[t]);
    }
    if (++half < 2 * own.layout.runs) return;
    half = 0;
    const int64_t scored = page++;
    for (int t = 0; t < Tiles; t++) {
      const int64_t row = own.row + t * query_columns;
      most[t] = max(best[t], most[t]);
      unsigned better = bits(less(load(named.least + row), best[t]));
      if (better == 0 || !can_name(own.queries, scored)) continue;
      float scores[query_columns];
      store(scores, best[t]);
      for (; better; better &= better - 1) {
        const int r = __builtin_ctz(better);
        name_page(named, row + r, scores[r], scored);
      }
    }
  };
  const auto turn = [&](int64_t n, auto number) {
    constexpr int own_sums = decltype(number)::value * Tiles, stored = (own_sums + 2) % 4;
    if (n < own.halves) multiply_half<Tiles, 2 + own_sums, decltype(number)::value % 2>(own, n);
    if (n >= late / 2 && n - late / 2 < own.halves) {
      AmxTiles::store<2 + stored>(sums[stored], 64);
      if constexpr (Tiles == 2) AmxTiles::store<3 + stored>(sums[stored + 1], 64);
    }
    if (n >= late && n - late < own.halves) reduce(n - late, sums + own_sums);
  };
  for (int64_t n = 0; n < own.halves + late; n += late) {
    turn(n, Number<0>{}), turn(n + 1, Number<1>{});
    if constexpr (Tiles == 1) turn(n + 2, Number<2>{}), turn(n + 3, Number<3>{});
  }
  for (int t = 0; t < Tiles; t++) store(named.most + own.row + t * query_columns, most[t]);
}

}  // namespace
}  // namespace mnemos
