// Attention with AMX tiles; the rest of this level is AVX-512's.
#include "vector/attention_tiles.h"

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

}  // namespace mnemos
