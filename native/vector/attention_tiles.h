// Attention over a bfloat16 cache with AMX. The cache holds keys and values as second operands of tile products: 16
// pairs of key components by 16 slots, or 16 pairs of slots by 16 columns of values. Queries and weights are first
// operands, a tile for 16 rows.
//
// A tile product sums pairs of 32 components or slots from zero and then adds to the total, so few rows go through
// tiles as well: a row has the same bits alone and among many. What a row does not see has the weight 0.
//
// Cycles on Sapphire Rapids of 16 rows by a block of 128 keys with head_dim 64, from the figures in amx_float.h; not
// measured: 16 + 16 tile products 512, loads of 32 + 40 tiles in parallel, stores of 8 + 4 tiles 192, exponentials and
// maxima about 1,300; the dot products of AVX-512 alone take 8,192.
#pragma once

#include "linear/amx_tiles.h"
#include "vector/attention_dots.h"

namespace mnemos {
namespace {

constexpr int64_t tile_pairs = 16, tile_rows = 16;
constexpr int tile_columns = 4;  // vectors of columns at once: a product need not wait for the one before

// Tiles 0 to 3 are sums, 4 has keys or values, 5 the last pairs of keys; 6 queries or weights, 7 the last pairs of
// queries.
class AttentionShapes {
 public:
  // `rest`: pairs of key components that fill no tile.
  explicit AttentionShapes(int64_t rest) : rest_(rest) {}

  void set_rows(int64_t rows) {
    if (rows == rows_) return;
    rows_ = rows;
    TileShapes shapes;
    const auto set = [&](int tile, int64_t tile_rows, int64_t words) {
      if (words > 0)
        shapes.rows[tile] = static_cast<uint8_t>(tile_rows), shapes.row_bytes[tile] = static_cast<uint16_t>(words * 4);
    };
    for (int tile = 0; tile < tile_columns; tile++) set(tile, rows, width);
    set(4, tile_pairs, width);
    set(5, rest_, rest_ > 0 ? width : 0);
    set(6, rows, tile_pairs);
    set(7, rows, rest_);
    tiles_.configure(shapes);
  }

