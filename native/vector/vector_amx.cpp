// Attention with AMX tiles; the rest of this level is AVX-512's.
#include "vector/attention_tiles.h"
#include "vector/recall_tiles.h"

namespace mnemos {

void attend_in_tiles(const AttentionTile &tile, int64_t block_begin, int64_t block_end) {
  // A tile of values is of one page.
  if (tile.cell->type != CacheType::bfloat16 || tile.cell->slots % (2 * tile_pairs) != 0) {
    return attend_by_dots(tile, block_begin, block_end);
  }
  const uint32_t *queries = pair_queries(tile);
  AttentionShapes shapes((tile.cell->head_dim + 1) / 2 % tile_pairs);
  for_blocks(tile, block_begin, block_end, [&](const KeyBlock &block, const KeyBlock *next_block) {
    attend_block_in_tiles(tile, queries, block, next_block, shapes);
  });
}

void score_pages_in_tiles(const IndexLayout &layout, const PageIndices &pages, const IndexedQueries &queries,
                          float *scores) {
  constexpr int64_t most_groups = 64, few_rows = 8;
  const bool fits = layout.groups <= tile_groups || layout.groups % tile_groups == 0;
  if (queries.rows < few_rows || !fits || layout.groups * layout.runs > most_groups)
    return avx512_vector_kernels.score_pages(layout, pages, queries, scores);
  alignas(64) uint8_t keys[2 * most_groups * 64];
  const auto groups = static_cast<uint8_t>(layout.groups < tile_groups ? layout.groups : tile_groups);
  TileShapes shapes;
  const auto set = [&](int tile, uint8_t rows, uint16_t bytes) { shapes.rows[tile] = rows, shapes.row_bytes[tile] = bytes; };
  set(3, groups, 64), set(4, groups, 64);
  ConfiguredTiles tiles;
  // Rows begin to end, in tiles of `rows`.
  const auto score = [&](int64_t begin, int64_t end, int64_t rows) {
    if (begin == end) return;
    set(0, static_cast<uint8_t>(rows), 64), set(1, static_cast<uint8_t>(rows), 64);
    set(2, static_cast<uint8_t>(rows), static_cast<uint16_t>(groups * 4));
    tiles.configure(shapes);
    for (int64_t n = 0; n < pages.count; n++) {
      const uint8_t *index = pages.cells + pages.pages[n] * layout.bytes;
      for (int64_t run = 0; run < layout.runs; run++) {
        uint8_t *even = keys + run * 2 * layout.groups * 64;
        unpack_run(layout, index + run * layout.run_bytes, even, even + layout.groups * 64);
      }
      for (int64_t row = begin; row < end; row += rows)
        score_tile_rows(layout, index, keys, queries, row, rows, scores + n, pages.count);
    }
  };
  const int64_t whole = queries.rows / score_rows_tile * score_rows_tile;
  score(0, whole, score_rows_tile);
  score(whole, queries.rows, queries.rows - whole);
}

}  // namespace mnemos
