// Attention over pages of the cache, written once over vec.h; included by kernels_impl.h.
#pragma once

#include <type_traits>

#include "vector/vec.h"
#include "vector/vector_kernels.h"

namespace mnemos {
namespace {

// The element types of the cache. `load` gives columns j to j + width of row i, of rows `stride` elements apart.
struct FloatElement {
  using Type = float;
  static constexpr int64_t bytes = 4;
  static Vec load(const float *p, int64_t stride, int64_t i, int64_t j) { return mnemos::load(p + i * stride + j); }
};
struct HalfElement {
  using Type = uint16_t;
  static constexpr int64_t bytes = 2;
  static Vec load(const uint16_t *p, int64_t stride, int64_t i, int64_t j) { return load_half(p + i * stride + j); }
};
// Two rows are stored in one, column by column, the even one's element first.
struct BrainElement {
  using Type = uint32_t;
  static constexpr int64_t bytes = 2;
  static Vec load(const uint32_t *p, int64_t stride, int64_t i, int64_t j) {
    const uint32_t *pairs = p + i / 2 * stride + j;
    return i % 2 == 0 ? load_low_brain(pairs) : load_high_brain(pairs);
  }
};
struct ByteElement {
  using Type = int8_t;
  static constexpr int64_t bytes = 1;
  static Vec load(const int8_t *p, int64_t stride, int64_t i, int64_t j) { return load_byte(p + i * stride + j); }
};

// Rows of queries that share the loads of a vector of keys or values, and vectors that share the loads of a query's
// elements: as many as the registers hold. A tile of many rows is cut into groups of this size.
#if defined(__AVX512F__)
constexpr int most_rows = 8, group_rows = 6, most_vectors = 4;
// Inlined, it would share the registers with its caller's constants, and sums would be kept in memory.
#define MNEMOS_OUTER_PRODUCT __attribute__((noinline))
#else
constexpr int most_rows = 4, group_rows = 4, most_vectors = 2;
#define MNEMOS_OUTER_PRODUCT inline
#endif
// From this many rows on, a block of keys and values is converted to float32 once for all of them.
constexpr int64_t rows_to_expand_for = 2 * group_rows;

// Few rows wait for memory, not for arithmetic: then each step of a product also fetches one of the next lines. The
// processor's own prefetching stops at the borders of the small pieces that a page consists of.
constexpr int64_t most_rows_to_fetch_for = 16;

// The rows of b that a product sums over.
struct Summed {
  int64_t begin, end;
};

// c[r][j] (+)= sum over i of a[r][i] b[i][column + j], for R rows and N vectors of columns. The sum runs over i one by
// one, whatever R and N are, which is what makes a row's result independent of its neighbours.
template <typename Element, int R, int N>
MNEMOS_OUTER_PRODUCT void outer_product(const float *a, int64_t a_stride, const typename Element::Type *b,
                                        int64_t b_stride, int64_t column, Summed range, float *c, int64_t c_stride,
                                        bool accumulate, const uint8_t *ahead) {
  constexpr int64_t line = 64, lines = (Element::bytes * N * width + line - 1) / line;
  Vec sums[R][N];
  for (int r = 0; r < R; r++) {
    for (int j = 0; j < N; j++) sums[r][j] = accumulate ? load(c + r * c_stride + j * width) : zero();
  }
  for (int64_t i = range.begin; i < range.end; i++) {
    if (R < most_rows && ahead != nullptr) {
      for (int64_t j = 0; j < lines; j++) prefetch(ahead + ((i - range.begin) * lines + j) * line);
    }
    Vec row[N];
    for (int j = 0; j < N; j++) row[j] = Element::load(b, b_stride, i, column + j * width);
    for (int r = 0; r < R; r++) {
      const Vec factor = splat(a[r * a_stride + i]);
      for (int j = 0; j < N; j++) sums[r][j] = fma(factor, row[j], sums[r][j]);
    }
  }
  for (int r = 0; r < R; r++) {
    for (int j = 0; j < N; j++) store(c + r * c_stride + j * width, sums[r][j]);
  }
}

template <typename Element, int R>
inline void product_of_rows(const float *a, int64_t a_stride, const typename Element::Type *b, int64_t b_stride,
                            Summed range, float *c, int64_t c_stride, int64_t columns, bool accumulate,
                            const uint8_t *ahead) {
  int64_t j = 0;
  const auto run = [&](auto tag) {
    constexpr int N = decltype(tag)::value;
    for (; j + N * width <= columns; j += N * width) {
      outer_product<Element, R, N>(a, a_stride, b, b_stride, j, range, c + j, c_stride, accumulate,
                                   N > 1 ? ahead : nullptr);
      if (ahead != nullptr) ahead += N * width * (range.end - range.begin) * Element::bytes;
    }
  };
  if constexpr (R <= group_rows && most_vectors > 2) run(std::integral_constant<int, most_vectors>{});
  run(std::integral_constant<int, 2>{});
  run(std::integral_constant<int, 1>{});
}

template <typename Element>
inline void product(int64_t rows, const float *a, int64_t a_stride, const typename Element::Type *b, int64_t b_stride,
                    Summed range, float *c, int64_t c_stride, int64_t columns, bool accumulate, const uint8_t *ahead) {
  const auto run = [&](auto tag, int64_t r) {
    product_of_rows<Element, decltype(tag)::value>(a + r * a_stride, a_stride, b, b_stride, range, c + r * c_stride,
                                                   c_stride, columns, accumulate, r == 0 ? ahead : nullptr);
  };
  int64_t r = 0;
  for (; r + most_rows <= rows; r += most_rows) run(std::integral_constant<int, most_rows>{}, r);
  switch (rows - r) {
    case 1: return run(std::integral_constant<int, 1>{}, r);
    case 2: return run(std::integral_constant<int, 2>{}, r);
    case 3: return run(std::integral_constant<int, 3>{}, r);
    case 4: return run(std::integral_constant<int, 4>{}, r);
#if defined(__AVX512F__)
    case 5: return run(std::integral_constant<int, 5>{}, r);
    case 6: return run(std::integral_constant<int, 6>{}, r);
    case 7: return run(std::integral_constant<int, 7>{}, r);
#endif
    default: return;
  }
}

// What some rows of a tile see of one block.
struct BlockRange {
  int64_t start;  // position of score 0
  int64_t first, last;  // positions that some row sees, within the block; nothing if last < 0
  const KeyBlock *block;
};

template <typename Element, typename Visit>
inline void for_each_page(const AttentionTile &tile, const BlockRange &range, const Visit &visit) {
  const int64_t slots = tile.cell->slots, skipped = (range.first - range.block->first) / slots;
  const int32_t *page = range.block->pages + skipped;
  for (int64_t position = range.block->first + skipped * slots; position <= range.last; position += slots) {
    visit(position, tile.cells + *page++ * tile.page_bytes);
  }
}

template <typename Element>
void score_block(const AttentionTile &tile, const BlockRange &range) {
  const CellLayout &cell = *tile.cell;
  for_each_page<Element>(tile, range, [&](int64_t position, const uint8_t *data) {
    const auto *keys = reinterpret_cast<const typename Element::Type *>(data);
    float *scores = tile.scores + (position - range.start);
    const uint8_t *ahead = tile.rows <= most_rows_to_fetch_for ? data + cell.value_offset : nullptr;

    product<Element>(tile.rows, tile.queries, cell.value_stride, keys, cell.key_stride, {0, cell.head_dim}, scores,
                     score_stride, cell.key_stride, false, ahead);
    if (cell.type != CacheType::int8) return;
    const auto *scales = reinterpret_cast<const float *>(data + cell.key_scale_offset);
    for (int64_t r = 0; r < tile.rows; r++) {
      float *row = scores + r * score_stride;
      map(row, scales, row, cell.slots, [](Vec s, Vec k) { return mul(s, k); });
    }
  });
}

inline Vec lane_numbers() {
  float numbers[width];
  for (int i = 0; i < width; i++) numbers[i] = static_cast<float>(i);
  return load(numbers);
}

// Turns one row's scores into exponentials relative to their maximum; positions that the row does not see become 0.
inline void exponentials(float *scores, int64_t first, int64_t last, int64_t used, float cap, float *most,
                         float *total) {
  const Vec numbers = lane_numbers(), low = splat(static_cast<float>(first)), high = splat(static_cast<float>(last));
  const Vec hidden = splat(-INFINITY), c = splat(cap);
  Vec maximum = hidden;
  if (cap > 0) map(scores, scores, (used + width - 1) / width * width, [&](Vec s) { return mul(c, tanh(div(s, c))); });
  for (int64_t i = 0; i < used; i += width) {
    Vec s = load(scores + i);
    if (i < first || i + width - 1 > last) {
      const Vec number = add(numbers, splat(static_cast<float>(i)));
      s = select(less(number, low), hidden, select(less(high, number), hidden, s));
      store(scores + i, s);
    }
    maximum = max(s, maximum);
  }
  *most = largest(maximum);
  const Vec shift = splat(*most);
  Vec sums = zero();
  for (int64_t i = 0; i < used; i += width) {
    const Vec e = exp(sub(load(scores + i), shift));
    sums = add(sums, e);
    store(scores + i, e);
  }
  *total = sum(sums);
}

// The page of keys that is needed once the values of the one at `position` are done: the next block's, or else the
// next tile's. Null if there is none.
inline const uint8_t *keys_ahead(const AttentionTile &tile, int64_t position, const KeyBlock *next_block) {
  if (tile.rows > most_rows_to_fetch_for) return nullptr;
  NextKeys next = tile.next;
  if (next_block != nullptr) {
    const int64_t end = tile.last[tile.rows - 1];
    next = {tile.cells, next_block, next_block->first, end < next_block->last ? end : next_block->last};
  }
  if (next.cells == nullptr) return nullptr;
  const int64_t slots = tile.cell->slots, wanted = next.block->start + position % attention_block;
  if (wanted + slots <= next.first || wanted > next.last) return nullptr;
  return next.cells + next.block->pages[(wanted - next.block->first) / slots] * tile.page_bytes;
}

template <typename Element>
void weigh_values(const AttentionTile &tile, const BlockRange &range, const KeyBlock *next_block) {
  const CellLayout &cell = *tile.cell;
  bool accumulate = false;
  for_each_page<Element>(tile, range, [&](int64_t position, const uint8_t *data) {
    const int64_t begin = range.first > position ? range.first - position : 0;
    const int64_t end = range.last - position + 1 < cell.slots ? range.last - position + 1 : cell.slots;
    const auto *values = reinterpret_cast<const typename Element::Type *>(data + cell.value_offset);
    float *weights = tile.scores + (position - range.start);
    if (cell.type == CacheType::int8) {
      const auto *scales = reinterpret_cast<const float *>(data + cell.value_scale_offset);
      for (int64_t r = 0; r < tile.rows; r++) {
        float *row = weights + r * score_stride + begin;
        map(row, scales + begin, row, end - begin, [](Vec w, Vec v) { return mul(w, v); });
      }
    }
    product<Element>(tile.rows, weights, score_stride, values, cell.value_stride, {begin, end}, tile.partial,
                     cell.value_stride, cell.value_stride, accumulate, keys_ahead(tile, position, next_block));
    accumulate = true;
  });
}

// Merges nothing but the numbers where nothing was merged into before.
void merge(float most, float total, const float *values, float *into_most, float *into_total, float *into, int64_t n) {
  if (*into_most == -INFINITY) {
    for (int64_t i = 0; i < n; i += width) store(into + i, load(values + i));
    *into_total = total;
    *into_most = most;
    return;
  }
  const float maximum = most > *into_most ? most : *into_most;
  const Vec shift = splat(maximum);
  const Vec old_share = exp(sub(splat(*into_most), shift)), new_share = exp(sub(splat(most), shift));
  for (int64_t i = 0; i < n; i += width) {
    store(into + i, add(mul(load(into + i), old_share), mul(load(values + i), new_share)));
  }
  float shares[2][width];
  store(shares[0], old_share), store(shares[1], new_share);
  *into_total = *into_total * shares[0][0] + total * shares[1][0];
  *into_most = maximum;
}

inline bool sees(const AttentionTile &tile, int64_t row, const KeyBlock &block) {
  return tile.first[row] <= block.last && tile.last[row] >= block.first;
}

// The positions of the block that some of the rows see.
inline BlockRange visible(const AttentionTile &tile, const KeyBlock &block, int64_t row_begin, int64_t row_end) {
  BlockRange range{block.start, INT64_MAX, -1, &block};
  for (int64_t r = row_begin; r < row_end; r++) {
    if (!sees(tile, r, block)) continue;
    range.first = tile.first[r] < range.first ? tile.first[r] : range.first;
    range.last = tile.last[r] > range.last ? tile.last[r] : range.last;
  }
  range.first = range.first < block.first ? block.first : range.first;
  range.last = range.last > block.last ? block.last : range.last;
  return range;
}

// What one row sees of a range that its group sees, counted from score 0. Past the range scores may be anything.
struct Seen {
  int64_t first, last;

