// Everything but the matrix products: the functions of one instruction set, chosen at run time.
#pragma once

#include <cstdint>

#include "system/cpu.h"

namespace mnemos {

enum class ActivationKind { silu, gelu, gelu_tanh, relu, sigmoid, tanh };
enum class CacheType { float32, float16, bfloat16, int8 };

// Keys are attended to in blocks of at most this many positions, none of which crosses a multiple of it. Blocks are
// reduced one by one and merged in their order, so that a row's result depends only on its own position and what
// it sees.
constexpr int64_t attention_block = 128;
constexpr int64_t score_stride = attention_block + 16;  // a page with few slots writes up to 16 scores after its own
constexpr int64_t max_tile_rows = 128;

// The memory layout of one (page, layer, head) cell of the cache. Keys are transposed: slots are adjacent, so that a
// vector of scores needs no horizontal sum; values are not. In bfloat16, two key components or two slots' values are
// adjacent, as its dot products need them. Offsets are in bytes from the cell's start.
struct CellLayout {
  CacheType type;
  int64_t slots;  // positions per page; divides attention_block
  int64_t head_dim;
  int64_t key_stride;  // elements between key components: slots, rounded up to 16
  int64_t value_stride;  // elements between slots' values: head_dim, rounded up to 16
  int64_t value_offset, key_scale_offset, value_scale_offset;
  int64_t bytes;
};

// A block of keys and values in float32, with their scales.
constexpr int64_t expanded_floats(const CellLayout &cell) {
  return attention_block * (cell.head_dim + cell.value_stride + 2);
}

// Pages of one sequence that follow each other without a gap, between two multiples of attention_block.
struct KeyBlock {
  int64_t start;  // the multiple of attention_block below them: where scores are counted from
  int64_t first, last;  // the positions in the pages, both ends included
  const int32_t *pages;  // the page of `first` and those after it
};

// Keys at some positions of a sequence: those needed when a tile is done, so that they are fetched in the meantime.
struct NextKeys {
  const uint8_t *cells;  // the cell of page 0; null if nothing is wanted
  const KeyBlock *block;
  int64_t first, last;  // within the block
};

// One query tile of one head of keys: `rows` queries, and the blocks of keys that they see.
struct AttentionTile {
  const CellLayout *cell;
  const uint8_t *cells;  // the cell of page 0
  int64_t page_bytes;  // from one page's cell to the next page's
  const KeyBlock *blocks;  // of all sequences; block numbers count from here
  int64_t rows;
  const int64_t *first, *last;  // (rows,) positions that each query sees, both ends included
  NextKeys next;  // of the same cache
  const float *queries;  // (rows, value_stride), already scaled
  float softcap;
  float *scores;  // scratch (rows, score_stride)
  float *partial;  // scratch (rows, value_stride)
  float *expanded;  // scratch of expanded_floats(cell)
  float *most, *total;  // (rows,) running maximum and sum of exponentials
  float *result;  // (rows, value_stride) running weighted sum of values, set by the first block that a row sees
};

// The index of one (page, head) of the cache: its keys in 3 bits, in runs of 32. A component of a run's keys takes eight
// values, from a lowest one on in steps. A run has two halves of 16 keys, each with, for each four groups of 4
// components, 64 bytes: byte 4 key + i has, in bits 2 g and 2 g + 1, the lower two bits of the key's code of component i
// of group g; and then, for each group, 8 bytes: bit 4 key + i is the third one of component i's code. After the halves
// there are each component's lowest value, with index_offset added, and its step, in bytes; then what 1 stands for, in
// float32. There are whole fours of groups.
struct IndexLayout {
  int64_t groups, runs, run_bytes, bytes;

