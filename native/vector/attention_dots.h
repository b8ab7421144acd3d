// Attention over a bfloat16 cache with the processor's bfloat16 dot products (VDPBF16PS): queries and weights are
// rounded to bfloat16 too, sums are float32. Keys and values are used as they are stored in the cache.
#pragma once

#include "vector/vector_kernels_impl.h"

namespace mnemos {
namespace {

constexpr int64_t block_vectors = attention_block / width;

inline bool has_dots(const CellLayout &cell) { return cell.type == CacheType::bfloat16 && cell.slots % width == 0; }

inline __m512bh as_brains(__m512i pairs) { return reinterpret_cast<__m512bh>(pairs); }

// 32 floats as 16 pairs.
inline __m512i to_pairs(Vec low, Vec high) { return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low)); }

// n floats as pairs, the last ones padded with zeros; y may be x.
inline void store_pairs(const float *x, int64_t n, uint32_t *y) {
  for (int64_t i = 0; i < n; i += 2 * width, y += width) {
    const Vec low = load_any(x + i, n - i < width ? static_cast<int>(n - i) : width);
    const int64_t rest = n - i - width;
    const Vec high = rest <= 0 ? zero() : load_any(x + i + width, rest < width ? static_cast<int>(rest) : width);
    _mm512_storeu_si512(y, to_pairs(low, high));
  }
}

// 2^x within 3e-6 of it: a weight is rounded to 8 bits anyway.
inline Vec rough_power(Vec x) {
  const Vec magic = splat(12582912.0f);  // 1.5 * 2^23: adding to it rounds to a whole number
  const Vec n = sub(add(x, magic), magic), r = sub(x, n);
  Vec p = splat(0.00957010f);  // own minimax fit for |r| <= 1/2
  p = fma(p, r, splat(0.05591786f));
  p = fma(p, r, splat(0.24024744f));
  p = fma(p, r, splat(0.69312179f));
  p = fma(p, r, splat(0.99999928f));
  return times_power_of_two(p, n);
}

// The lanes, of the vector that begins at `at`, that a row sees.
inline Mask lanes_seen(const Seen &seen, int64_t at) {
  const auto lanes_below = [&](int64_t end) {
    return static_cast<unsigned>((1u << (end <= at ? 0 : end - at < width ? end - at : width)) - 1);
  };
  return static_cast<Mask>(lanes_below(seen.last + 1) & ~lanes_below(seen.first));
}

