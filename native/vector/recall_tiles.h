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

// Halves of runs whose keys are in rows, one after the other from a page's first on, and 16 queries.
struct TileOfQueries {
  const IndexLayout &layout;
  const NamingQueries &queries;
  const uint8_t *keys;
  const float *scales;  // of the halves
  int64_t row, page, halves;  // the first query and the first page, and how many halves there are

  const uint8_t *columns() const {
    return reinterpret_cast<const uint8_t *>(queries.columns) + row * layout.groups * 4;
  }
};

// Products of the keys of half `n` in a tile of sums. Tile 7, with one block of groups, has the queries.
template <int Sums, int Keys>
inline void multiply_half(const TileOfQueries &tile, int64_t n) {
  const int64_t key_bytes = tile.layout.groups * 4;
  const uint8_t *keys = tile.keys + n * index_half * key_bytes;
  AmxTiles::zero<Sums>();
  for (int64_t g = 0; g < tile.layout.groups; g += tile_groups) {
    AmxTiles::load<Keys>(keys + g * 4, key_bytes);
    if (tile.layout.groups > tile_groups) AmxTiles::load<7>(tile.columns() + g * group_bytes, group_bytes);
    AmxTiles::dot<Sums, Keys, 7>();
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

// Products go through four tiles of sums: while one is made, an earlier one is stored and a still earlier one reduced,
// as each of these takes a while to arrive.
inline void name_in_tile(const TileOfQueries &tile) {
  constexpr int64_t late = 4;
  alignas(64) int32_t sums[late][index_half * query_columns];
  if (tile.layout.groups <= tile_groups) AmxTiles::load<7>(tile.columns(), group_bytes);
  const Named &named = tile.queries.named;
  Vec most = load(named.most + tile.row), best = most;
  int64_t half = 0, page = tile.page;  // of the products that come next
  const auto reduce = [&](int64_t n, const int32_t *products) {
    const Vec score = mul(_mm512_cvtepi32_ps(largest_of_rows(products)), splat(tile.scales[n]));
    best = half == 0 ? score : max(score, best);
    if (++half < 2 * tile.layout.runs) return;
    half = 0;
    most = max(best, most);
    const int64_t own = page++;
    if (!can_name(tile.queries, own)) return;
    unsigned better = bits(less(load(named.least + tile.row), best));
    if (better == 0) return;
    float scores[query_columns];
    store(scores, best);
    for (; better; better &= better - 1) {
      const int r = __builtin_ctz(better);
      name_page(named, tile.row + r, scores[r], own);
    }
  };
  const auto turn = [&](int64_t n, auto number) {
    constexpr int own = decltype(number)::value, stored = (own + 2) % 4;
    if (n < tile.halves) multiply_half<2 + own, own % 2>(tile, n);
    if (n >= 2 && n - 2 < tile.halves) AmxTiles::store<2 + stored>(sums[stored], 64);
    if (n >= late && n - late < tile.halves) reduce(n - late, sums[own]);
  };
  for (int64_t n = 0; n < tile.halves + late; n += 4) {
    turn(n, Number<0>{}), turn(n + 1, Number<1>{}), turn(n + 2, Number<2>{}), turn(n + 3, Number<3>{});
  }
  store(named.most + tile.row, most);
}

}  // namespace
}  // namespace mnemos
