// Attention over pages of the cache, written once over vec.h; included by kernels_impl.h.
#pragma once

#include <type_traits>

#include "kernels.h"
#include "vec.h"

namespace mnemos {
namespace {

// The element types of the cache.
struct FloatElement {
  using Type = float;
  static Vec load(const float *p) { return mnemos::load(p); }
};
struct HalfElement {
  using Type = uint16_t;
  static Vec load(const uint16_t *p) { return load_half(p); }
};
struct BrainElement {
  using Type = uint16_t;
  static Vec load(const uint16_t *p) { return load_brain(p); }
};
struct ByteElement {
  using Type = int8_t;
  static Vec load(const int8_t *p) { return load_byte(p); }
};

// Rows of queries that share the loads of one vector of keys or values: as many as the registers hold.
#if defined(__AVX512F__)
constexpr int most_rows = 8;
#else
constexpr int most_rows = 4;
#endif

// Few rows wait for memory, not for arithmetic: then each step of a product also fetches a line that comes next. The
// processor's own prefetching stops at the borders of the small pieces that a page consists of.
constexpr int64_t most_rows_to_fetch_for = 16;

// c[r][j] (+)= sum over i of a[r][i] b[i][j], for R rows and N vectors of columns. The sum runs over i one by one,
// whatever R and N are, which is what makes a row's result independent of its neighbours.
template <typename Element, int R, int N>
inline void outer_product(const float *a, int64_t a_stride, const typename Element::Type *b, int64_t b_stride,
                          int64_t count, float *c, int64_t c_stride, bool accumulate, const uint8_t *ahead) {
  constexpr int64_t line = 64, lines = (sizeof(typename Element::Type) * N * width + line - 1) / line;
  Vec sums[R][N];
  for (int r = 0; r < R; r++) {
    for (int j = 0; j < N; j++) sums[r][j] = accumulate ? load(c + r * c_stride + j * width) : zero();
  }
  for (int64_t i = 0; i < count; i++, b += b_stride) {
    if (R < most_rows && ahead != nullptr) {
      for (int64_t j = 0; j < lines; j++) prefetch(ahead + (i * lines + j) * line);
    }
    Vec column[N];
    for (int j = 0; j < N; j++) column[j] = Element::load(b + j * width);
    for (int r = 0; r < R; r++) {
      const Vec factor = splat(a[r * a_stride + i]);
      for (int j = 0; j < N; j++) sums[r][j] = fma(factor, column[j], sums[r][j]);
    }
  }
  for (int r = 0; r < R; r++) {
    for (int j = 0; j < N; j++) store(c + r * c_stride + j * width, sums[r][j]);
  }
}

template <typename Element, int R>
inline void product_of_rows(const float *a, int64_t a_stride, const typename Element::Type *b, int64_t b_stride,
                            int64_t count, float *c, int64_t c_stride, int64_t columns, bool accumulate,
                            const uint8_t *ahead) {
  int64_t j = 0;
  for (; j + 2 * width <= columns; j += 2 * width) {
    outer_product<Element, R, 2>(a, a_stride, b + j, b_stride, count, c + j, c_stride, accumulate, ahead);
    if (ahead != nullptr) ahead += 2 * width * count * static_cast<int64_t>(sizeof(typename Element::Type));
  }
  for (; j < columns; j += width) {
    outer_product<Element, R, 1>(a, a_stride, b + j, b_stride, count, c + j, c_stride, accumulate, nullptr);
  }
}

template <typename Element>
inline void product(int64_t rows, const float *a, int64_t a_stride, const typename Element::Type *b, int64_t b_stride,
                    int64_t count, float *c, int64_t c_stride, int64_t columns, bool accumulate, const uint8_t *ahead) {
  const auto run = [&](auto tag, int64_t r) {
    product_of_rows<Element, decltype(tag)::value>(a + r * a_stride, a_stride, b, b_stride, count, c + r * c_stride,
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

// The pages of one block that any row of the tile sees, and the slots of them.
struct BlockRange {
  int64_t start;         // position of the block's first key
  int64_t first, last;   // positions that some row sees, within the block
};

template <typename Element, typename Visit>
inline void for_each_page(const AttentionTile &tile, const BlockRange &range, const Visit &visit) {
  const int64_t slots = tile.cell->slots;
  for (int64_t page = range.first / slots; page <= range.last / slots; page++) {
    visit(page * slots, tile.cells + tile.pages[page] * tile.page_bytes);
  }
}

template <typename Element>
void score_block(const AttentionTile &tile, const BlockRange &range) {
  const CellLayout &cell = *tile.cell;
  for_each_page<Element>(tile, range, [&](int64_t position, const uint8_t *data) {
    const auto *keys = reinterpret_cast<const typename Element::Type *>(data);
    float *scores = tile.scores + (position - range.start);
    const uint8_t *ahead = tile.rows <= most_rows_to_fetch_for ? data + cell.value_offset : nullptr;

    product<Element>(tile.rows, tile.queries, cell.value_stride, keys, cell.key_stride, cell.head_dim, scores,
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

// Turns one row's scores into exponentials relative to their maximum; what the row does not see becomes 0.
inline void exponentials(float *scores, int64_t first, int64_t last, int64_t used, float cap, float *most, float *total) {
  const Vec numbers = lane_numbers(), low = splat(static_cast<float>(first)), high = splat(static_cast<float>(last));
  const Vec hidden = splat(-INFINITY), c = splat(cap);
  Vec maximum = hidden;
  for (int64_t i = 0; i < used; i += width) {
    const Vec number = add(numbers, splat(static_cast<float>(i)));
    Vec s = load(scores + i);
    if (cap > 0) s = mul(c, tanh(div(s, c)));
    s = select(less(number, low), hidden, select(less(high, number), hidden, s));
    maximum = max(s, maximum);
    store(scores + i, s);
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

// The keys that are wanted when these values are done with: the next block's or the next cell's.
inline const uint8_t *keys_ahead(const AttentionTile &tile, int64_t position, const uint8_t *data, bool next_block) {
  if (tile.rows > most_rows_to_fetch_for) return nullptr;
  if (!next_block) return tile.next_cell != 0 ? data + tile.next_cell : nullptr;
  const int64_t page = (position + attention_block) / tile.cell->slots;
  return page <= tile.last[tile.rows - 1] / tile.cell->slots ? tile.cells + tile.pages[page] * tile.page_bytes : nullptr;
}

template <typename Element>
void weigh_values(const AttentionTile &tile, const BlockRange &range, bool next_block) {
  const CellLayout &cell = *tile.cell;
  bool accumulate = false;
  for_each_page<Element>(tile, range, [&](int64_t position, const uint8_t *data) {
    const int64_t begin = range.first > position ? range.first - position : 0;
    const int64_t end = range.last - position + 1 < cell.slots ? range.last - position + 1 : cell.slots;
    const auto *values = reinterpret_cast<const typename Element::Type *>(data + cell.value_offset);
    float *weights = tile.scores + (position + begin - range.start);
    if (cell.type == CacheType::int8) {
      const auto *scales = reinterpret_cast<const float *>(data + cell.value_scale_offset) + begin;
      for (int64_t r = 0; r < tile.rows; r++) {
        float *row = weights + r * score_stride;
        map(row, scales, row, end - begin, [](Vec w, Vec v) { return mul(w, v); });
      }
    }
    product<Element>(tile.rows, weights, score_stride, values + begin * cell.value_stride, cell.value_stride,
                     end - begin, tile.partial, cell.value_stride, cell.value_stride, accumulate,
                     keys_ahead(tile, position, data, next_block));
    accumulate = true;
  });
}

void merge(float most, float total, const float *values, float *into_most, float *into_total, float *into, int64_t n) {
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

template <typename Element>
void attend_block(const AttentionTile &tile, int64_t block, bool next_block) {
  BlockRange range{block * attention_block, INT64_MAX, -1};
  const int64_t end = range.start + attention_block - 1;
  for (int64_t r = 0; r < tile.rows; r++) {
    if (tile.first[r] > end || tile.last[r] < range.start) continue;
    range.first = tile.first[r] < range.first ? tile.first[r] : range.first;
    range.last = tile.last[r] > range.last ? tile.last[r] : range.last;
  }
  if (range.last < 0) return;
  range.first = range.first < range.start ? range.start : range.first;
  range.last = range.last > end ? end : range.last;
  score_block<Element>(tile, range);
  const int64_t used = range.last - range.start + 1;
  float most[max_tile_rows], total[max_tile_rows];
  for (int64_t r = 0; r < tile.rows; r++) {
    exponentials(tile.scores + r * score_stride, tile.first[r] - range.start, tile.last[r] - range.start, used,
                 tile.softcap, &most[r], &total[r]);
  }
  weigh_values<Element>(tile, range, next_block);
  for (int64_t r = 0; r < tile.rows; r++) {
    if (tile.first[r] > end || tile.last[r] < range.start) continue;
    merge(most[r], total[r], tile.partial + r * tile.cell->value_stride, &tile.most[r], &tile.total[r],
          tile.result + r * tile.cell->value_stride, tile.cell->value_stride);
  }
}

void attend(const AttentionTile &tile, int64_t block_begin, int64_t block_end) {
  const auto run = [&](auto element) {
    for (int64_t block = block_begin; block < block_end; block++) {
      attend_block<decltype(element)>(tile, block, block + 1 < block_end);
    }
  };
  switch (tile.cell->type) {
    case CacheType::float32: return run(FloatElement{});
    case CacheType::float16: return run(HalfElement{});
    case CacheType::bfloat16: return run(BrainElement{});
    case CacheType::int8: return run(ByteElement{});
  }
}

inline uint16_t to_brain(float x) {
  uint32_t value;
  std::memcpy(&value, &x, 4);
  return static_cast<uint16_t>((value + 0x7fff + ((value >> 16) & 1)) >> 16);
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
  } else if (type == CacheType::bfloat16) {
    for (int64_t i = 0; i < n; i++) write(i, to_brain(x[i]));
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

void store_key(const CellLayout &cell, uint8_t *data, int64_t slot, const float *key) {
  const float scale = encode(cell.type, key, cell.head_dim,
                             [&](int64_t i, auto element) { put(data, i * cell.key_stride + slot, element); });
  if (cell.type == CacheType::int8) put(data + cell.key_scale_offset, slot, scale);
}

void store_value(const CellLayout &cell, uint8_t *data, int64_t slot, const float *value) {
  const float scale = encode(cell.type, value, cell.head_dim, [&](int64_t i, auto element) {
    put(data + cell.value_offset, slot * cell.value_stride + i, element);
  });
  if (cell.type == CacheType::int8) put(data + cell.value_scale_offset, slot, scale);
}

}  // namespace
}  // namespace mnemos