// The sums of each of four vectors, in the first four lanes: the same additions in the same order for each.
template <typename Combine>
inline __m128 reduce_four(const Vec *x, const Combine &combine) {
  const Vec a = combine(_mm512_unpacklo_ps(x[0], x[1]), _mm512_unpackhi_ps(x[0], x[1]));
  const Vec b = combine(_mm512_unpacklo_ps(x[2], x[3]), _mm512_unpackhi_ps(x[2], x[3]));
  const Vec c = combine(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
  const Vec d = combine(c, _mm512_shuffle_f32x4(c, c, 0x4e));
  return _mm512_castps512_ps128(combine(d, _mm512_shuffle_f32x4(d, d, 0xb1)));
}

constexpr int64_t rows_together = 4;

// The largest scores of a run of rows, among those that each sees.
inline void find_maxima(const AttentionTile &tile, const BlockRange &range, int64_t row_begin, int64_t row_end,
                        float *most) {
  const int64_t used = range.last - range.start + 1;
  const Vec hidden = splat(-INFINITY);
  for (int64_t row = row_begin; row < row_end; row += rows_together) {
    Vec maxima[rows_together] = {hidden, hidden, hidden, hidden};
    for (int64_t r = 0; r < rows_together && row + r < row_end; r++) {
      float *scores = tile.scores + (row + r) * score_stride;
      if (tile.softcap > 0) softcap(scores, tile.softcap, scores, (used + width - 1) / width * width);
      const Seen seen(tile, range, row + r);
      if (seen.all()) {
        Vec x[block_vectors];
        for (int64_t v = 0; v < block_vectors; v++) x[v] = load(scores + v * width);
        for (int64_t half = block_vectors / 2; half > 0; half /= 2) {
          for (int64_t v = 0; v < half; v++) x[v] = max(x[v + half], x[v]);
        }
        maxima[r] = x[0];
        continue;
      }
      for (int64_t at = 0; at < used; at += width) {
        maxima[r] = max(_mm512_mask_loadu_ps(hidden, lanes_seen(seen, at), scores + at), maxima[r]);
      }
    }
    _mm_storeu_ps(most + row, reduce_four(maxima, [](Vec a, Vec b) { return max(a, b); }));
  }
}

// Turns scores into weights, exponentials relative to the row's maximum, as pairs in the same place: all that a row
// does not see becomes 0. Their sums go to `total`.
inline void make_weights(const AttentionTile &tile, const BlockRange &range, int64_t row_begin, int64_t row_end,
                         const float *most, float *total) {
  const int64_t used = range.last - range.start + 1;
  const Vec factor = splat(1.44269504f);
  for (int64_t row = row_begin; row < row_end; row += rows_together) {
    Vec sums[rows_together] = {};
    for (int64_t r = 0; r < rows_together && row + r < row_end; r++) {
      float *scores = tile.scores + (row + r) * score_stride;
      auto *pairs = reinterpret_cast<uint32_t *>(scores);
      const Seen seen(tile, range, row + r);
      const Vec shift = splat(most[row + r]);
      const auto weight = [&](int64_t at) { return rough_power(mul(sub(load(scores + at), shift), factor)); };
      Vec even = zero(), odd = zero();
      const auto put = [&](int64_t at, Vec low, Vec high) {
        even = add(even, low), odd = add(odd, high);
        _mm512_storeu_si512(pairs + at / 2, to_pairs(low, high));
      };
      if (seen.all()) {
        for (int64_t at = 0; at < attention_block; at += 2 * width) put(at, weight(at), weight(at + width));
      } else {
        for (int64_t at = 0; at < used; at += 2 * width) {
          put(at, _mm512_maskz_mov_ps(lanes_seen(seen, at), weight(at)),
              _mm512_maskz_mov_ps(lanes_seen(seen, at + width), weight(at + width)));
        }
      }
      sums[r] = add(even, odd);
    }
    _mm_storeu_ps(total + row, reduce_four(sums, [](Vec a, Vec b) { return add(a, b); }));
  }
}

// Pieces of memory that will be needed soon, prefetched a few lines at a time. Past the end of a piece that is no
// multiple of these lines, what follows it is prefetched too.
struct Ahead {
  const uint8_t *parts[block_vectors];
  int64_t count = 0, bytes = 0, step = 0;  // of parts, of each part, for each call
  int64_t part = 0, at = 0;

  // Spreads the lines over this many calls.
  void spread(int64_t calls) {
    const int64_t lines = calls <= 0 ? 0 : (count * bytes / line + calls - 1) / calls;
    step = (lines + together - 1) / together * together * line;
  }
  void advance() {
    if (part >= count || step == 0) return;
    const uint8_t *data = parts[part] + at;
    for (int64_t i = 0; i < step; i += together * line) {
      for (int64_t j = 0; j < together; j++) prefetch(data + i + j * line);
    }
    at += step;
    if (at >= bytes) at = 0, part++;
  }
  static constexpr int64_t line = 64, together = 4;
};

// sums[r][j] += a[r] b[j] for a pair of each of R rows, in `factors`, and N vectors of columns.
template <int R, int N>
inline void add_dots(const uint32_t *factors, int64_t stride, const __m512i (&columns)[N], Vec (&sums)[R][N]) {
  for (int r = 0; r < R; r++) {
    const __m512bh factor = as_brains(_mm512_set1_epi32(static_cast<int>(factors[r * stride])));
    for (int j = 0; j < N; j++) sums[r][j] = _mm512_dpbf16_ps(sums[r][j], as_brains(columns[j]), factor);
  }
}

// Vectors of columns that R rows take at once: enough sums to hide the latency of a dot product, few enough for the
// registers.
template <int R>
constexpr int most_columns = R <= 2 ? 8 : 4;

// Scores of R rows against N vectors of keys. `stride` is that of the queries, in pairs.
template <int R, int N>
inline void score_columns(const uint32_t *queries, int64_t stride, const uint32_t *const *keys, int64_t key_stride,
                          int64_t pairs, float *scores, Ahead &ahead) {
  Vec sums[R][N];
  for (int r = 0; r < R; r++) {
    for (int j = 0; j < N; j++) sums[r][j] = zero();
  }
  const uint32_t *key[N];
  for (int j = 0; j < N; j++) key[j] = keys[j];
  for (int64_t i = 0; i < pairs; i++) {
    ahead.advance();
    __m512i columns[N];
    for (int j = 0; j < N; j++) columns[j] = _mm512_loadu_si512(key[j] + i * key_stride);
    add_dots<R, N>(queries + i, stride, columns, sums);
  }
#pragma GCC unroll 8  // or the sums are kept in memory
  for (int r = 0; r < R; r++) {
    for (int j = 0; j < N; j++) store(scores + r * score_stride + j * width, sums[r][j]);
  }
}

// Scores of R rows against the keys that they see.
template <int R>
inline void score_rows(const AttentionTile &tile, const BlockRange &range, const uint32_t *queries, int64_t row,
                       const uint32_t *const *keys, Ahead &ahead) {
  const CellLayout &cell = *tile.cell;
  const int64_t stride = cell.value_stride / 2, pairs = (cell.head_dim + 1) / 2;
  const int64_t first = (range.first - range.start) / width, end = (range.last - range.start) / width + 1;
  for (int64_t v = first; v < end; v += most_columns<R>) {
    with_count<most_columns<R>>(
        end - v < most_columns<R> ? end - v : most_columns<R>, [=, &tile, &ahead, &cell](auto count) {
          score_columns<R, decltype(count)::value>(queries + row * stride, stride, keys + v, cell.key_stride, pairs,
                                                   tile.scores + row * score_stride + v * width, ahead);
        });
  }
}

// How the rows' results so far and those of a block are combined, by rows; see merge.
struct Shares {
  float before[max_tile_rows], block[max_tile_rows];
  bool seen[max_tile_rows], begun[max_tile_rows];

  // Brings the tile's maxima and totals up to date.
  Shares(const AttentionTile &tile, const KeyBlock &block_of_keys, const float *block_most, const float *block_total) {
    for (int64_t r = 0; r < tile.rows; r += width) {
      const int count = tile.rows - r < width ? static_cast<int>(tile.rows - r) : width;
      const Vec old_most = load_part(tile.most + r, count), new_most = load_part(block_most + r, count);
      const Vec maximum = max(new_most, old_most);
      const Vec old_share = exp(sub(old_most, maximum)), new_share = exp(sub(new_most, maximum));
      float totals[width], mosts[width];
      store_part(before + r, old_share, count), store_part(block + r, new_share, count), store(mosts, maximum);
      store(totals,
            add(mul(load_part(tile.total + r, count), old_share), mul(load_part(block_total + r, count), new_share)));
      for (int64_t i = r; i < r + count; i++) {
        seen[i] = sees(tile, i, block_of_keys);
        begun[i] = tile.most[i] != -INFINITY;
        if (!seen[i]) continue;
        tile.most[i] = begun[i] ? mosts[i - r] : block_most[i];
        tile.total[i] = begun[i] ? totals[i - r] : block_total[i];
      }
    }
  }
};

// Adds N vectors of columns of the values that R rows see, times the rows' weights, to the rows' results. Of an odd
// number of values, the memory after the last one may never have been written.
template <int R, int N>
inline void weigh_columns(const uint32_t *weights, const uint32_t *const *values, int64_t column, Summed seen,
                          const Shares &shares, int64_t row, float *result, int64_t stride, Ahead &ahead) {
  Vec sums[R][N];
  for (int r = 0; r < R; r++) {
    for (int j = 0; j < N; j++) sums[r][j] = zero();
  }
  __m512i columns[N];
  for (int64_t i = seen.begin / 2; i < seen.end / 2; i++) {
    ahead.advance();
    const uint32_t *value = values[i] + column;
    for (int j = 0; j < N; j++) columns[j] = _mm512_loadu_si512(value + j * width);
    add_dots<R, N>(weights + i, score_stride, columns, sums);
  }
  if (seen.end % 2 != 0) {
    const uint32_t *value = values[seen.end / 2] + column;
    for (int j = 0; j < N; j++) columns[j] = _mm512_maskz_loadu_epi16(0x55555555, value + j * width);
    add_dots<R, N>(weights + seen.end / 2, score_stride, columns, sums);
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) {
    if (!shares.seen[row + r]) continue;
    const Vec before = splat(shares.before[row + r]), block = splat(shares.block[row + r]);
    const bool begun = shares.begun[row + r];
    float *into = result + r * stride;
#pragma GCC unroll 8
    for (int j = 0; j < N; j++) {
      store(into + j * width, begun ? add(mul(load(into + j * width), before), mul(sums[r][j], block)) : sums[r][j]);
    }
  }
}

// The same for all columns; the weights are pairs where the scores were.
template <int R>
inline void weigh_rows(const AttentionTile &tile, const BlockRange &range, int64_t row, const uint32_t *const *values,
                       const Shares &shares, Ahead &ahead) {
  const int64_t stride = tile.cell->value_stride;
  const auto *weights = reinterpret_cast<const uint32_t *>(tile.scores + row * score_stride);
  const Summed seen{range.first - range.start, range.last - range.start + 1};
  for (int64_t column = 0; column < stride; column += most_columns<R> * width) {
    const int64_t left = (stride - column) / width;
    with_count<most_columns<R>>(
        left < most_columns<R> ? left : most_columns<R>, [=, &tile, &shares, &ahead](auto count) {
          weigh_columns<R, decltype(count)::value>(weights, values, column, seen, shares, row,
                                                   tile.result + row * stride + column, stride, ahead);
        });
  }
}

// The values of a block's pages.
inline Ahead values_ahead(const AttentionTile &tile, const BlockRange &range) {
  Ahead ahead;
  if (tile.rows > most_rows_to_fetch_for) return ahead;
  ahead.bytes = tile.cell->slots * tile.cell->value_stride * BrainElement::bytes;
  for_each_page<BrainElement>(
      tile, range, [&](int64_t, const uint8_t *data) { ahead.parts[ahead.count++] = data + tile.cell->value_offset; });
  return ahead;
}

// The keys that are needed once the values of the block are done.
inline Ahead next_keys(const AttentionTile &tile, const KeyBlock &block, const KeyBlock *next_block) {
  Ahead ahead;
  if (tile.rows > most_rows_to_fetch_for) return ahead;
  ahead.bytes = tile.cell->value_offset;
  for (int64_t at = 0; at < attention_block; at += tile.cell->slots) {
    const uint8_t *keys = keys_ahead(tile, block.start + at, next_block);
    if (keys != nullptr) ahead.parts[ahead.count++] = keys;
  }
  return ahead;
}

// The keys and values of the block after this one, or else of what the next tile begins with.
inline Ahead next_cells(const AttentionTile &tile, const KeyBlock &block, const KeyBlock *next_block) {
  Ahead ahead = next_keys(tile, block, next_block);
  ahead.bytes = tile.cell->key_scale_offset;
  return ahead;
}

// The addresses of a block's keys, for each vector of slots, and of its values, for each pair of slots.
inline void point_to_pages(const AttentionTile &tile, const BlockRange &range, const uint32_t **keys,
                           const uint32_t **rows_of_values) {
  const CellLayout &cell = *tile.cell;
  for_each_page<BrainElement>(tile, range, [&](int64_t position, const uint8_t *data) {
    for (int64_t slot = 0; slot < cell.slots; slot += width) {
      keys[(position - range.start + slot) / width] = reinterpret_cast<const uint32_t *>(data) + slot;
    }
    const auto *values = reinterpret_cast<const uint32_t *>(data + cell.value_offset);
    for (int64_t slot = 0; slot < cell.slots; slot += 2) {
      rows_of_values[(position - range.start + slot) / 2] = values + slot / 2 * cell.value_stride;
    }
  });
}

// A tile's queries as pairs, half a value_stride apart.
inline const uint32_t *pair_queries(const AttentionTile &tile) {
  auto *queries = reinterpret_cast<uint32_t *>(tile.expanded);
  const int64_t stride = tile.cell->value_stride;
  for (int64_t r = 0; r < tile.rows; r++)
    store_pairs(tile.queries + r * stride, tile.cell->head_dim, queries + r * stride / 2);
  return queries;
}

inline void attend_block_by_dots(const AttentionTile &tile, const uint32_t *queries, const KeyBlock &block,
                                 const KeyBlock *next_block) {
  const BlockRange all = visible(tile, block, 0, tile.rows);
  if (all.last < 0) return;
  const uint32_t *keys[block_vectors], *rows_of_values[attention_block / 2];
  point_to_pages(tile, all, keys, rows_of_values);
  const int64_t groups = (tile.rows + group_rows - 1) / group_rows;
  Ahead values = values_ahead(tile, all), next = next_keys(tile, block, next_block);
  values.spread(groups * (tile.cell->head_dim / 2));
  next.spread(groups * ((all.last - all.first) / 2 + 1));
  float most[max_tile_rows + rows_together], total[max_tile_rows + rows_together];
  for_groups(tile, block, [&](auto rows, int64_t r, const BlockRange &range) {
    score_rows<decltype(rows)::value>(tile, range, queries, r, keys, values);
    find_maxima(tile, range, r, r + decltype(rows)::value, most);
  });
  for_groups(tile, block, [&](auto rows, int64_t r, const BlockRange &range) {
    make_weights(tile, range, r, r + decltype(rows)::value, most, total);
  });
  const Shares shares(tile, block, most, total);
  for_groups(tile, block, [&](auto rows, int64_t r, const BlockRange &range) {
    weigh_rows<decltype(rows)::value>(tile, range, r, rows_of_values, shares, next);
  });
}

}  // namespace
}  // namespace mnemos
