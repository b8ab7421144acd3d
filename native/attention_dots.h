// Attention over a bfloat16 cache with the processor's bfloat16 dot products (VDPBF16PS): queries and weights are rounded
// to bfloat16 too, sums are float32. Keys and values are used as they lie in the cache.
#pragma once

#include "attention_impl.h"

namespace mnemos {
namespace {

constexpr int64_t block_vectors = attention_block / width;

inline bool has_dots(const CellLayout &cell) { return cell.type == CacheType::bfloat16 && cell.slots % width == 0; }

inline __m512bh as_brains(__m512i pairs) { return reinterpret_cast<__m512bh>(pairs); }

// 32 floats as 16 pairs.
inline __m512i to_pairs(Vec low, Vec high) { return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low)); }

// n floats as pairs, the last ones filled up with zeros; y may be x.
inline void store_pairs(const float *x, int64_t n, uint32_t *y) {
  for (int64_t i = 0; i < n; i += 2 * width, y += width) {
    const Vec low = load_any(x + i, n - i < width ? static_cast<int>(n - i) : width);
    const int64_t rest = n - i - width;
    const Vec high = rest <= 0 ? zero() : load_any(x + i + width, rest < width ? static_cast<int>(rest) : width);
    _mm512_storeu_si512(y, to_pairs(low, high));
  }
}

// Lines of memory that will be wanted soon, asked for a few at a time.
struct Ahead {
  const uint8_t *parts[block_vectors];
  int64_t count = 0, bytes = 0, step = 0;  // of parts, of each part, for each call
  int64_t part = 0, at = 0;

  // Spreads the lines over so many calls.
  void spread(int64_t calls) { step = calls <= 0 ? 0 : (count * bytes / line + calls - 1) / calls; }
  void advance() {
    for (int64_t i = 0; i < step && part < count; i++) {
      prefetch(parts[part] + at);
      at += line;
      if (at >= bytes) at = 0, part++;
    }
  }
  static constexpr int64_t line = 64;
};

// sums[r][j] += sum over pairs of a[r][i] b[j][i], for R rows and N vectors of columns: one pair after the other, whatever R and N are.
// Where `low` is set, only the pairs' first halves count.
template <int R, int N>
inline void add_dots(const uint32_t *a, int64_t a_stride, const uint32_t *const *b, int64_t b_stride, Summed pairs, bool low,
                     Vec (&sums)[R][N], Ahead &ahead) {
  const __m512i kept = _mm512_set1_epi32(low ? 0xffff : -1);
  for (int64_t i = pairs.begin; i < pairs.end; i++) {
    ahead.advance();
    __m512i row[N];
    for (int j = 0; j < N; j++) {
      row[j] = _mm512_loadu_si512(b[j] + i * b_stride);
      if (low) row[j] = _mm512_and_si512(row[j], kept);
    }
    for (int r = 0; r < R; r++) {
      const __m512bh factor = as_brains(_mm512_set1_epi32(static_cast<int>(a[r * a_stride + i])));
      for (int j = 0; j < N; j++) sums[r][j] = _mm512_dpbf16_ps(sums[r][j], as_brains(row[j]), factor);
    }
  }
}

// Vectors of columns that R rows take at once: enough sums to hide the latency of a dot product, few enough for the registers.
template <int R>
constexpr int most_columns = R <= 3 ? 8 : 4;

// Scores of R rows against the keys that they see.
template <int R>
inline void score_rows(const AttentionTile &tile, const BlockRange &range, const uint32_t *queries, int64_t row,
                       const uint32_t *const *keys, Ahead &ahead) {
  const CellLayout &cell = *tile.cell;
  const int64_t first = (range.first - range.start) / width, end = (range.last - range.start) / width + 1;
  for (int64_t v = first; v < end; v += most_columns<R>) {
    with_count<most_columns<R>>(end - v < most_columns<R> ? end - v : most_columns<R>, [&](auto count) {
      constexpr int N = decltype(count)::value;
      Vec sums[R][N] = {};
      add_dots<R, N>(queries + row * cell.value_stride / 2, cell.value_stride / 2, keys + v, cell.key_stride,
                     {0, (cell.head_dim + 1) / 2}, false, sums, ahead);
      for (int r = 0; r < R; r++) {
        for (int j = 0; j < N; j++) store(tile.scores + (row + r) * score_stride + (v + j) * width, sums[r][j]);
      }
    });
  }
}

