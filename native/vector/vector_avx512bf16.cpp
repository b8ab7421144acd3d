// Attention with the bfloat16 dot product; the rest of this level is AVX-512's.
#include "vector/attention_dots.h"

namespace mnemos {

void attend_by_dots(const AttentionTile &tile, int64_t block_begin, int64_t block_end) {
  if (!has_dots(*tile.cell)) return avx512_vector_kernels.attend(tile, block_begin, block_end);
  const uint32_t *queries = pair_queries(tile);
  for_blocks(tile, block_begin, block_end, [&](const KeyBlock &block, const KeyBlock *next_block) {
    attend_block_by_dots(tile, queries, block, next_block);
  });
}

}  // namespace mnemos