  Seen(const AttentionTile &tile, const BlockRange &range, int64_t row)
      : first((tile.first[row] > range.first ? tile.first[row] : range.first) - range.start),
        last((tile.last[row] < range.last ? tile.last[row] : range.last) - range.start) {}
  bool all() const { return first == 0 && last == attention_block - 1; }
};

inline void merge_rows(const AttentionTile &tile, const BlockRange &range, const float *most, const float *total) {
  const int64_t stride = tile.cell->value_stride;
  for (int64_t r = 0; r < tile.rows; r++) {
    if (!sees(tile, r, *range.block)) continue;
    merge(most[r], total[r], tile.partial + r * stride, &tile.most[r], &tile.total[r], tile.result + r * stride,
          stride);
  }
}

// A block of keys and values in float32: keys in segments of `segment` positions, (head_dim, segment) each, values as
// (position, value_stride), and the scales of both where the cache has them.
constexpr int64_t segment = most_vectors * width;

struct Expanded {
  float *keys, *values, *key_scales, *value_scales;

  explicit Expanded(const AttentionTile &tile)
      : keys(tile.expanded), values(keys + attention_block * tile.cell->head_dim),
        key_scales(values + attention_block * tile.cell->value_stride), value_scales(key_scales + attention_block) {}
};

template <typename Element>
void expand_block(const AttentionTile &tile, const BlockRange &range) {
  using Type = typename Element::Type;
  const CellLayout &cell = *tile.cell;
  const Expanded block(tile);
  for_each_page<Element>(tile, range, [&](int64_t position, const uint8_t *data) {
    const int64_t at = position - range.start;
    const auto *keys = reinterpret_cast<const Type *>(data),
               *values = reinterpret_cast<const Type *>(data + cell.value_offset);
    for (int64_t j = 0; j < cell.slots; j += width) {
      float *into = block.keys + (at + j) / segment * segment * cell.head_dim + (at + j) % segment;
      for (int64_t i = 0; i < cell.head_dim; i++) store(into + i * segment, Element::load(keys, cell.key_stride, i, j));
    }
    const int64_t count = range.last - position + 1 < cell.slots ? range.last - position + 1 : cell.slots;
    float *into = block.values + at * cell.value_stride;
    for (int64_t slot = 0; slot < count; slot++, into += cell.value_stride) {
      for (int64_t j = 0; j < cell.value_stride; j += width)
        store(into + j, Element::load(values, cell.value_stride, slot, j));
    }
    if (cell.type != CacheType::int8) return;
    std::memcpy(block.key_scales + at, data + cell.key_scale_offset, static_cast<size_t>(cell.slots) * sizeof(float));
    std::memcpy(block.value_scales + at, data + cell.value_scale_offset,
                static_cast<size_t>(cell.slots) * sizeof(float));
  });
}

// Calls run(integral_constant) with `count`, which is 1 to Most.
template <int Most, typename Run>
inline void with_count(int64_t count, const Run &run) {
  if constexpr (Most > 1) {
    if (count < Most) return with_count<Most - 1>(count, run);
  }
  run(std::integral_constant<int, Most>{});
}

// Calls visit(integral_constant rows, first row, what they see) for the groups of a tile that see any of the block.
template <typename Visit>
inline void for_groups(const AttentionTile &tile, const KeyBlock &block, const Visit &visit) {
  for (int64_t r = 0; r < tile.rows; r += group_rows) {
    const int64_t count = tile.rows - r < group_rows ? tile.rows - r : group_rows;
    const BlockRange range = visible(tile, block, r, r + count);
    if (range.last >= 0) with_count<group_rows>(count, [&](auto rows) { visit(rows, r, range); });
  }
}

// Like score_block, exponentials and weigh_values, with the same sums in the same order.
template <typename Element>
void attend_expanded(const AttentionTile &tile, const BlockRange &all) {
  const CellLayout &cell = *tile.cell;
  const KeyBlock &block = *all.block;
  const Expanded expanded(tile);
  const int64_t stride = cell.value_stride;
  expand_block<Element>(tile, all);
  for (int64_t at = 0; at <= all.last - all.start; at += segment) {  // a segment of keys stays in the first-level cache
    for_groups(tile, block, [&](auto rows, int64_t r, const BlockRange &range) {
      const int64_t vectors = (range.last - range.start - at + width) / width;
      if (vectors <= 0) return;
      with_count<most_vectors>(vectors < most_vectors ? vectors : most_vectors, [&](auto count) {
        outer_product<FloatElement, decltype(rows)::value, decltype(count)::value>(
            tile.queries + r * stride, stride, expanded.keys + at * cell.head_dim, segment, 0, {0, cell.head_dim},
            tile.scores + r * score_stride + at, score_stride, false, nullptr);
      });
    });
  }
  float most[max_tile_rows], total[max_tile_rows];
  for_groups(tile, block, [&](auto rows, int64_t r, const BlockRange &range) {
    const int64_t used = range.last - range.start + 1, begin = range.first - range.start;
    for (int64_t i = r; i < r + decltype(rows)::value; i++) {
      float *row = tile.scores + i * score_stride;
      if (cell.type == CacheType::int8)
        map(row, expanded.key_scales, row, used, [](Vec s, Vec k) { return mul(s, k); });
      const Seen seen(tile, range, i);
      exponentials(row, seen.first, seen.last, used, tile.softcap, &most[i], &total[i]);
      if (cell.type == CacheType::int8) {
        map(row + begin, expanded.value_scales + begin, row + begin, used - begin,
            [](Vec w, Vec v) { return mul(w, v); });
      }
    }
    product_of_rows<FloatElement, decltype(rows)::value>(tile.scores + r * score_stride, score_stride, expanded.values,
                                                         stride, {begin, used}, tile.partial + r * stride, stride,
                                                         stride, false, nullptr);
  });
  merge_rows(tile, all, most, total);
}

template <typename Element>
void attend_block(const AttentionTile &tile, const KeyBlock &block, const KeyBlock *next_block) {
  const BlockRange range = visible(tile, block, 0, tile.rows);
  if (range.last < 0) return;
  if (tile.rows >= rows_to_expand_for && tile.cell->slots % width == 0) return attend_expanded<Element>(tile, range);
  score_block<Element>(tile, range);
  const int64_t used = range.last - range.start + 1;
  float most[max_tile_rows], total[max_tile_rows];
  for (int64_t r = 0; r < tile.rows; r++) {
    const Seen seen(tile, range, r);
    exponentials(tile.scores + r * score_stride, seen.first, seen.last, used, tile.softcap, &most[r], &total[r]);
  }
  weigh_values<Element>(tile, range, next_block);
  merge_rows(tile, range, most, total);
}

// Calls run(block, the next one) for the blocks begin to end; the last one has no next.
template <typename Run>
inline void for_blocks(const AttentionTile &tile, int64_t begin, int64_t end, const Run &run) {
  for (int64_t b = begin; b < end; b++) run(tile.blocks[b], b + 1 < end ? &tile.blocks[b + 1] : nullptr);
}

void attend(const AttentionTile &tile, int64_t block_begin, int64_t block_end) {
  const auto run = [&](auto element) {
    for_blocks(tile, block_begin, block_end, [&](const KeyBlock &block, const KeyBlock *next_block) {
      attend_block<decltype(element)>(tile, block, next_block);
    });
  };
  switch (tile.cell->type) {
    case CacheType::float32: return run(FloatElement{});
    case CacheType::float16: return run(HalfElement{});
    case CacheType::bfloat16: return run(BrainElement{});
    case CacheType::int8: return run(ByteElement{});
  }
}

// In the lower half; without branches, so that compilers vectorise it.
inline uint32_t to_brain(float x) {
  uint32_t value;
  std::memcpy(&value, &x, 4);
  const uint32_t rounded = (value + 0x7fff + ((value >> 16) & 1)) >> 16, quiet = (value >> 16) | 0x40;
  return (value & 0x7fffffff) > 0x7f800000 ? quiet : rounded;
}

// Calls write(i, element) for each of the n values in the cache's type; returns the scale of int8.
template <typename Write>
inline float encode(CacheType type, const float *x, int64_t n, const Write &write) {
  if (type == CacheType::float32) {
    for (int64_t i = 0; i < n; i++) write(i, x[i]);
  } else if (type == CacheType::float16) {
    uint16_t halves[width];
    for_vectors(n, [&](int64_t i, int k) {
      store_half(halves, min(max(load_any(x + i, k), splat(-65504.0f)), splat(65504.0f)));
      for (int j = 0; j < k; j++) write(i + j, halves[j]);
    });
  } else {
    float most = 0;
    for (int64_t i = 0; i < n; i++) most = std::fabs(x[i]) > most ? std::fabs(x[i]) : most;
    const float scale = most / 127.0f, inverse = scale > 0 ? 1.0f / scale : 0.0f;
    float quants[width];
    for_vectors(n, [&](int64_t i, int k) {
      store(quants, nearest(min(max(mul(load_any(x + i, k), splat(inverse)), splat(-127.0f)), splat(127.0f))));
      for (int j = 0; j < k; j++) write(i + j, static_cast<int8_t>(quants[j]));
    });
    return scale;
  }
  return 1.0f;
}

template <typename T>
inline void put(uint8_t *data, int64_t index, T value) {
  std::memcpy(data + index * static_cast<int64_t>(sizeof(T)), &value, sizeof(T));
}

// In bfloat16, components 2 i and 2 i + 1 of a key are adjacent.
inline void store_brain_key(const CellLayout &cell, uint32_t *words, const float *key) {
  constexpr int64_t run = 64;
  uint32_t brains[run + 1];
  for (int64_t begin = 0; begin < cell.head_dim; begin += run) {
    const int64_t n = cell.head_dim - begin < run ? cell.head_dim - begin : run;
    for (int64_t i = 0; i < n; i++) brains[i] = to_brain(key[begin + i]);
    if (n % 2 != 0) brains[n] = 0;
    for (int64_t i = 0; i < n; i += 2) words[(begin + i) / 2 * cell.key_stride] = brains[i] | brains[i + 1] << 16;
  }
}

// In bfloat16, the values of slots 2 i and 2 i + 1 are adjacent; the other slot's stay.
inline void store_brain_value(uint32_t *words, int64_t slot, int64_t n, const float *value) {
  const uint32_t kept = slot % 2 != 0 ? 0xffff : 0xffff0000;
  const int shift = slot % 2 != 0 ? 16 : 0;
  for (int64_t i = 0; i < n; i++) words[i] = (words[i] & kept) | to_brain(value[i]) << shift;
}

void store_key(const CellLayout &cell, uint8_t *data, int64_t slot, const float *key) {
  if (cell.type == CacheType::bfloat16) return store_brain_key(cell, reinterpret_cast<uint32_t *>(data) + slot, key);
  const float scale = encode(cell.type, key, cell.head_dim,
                             [&](int64_t i, auto element) { put(data, i * cell.key_stride + slot, element); });
  if (cell.type == CacheType::int8) put(data + cell.key_scale_offset, slot, scale);
}

void store_value(const CellLayout &cell, uint8_t *data, int64_t slot, const float *value) {
  if (cell.type == CacheType::bfloat16) {
    auto *words = reinterpret_cast<uint32_t *>(data + cell.value_offset) + slot / 2 * cell.value_stride;
    return store_brain_value(words, slot, cell.head_dim, value);
  }
  if (cell.type == CacheType::float16 && cell.head_dim % width == 0) {
    auto *halves = reinterpret_cast<uint16_t *>(data + cell.value_offset) + slot * cell.value_stride;
    for (int64_t i = 0; i < cell.head_dim; i += width) {
      store_half(halves + i, min(max(load(value + i), splat(-65504.0f)), splat(65504.0f)));
    }
    return;
  }
  const float scale = encode(cell.type, value, cell.head_dim, [&](int64_t i, auto element) {
    put(data + cell.value_offset, slot * cell.value_stride + i, element);
  });
  if (cell.type == CacheType::int8) put(data + cell.value_scale_offset, slot, scale);
}

}  // namespace
}  // namespace mnemos