// Weighted sums of the values that R rows see; the weights are pairs where the scores were.
template <int R>
inline void weigh_rows(const AttentionTile &tile, const BlockRange &range, int64_t row, Ahead &ahead) {
  const CellLayout &cell = *tile.cell;
  const auto *weights = reinterpret_cast<const uint32_t *>(tile.scores + row * score_stride);
  for (int64_t j = 0; j < cell.value_stride; j += most_columns<R> * width) {
    const int64_t left = (cell.value_stride - j) / width;
    with_count<most_columns<R>>(left < most_columns<R> ? left : most_columns<R>, [&](auto count) {
      constexpr int N = decltype(count)::value;
      Vec sums[R][N] = {};
      for_each_page<BrainElement>(tile, range, [&](int64_t position, const uint8_t *data) {
        const auto *values = reinterpret_cast<const uint32_t *>(data + cell.value_offset) + j;
        const uint32_t *columns[N];
        for (int k = 0; k < N; k++) columns[k] = values + k * width;
        const int64_t begin = range.first > position ? (range.first - position) / 2 : 0;
        const int64_t seen = range.last - position + 1 < cell.slots ? range.last - position + 1 : cell.slots;
        const uint32_t *pairs = weights + (position - range.start) / 2;
        add_dots<R, N>(pairs, score_stride, columns, cell.value_stride, {begin, seen / 2}, false, sums, ahead);
        // What lies behind the last value may never have been written.
        if (seen % 2 != 0) add_dots<R, N>(pairs, score_stride, columns, cell.value_stride, {seen / 2, seen / 2 + 1}, true, sums, ahead);
      });
      for (int r = 0; r < R; r++) {
        for (int k = 0; k < N; k++) store(tile.partial + (row + r) * cell.value_stride + j + k * width, sums[r][k]);
      }
    });
  }
}

// The values of a block's pages.
inline Ahead values_ahead(const AttentionTile &tile, const BlockRange &range) {
  Ahead ahead;
  if (tile.rows > most_rows_to_fetch_for) return ahead;
  ahead.bytes = tile.cell->slots * tile.cell->value_stride * BrainElement::bytes;
  for_each_page<BrainElement>(tile, range, [&](int64_t, const uint8_t *data) {
    ahead.parts[ahead.count++] = data + tile.cell->value_offset;
  });
  return ahead;
}

// The keys that are wanted when these values are done with: the next block's or the next cell's.
inline Ahead next_keys(const AttentionTile &tile, const BlockRange &range, bool next_block) {
  Ahead ahead;
  if (tile.rows > most_rows_to_fetch_for) return ahead;
  ahead.bytes = tile.cell->value_offset;
  for_each_page<BrainElement>(tile, range, [&](int64_t position, const uint8_t *data) {
    const uint8_t *keys = next_block ? keys_ahead(tile, position, data, true) : tile.next_cell != 0 ? data + tile.next_cell : nullptr;
    if (keys != nullptr) ahead.parts[ahead.count++] = keys;
  });
  return ahead;
}

inline void attend_block_by_dots(const AttentionTile &tile, const uint32_t *queries, int64_t block, bool next_block) {
  const BlockRange all = visible(tile, block, 0, tile.rows);
  if (all.last < 0) return;
  const CellLayout &cell = *tile.cell;
  const uint32_t *keys[block_vectors] = {};
  for_each_page<BrainElement>(tile, all, [&](int64_t position, const uint8_t *data) {
    for (int64_t slot = 0; slot < cell.slots; slot += width) {
      keys[(position - all.start + slot) / width] = reinterpret_cast<const uint32_t *>(data) + slot;
    }
  });
  float most[max_tile_rows], total[max_tile_rows];
  const int64_t groups = (tile.rows + group_rows - 1) / group_rows;
  Ahead values = values_ahead(tile, all), next = next_keys(tile, all, next_block);
  values.spread(groups * (cell.head_dim / 2));
  next.spread(groups * ((all.last - all.first) / 2 + 1));
  for_groups(tile, block, [&](auto rows, int64_t r, const BlockRange &range) {
    constexpr int R = decltype(rows)::value;
    score_rows<R>(tile, range, queries, r, keys, values);
    const int64_t used = range.last - range.start + 1;
    for (int64_t i = r; i < r + R; i++) {
      float *row = tile.scores + i * score_stride;
      exponentials(row, tile.first[i] - range.start, tile.last[i] - range.start, used, tile.softcap, &most[i], &total[i]);
      store_pairs(row, used, reinterpret_cast<uint32_t *>(row));
    }
    weigh_rows<R>(tile, range, r, next);
  });
  merge_rows(tile, all, most, total);
}

void attend_by_dots(const AttentionTile &tile, int64_t block_begin, int64_t block_end) {
  if (!has_dots(*tile.cell)) return attend(tile, block_begin, block_end);
  auto *queries = reinterpret_cast<uint32_t *>(tile.expanded);
  const int64_t stride = tile.cell->value_stride;
  for (int64_t r = 0; r < tile.rows; r++) store_pairs(tile.queries + r * stride, tile.cell->head_dim, queries + r * stride / 2);
  for (int64_t block = block_begin; block < block_end; block++) {
    attend_block_by_dots(tile, queries, block, block + 1 < block_end);
  }
}

}  // namespace
}  // namespace mnemos