  constexpr int64_t half() const { return groups * 24; }
  constexpr int64_t thirds() const { return groups * 16; }  // in a half
  constexpr int64_t lows() const { return groups * 48; }
  constexpr int64_t steps() const { return groups * 52; }
  constexpr int64_t scale() const { return groups * 56; }
};
constexpr int64_t index_run = 32, index_half = 16;
constexpr int32_t index_offset = 128, index_levels = 124;  // values are whole numbers, up to index_levels at first
constexpr IndexLayout index_layout(int64_t slots, int64_t components) {
  const int64_t groups = (components + 15) / 16 * 4, run_bytes = groups * 56 + 4;
  return {groups, slots / index_run, run_bytes, slots / index_run * run_bytes};
}

// Indices of a cache's pages are together for each 64 of them, one head's after the other: so they are read in runs, and
// those of few pages are near each other, in few large pages of the system.
constexpr int64_t index_chunk = 64;
constexpr int64_t index_at(const IndexLayout &layout, int64_t chunk_bytes, int64_t page) {
  return page / index_chunk * chunk_bytes + page % index_chunk * layout.bytes;
}

// Indices of one head: those of pages `first` to `last` of a text.
struct PageIndices {
  const uint8_t *cells;  // of page 0 of the cache
  int64_t chunk_bytes;
  const int32_t *table;  // of the text, from its page 0
  int64_t first, last;
  uint8_t *expanded;  // scratch of expanded_bytes, aligned
};
constexpr int64_t expanded_bytes(const IndexLayout &layout) {
  const int64_t page = layout.runs * layout.groups * 4 * index_run, block = 64 * page;
  return block < (1 << 15) ? block : page > (1 << 15) ? page : 1 << 15;
}

// The pages that queries name: those that suit each of them best, the best first and the lower of equal ones.
struct Named {
  int64_t count;  // wanted
  int64_t stride;  // from one row's pages to the next one's
  float *factors;  // (rows,) by which scores are to be multiplied
  float *most;  // (rows,) the largest score of any page
  float *least;  // (rows,) only larger scores are added
  float *scores;  // (rows, stride), minus infinity where fewer are named
  int32_t *pages;  // (rows, stride)
};
// Room for the pages of a row, which are read and moved in whole vectors.
constexpr int64_t named_room(int64_t count) { return (count + 30) / 16 * 16; }
constexpr int64_t choosing_floats(int64_t count) { return 2 * (named_room(count) + count); }
constexpr int64_t query_columns = 16;

// The queries, in 8 bits, of tokens in the same page of a text, in one head. Each 16 of them are columns: for each group
// of 4 components, 64 bytes. Columns beyond the last query are zero, and have places in `named` too.
struct NamingQueries {
  int64_t rows;
  const int8_t *columns;
  const int32_t *sums;  // (rows,) of each query's codes
  int64_t pages, begin, end;  // those before `pages` have scores, and those from begin to end can be named
  Named named;
};

struct VectorKernels {
  // y = x / rms(x) * weight for `groups` runs of n values. x may be y.
  void (*rms_norm)(const float *x, const float *weight, float epsilon, float *y, int64_t groups, int64_t n);
  void (*layer_norm)(const float *x, const float *weight, const float *bias, float epsilon, float *y, int64_t n);
  void (*activation)(ActivationKind kind, const float *x, float *y, int64_t n);
  void (*gated_activation)(ActivationKind kind, const float *gate, const float *up, float *y, int64_t n);
  void (*add)(const float *x, const float *y, float *z, int64_t n);
  void (*scale)(const float *x, float factor, float *y, int64_t n);
  // y += factor * x
  void (*accumulate)(const float *x, float factor, float *y, int64_t n);
  float (*dot)(const float *x, const float *y, int64_t n);
  void (*softcap)(const float *x, float cap, float *y, int64_t n);
  // Rotates one head, element i with element i + half, and scales it. x may be y.
  void (*rope)(const float *x, const float *cosines, const float *sines, float factor, float *y, int64_t half);
  void (*softmax)(float *x, int64_t n);

  // No other thread may write to slots 2 i and 2 i + 1 of a cell meanwhile: they share words of it.
  void (*store_key)(const CellLayout &cell, uint8_t *data, int64_t slot, const float *key);
  void (*store_value)(const CellLayout &cell, uint8_t *data, int64_t slot, const float *value);
  // Merges the tile's blocks begin to end into most, total and result, in order.
  void (*attend)(const AttentionTile &tile, int64_t block_begin, int64_t block_end);
  // Merges one row's state (most, total, n values) into another, whose values need not be set if its most is -infinity.
  void (*merge)(float most, float total, const float *values, float *into_most, float *into_total, float *into,
                int64_t n);
  // y = softmax(query . keys * scale) values, with `count` keys and values of n floats; scratch for `count` scores.
  // passing: they are read bypassing the caches.
  void (*attend_plain)(const float *query, const float *keys, const float *values, int64_t count, int64_t n,
                       float scale, bool passing, float *scores, float *y);

  // Has queries name pages: the score of one is the largest product of the query with any key of its index. All numbers
  // are exact. At most max_tile_rows queries in each of the `count` sets.
  void (*name_pages)(const IndexLayout &layout, const PageIndices &pages, const NamingQueries *sets, int64_t count);
  // Writes the pages that a token recalls, ascending, whose `group` queries from `row` on have named theirs in `count`
  // parts of the text. Works in choosing_floats.
  void (*choose_pages)(const Named *parts, int64_t count, int64_t row, int64_t group, float *scratch, int32_t *chosen);

  // For sampling and log probabilities.
  // Infinite where any x is not a number.
  float (*largest)(const float *x, int64_t n);
  // sum of exp((x - shift) * factor) in double precision over float exponentials
  double (*sum_exp)(const float *x, float shift, float factor, int64_t n);
  // y = exp((x - shift) * factor)
  void (*exponentials)(const float *x, float shift, float factor, float *y, int64_t n);
  // Writes the indices of all x >= threshold, in order, and returns their number; stops when `most` are found.
  int64_t (*select_at_least)(const float *x, float threshold, int32_t *indices, int64_t most, int64_t n);
};

const VectorKernels &vector_kernels(Isa isa);

#if defined(__x86_64__)
extern const VectorKernels avx512_vector_kernels;
// Like VectorKernels::attend, with the bfloat16 dot product and with AMX tiles.
void attend_by_dots(const AttentionTile &tile, int64_t block_begin, int64_t block_end);
void attend_in_tiles(const AttentionTile &tile, int64_t block_begin, int64_t block_end);
// Like VectorKernels::name_pages, with AMX tiles.
void name_pages_in_tiles(const IndexLayout &layout, const PageIndices &pages, const NamingQueries *sets, int64_t count);
#endif

}  // namespace mnemos