 private:
  const int64_t rest_;
  int64_t rows_ = 0;
  ConfiguredTiles tiles_;
};

// body(constant) for sums 0 to count - 1.
template <typename Body>
inline void for_sums(int64_t count, const Body &body) {
  const auto one = [&](auto sum) {
    if (decltype(sum)::value < count) body(sum);
  };
  one(std::integral_constant<int, 0>{}), one(std::integral_constant<int, 1>{});
  one(std::integral_constant<int, 2>{}), one(std::integral_constant<int, 3>{});
}

// The scores of a tile's rows, from `row` on, against all keys that some of them see.
inline void score_tile(const AttentionTile &tile, const BlockRange &range, const uint32_t *queries, int64_t row,
                       const uint32_t *const *keys, Ahead &ahead) {
  const CellLayout &cell = *tile.cell;
  const int64_t stride = cell.value_stride / 2, pairs = (cell.head_dim + 1) / 2;
  const int64_t first = (range.first - range.start) / width, end = (range.last - range.start) / width + 1;
  const uint32_t *own = queries + row * stride;
  for (int64_t v = first; v < end; v += tile_columns) {
    const int64_t count = end - v < tile_columns ? end - v : tile_columns;
    for_sums(count, [](auto sum) { AmxTiles::zero<sum>(); });
    int64_t i = 0;
    for (; i + tile_pairs <= pairs; i += tile_pairs) {
      AmxTiles::load<6>(own + i, stride * 4);
      for_sums(count, [&](auto sum) {
        ahead.advance();
        AmxTiles::load<4>(keys[v + sum] + i * cell.key_stride, cell.key_stride * 4);
        AmxTiles::dot_bfloats<sum, 6, 4>();
      });
    }
    if (i < pairs) {
      AmxTiles::load<7>(own + i, stride * 4);
      for_sums(count, [&](auto sum) {
        ahead.advance();
        AmxTiles::load<5>(keys[v + sum] + i * cell.key_stride, cell.key_stride * 4);
        AmxTiles::dot_bfloats<sum, 7, 5>();
      });
    }
    float *scores = tile.scores + row * score_stride + v * width;
    for_sums(count, [&](auto sum) { AmxTiles::store<sum>(scores + sum * width, score_stride * 4); });
  }
}

// `count` vectors of columns of the values that a tile's rows, from `row` on, see, times the rows' weights, to
// `partial`.
inline void weigh_tile(const AttentionTile &tile, const BlockRange &range, int64_t row, const uint32_t *const *values,
                       int64_t column, int64_t count, Ahead &ahead) {
  constexpr int64_t slots = 2 * tile_pairs, staged_stride = tile_columns * width;
  const int64_t stride = tile.cell->value_stride, end = range.last - range.start + 1;
  const float *weights = tile.scores + row * score_stride;  // now pairs of bfloat16
  alignas(64) uint32_t staged[tile_pairs * staged_stride];
  for_sums(count, [](auto sum) { AmxTiles::zero<sum>(); });
  for (int64_t slot = (range.first - range.start) / slots * slots; slot < end; slot += slots) {
    const uint32_t *from = values[slot / 2] + column;
    int64_t from_stride = stride;
    if (end - slot < slots) {
      // Memory after the last one may never have been written, or by another sequence, and may hold NaN.
      for (int64_t pair = 0; pair < tile_pairs; pair++) {
        const int64_t left = end - slot - 2 * pair;
        const __mmask32 seen = left >= 2 ? 0xffffffff : left == 1 ? 0x55555555 : 0;
        for (int64_t j = 0; j < count * width; j += width) {
          _mm512_storeu_si512(staged + pair * staged_stride + j,
                              _mm512_maskz_loadu_epi16(seen, from + pair * stride + j));
        }
      }
      from = staged, from_stride = staged_stride;
    }
    AmxTiles::load<6>(weights + slot / 2, score_stride * 4);
    for_sums(count, [&](auto sum) {
      ahead.advance();
      AmxTiles::load<4>(from + sum * width, from_stride * 4);
      AmxTiles::dot_bfloats<sum, 6, 4>();
    });
  }
  float *partial = tile.partial + row * stride + column;
  for_sums(count, [&](auto sum) { AmxTiles::store<sum>(partial + sum * width, stride * 4); });
}

// Merges a block's result for one row.
inline void merge_shares(const AttentionTile &tile, const Shares &shares, int64_t row) {
  if (!shares.seen[row]) return;
  const int64_t stride = tile.cell->value_stride;
  const Vec before = splat(shares.before[row]), block = splat(shares.block[row]);
  const float *partial = tile.partial + row * stride;
  float *into = tile.result + row * stride;
  for (int64_t j = 0; j < stride; j += width) {
    const Vec sum = load(partial + j);
    store(into + j, shares.begun[row] ? add(mul(load(into + j), before), mul(sum, block)) : sum);
  }
}

// Prefetches between two passes over the scores: memory should not stand still while they become weights.
constexpr int64_t fetches_between = 4;

// Calls visit(first row, rows, what they see) for the tiles of rows that see any of the block.
template <typename Visit>
inline void for_row_tiles(const AttentionTile &tile, const KeyBlock &block, AttentionShapes &shapes,
                          const Visit &visit) {
  for (int64_t row = 0; row < tile.rows; row += tile_rows) {
    const int64_t count = tile.rows - row < tile_rows ? tile.rows - row : tile_rows;
    const BlockRange range = visible(tile, block, row, row + count);
    if (range.last < 0) continue;
    shapes.set_rows(count);
    visit(row, count, range);
  }
}

inline void attend_block_in_tiles(const AttentionTile &tile, const uint32_t *queries, const KeyBlock &block,
                                  const KeyBlock *next_block, AttentionShapes &shapes) {
  const BlockRange all = visible(tile, block, 0, tile.rows);
  if (all.last < 0) return;
  const uint32_t *keys[block_vectors], *rows_of_values[attention_block / 2];
  point_to_pages(tile, all, keys, rows_of_values);
  const int64_t stride = tile.cell->value_stride, end = all.last - all.start;
  Ahead next = next_cells(tile, block, next_block);
  next.spread((end / width + 1) * ((tile.cell->head_dim + 2 * tile_pairs - 1) / (2 * tile_pairs)) +
              (end / (2 * tile_pairs) + 1) * (stride / width) + 3 * fetches_between);
  const auto fetch = [&next] {
    for (int64_t i = 0; i < fetches_between; i++) next.advance();
  };
  float most[max_tile_rows + rows_together], total[max_tile_rows + rows_together];
  for_row_tiles(tile, block, shapes, [&](int64_t row, int64_t rows, const BlockRange &range) {
    score_tile(tile, range, queries, row, keys, next);
    fetch();
    find_maxima(tile, range, row, row + rows, most);
    fetch();
    make_weights(tile, range, row, row + rows, most, total);
    fetch();
  });
  const Shares shares(tile, block, most, total);
  for_row_tiles(tile, block, shapes, [&](int64_t row, int64_t rows, const BlockRange &range) {
    for (int64_t column = 0; column < stride; column += tile_columns * width) {
      const int64_t left = (stride - column) / width;
      weigh_tile(tile, range, row, rows_of_values, column, left < tile_columns ? left : tile_columns, next);
    }
    for (int64_t r = row; r < row + rows; r++) merge_shares(tile, shares, r);
  });
}

}  // namespace
}  // namespace mnemos
