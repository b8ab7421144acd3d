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
                          float *scores, int64_t stride) {
  constexpr int64_t most_groups = 32, few_rows = 8, block = 16, late = 2;  // pages whose scores are transposed together
  const bool fits = layout.groups <= tile_groups || layout.groups % tile_groups == 0;
  if (queries.rows < few_rows || !fits || layout.groups > most_groups)
    return avx512_vector_kernels.score_pages(layout, pages, queries, scores, stride);
  constexpr int64_t most_tiles = max_tile_rows / tile_queries;
  alignas(64) uint8_t columns[most_tiles * most_groups * 64], keys[2][index_run * most_groups * 4];
  alignas(64) int32_t sums[4][index_run * tile_queries];
  alignas(64) float best[most_tiles][block * tile_queries];
  queries_in_columns(layout, queries, columns);
  TileShapes shapes;
  for (int tile = 0; tile < 8; tile++) shapes.rows[tile] = 16, shapes.row_bytes[tile] = 64;
  const auto groups = static_cast<uint8_t>(layout.groups < tile_groups ? layout.groups : tile_groups);
  shapes.row_bytes[0] = shapes.row_bytes[1] = static_cast<uint16_t>(groups * 4);
  shapes.rows[6] = shapes.rows[7] = groups;
  ConfiguredTiles tiles;
  tiles.configure(shapes);
  const int64_t count = (queries.rows + tile_queries - 1) / tile_queries, runs = pages.count * layout.runs;
  const auto run_of = [&](int64_t n) {
    return pages.cells + pages.pages[n / layout.runs] * layout.bytes + n % layout.runs * layout.run_bytes;
  };
  if (runs > 0) keys_in_rows(layout, run_of(0), keys[0]);
  for (int64_t n = 0; n < runs; n++) {
    const int64_t page = n / layout.runs, place = page % block;
    const bool first = n % layout.runs == 0;
    const uint8_t *own = keys[n % 2];
    if (layout.groups <= tile_groups) AmxTiles::load<0>(own, groups * 4), AmxTiles::load<1>(own + 16 * groups * 4, groups * 4);
    if (n + 1 < runs) keys_in_rows(layout, run_of(n + 1), keys[(n + 1) % 2]);
    const Vec scale = splat(scale_of(layout, run_of(n)));
    const auto reduce = [&](int64_t tile) {
      reduce_tile(sums[tile % 4], scale, first, best[tile] + place * tile_queries);
    };
    for (int64_t tile = 0; tile < count; tile++) {
      const uint8_t *of_tile = columns + tile * layout.groups * 64;
      if (tile % 2 == 0) {
        multiply_tile<2, 6>(layout, own, of_tile, sums[tile % 4]);
      } else {
        multiply_tile<4, 7>(layout, own, of_tile, sums[tile % 4]);
      }
      if (tile >= late) reduce(tile - late);  // not at once: its sums are still on their way to memory
    }
    for (int64_t tile = count > late ? count - late : 0; tile < count; tile++) reduce(tile);
    if (n % layout.runs + 1 < layout.runs || (place + 1 < block && page + 1 < pages.count)) continue;
    for (int64_t tile = 0; tile < count; tile++) {
      const int64_t rows = queries.rows - tile * tile_queries < tile_queries ? queries.rows - tile * tile_queries : tile_queries;
      transpose(best[tile], scores + tile * tile_queries * stride + page - place, stride, rows, place + 1);
    }
  }
}

}  // namespace mnemos
