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

void name_pages_in_tiles(const IndexLayout &layout, const PageIndices &pages, const NamingQueries *sets,
                         int64_t count) {
  constexpr int64_t few_rows = 8, most_halves = 128;
  int64_t rows = 0;
  for (int64_t s = 0; s < count; s++) rows += sets[s].rows;
  const bool fits = layout.groups <= tile_groups || layout.groups % tile_groups == 0;
  if (rows < few_rows || !fits || 2 * layout.runs > most_halves)
    return avx512_vector_kernels.name_pages(layout, pages, sets, count);
  TileShapes shapes;
  for (int tile = 0; tile < 8; tile++) shapes.rows[tile] = 16, shapes.row_bytes[tile] = 64;
  const auto groups = static_cast<uint8_t>(layout.groups < tile_groups ? layout.groups : tile_groups);
  shapes.row_bytes[0] = shapes.row_bytes[1] = static_cast<uint16_t>(groups * 4);
  shapes.rows[6] = shapes.rows[7] = groups;
  ConfiguredTiles tiles;
  tiles.configure(shapes);
  // Pages whose keys are in rows at a time, for all queries.
  const int64_t halves = 2 * layout.runs, half_keys = layout.groups * group_bytes, page_keys = halves * half_keys;
  int64_t together = expanded_bytes(layout) / page_keys;
  together = together * halves <= most_halves ? together : most_halves / halves;
  float scales[most_halves];
  for (int64_t first = pages.first; first < pages.last; first += together) {
    const int64_t last = first + together < pages.last ? first + together : pages.last;
    for (int64_t page = first; page < last; page++) {
      const uint8_t *index = index_of(layout, pages, page);
      for (int64_t half = 0; half < halves; half += 2) {
        const uint8_t *run = index + half / 2 * layout.run_bytes;
        const int64_t n = (page - first) * halves + half;
        expand_in_rows(layout, run, pages.expanded + n * half_keys);
        scales[n] = scales[n + 1] = scale_of(layout, run);
      }
    }
    for (const NamingQueries *set = sets; set < sets + count; set++) {
      const int64_t end = set->pages < last ? set->pages : last;
      for (int64_t row = 0; first < end && row < set->rows;) {
        const TilesOfQueries own{layout, *set, pages.expanded, scales, row, first, (end - first) * halves};
        const bool two = row + query_columns < set->rows;
        two ? name_in_tiles<2>(own) : name_in_tiles<1>(own);
        row += (two ? 2 : 1) * query_columns;
      }
    }
  }
}

}  // namespace mnemos
