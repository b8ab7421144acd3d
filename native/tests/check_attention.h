// Attention of one set of kernels over a bfloat16 cache: right, with the same bits for a row alone and among others,
// and unaffected by unwritten memory.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

#include "cache.h"
#include "linear/layout.h"

namespace mnemos {

struct AttentionCase {
  int64_t head_dim, group, begin, tokens, window;
};

class AttentionCheck {
 public:
  AttentionCheck(const VectorKernels &kernels, const AttentionCase &shape)
      : kernels_(kernels), shape_(shape), length_(shape.begin + shape.tokens),
        pages_((length_ + page_size - 1) / page_size),
        cache_(1, 1, shape.head_dim, page_size, CacheType::bfloat16, pages_), keys_(numbers(length_)),
        values_(numbers(length_)), queries_(numbers(shape.tokens * shape.group)) {
    for (int64_t p = 0; p < pages_; p++) table_.push_back(static_cast<int32_t>(pages_ - 1 - p));
    std::memset(cache_.page(0), 0xff, static_cast<size_t>(cache_.page_bytes() * pages_));  // no numbers
    for (int64_t t = 0; t < length_; t++) {
      uint8_t *cell = cache_.cells(0, 0) + table_[static_cast<size_t>(t / page_size)] * cache_.page_bytes();
      kernels.store_key(cache_.cell(), cell, t % page_size, &keys_[static_cast<size_t>(t * shape.head_dim)]);
      kernels.store_value(cache_.cell(), cell, t % page_size, &values_[static_cast<size_t>(t * shape.head_dim)]);
    }
  }

  // How many rows are wrong.
  int run() {
    const int64_t rows = shape_.tokens * shape_.group, stride = cache_.cell().value_stride;
    const std::vector<float> together = attend(0, rows);
    int wrong = 0;
    for (int64_t r = 0; r < rows; r++) {
      const std::vector<float> alone = attend(r, r + 1);
      const float *row = &together[static_cast<size_t>(r * stride)];
      const bool same = std::memcmp(alone.data(), row, static_cast<size_t>(shape_.head_dim) * sizeof(float)) == 0;
      wrong += !same || !is_right(r, row);
    }
    if (wrong > 0) {
      printf("head_dim %lld, %lld x %lld rows after %lld, window %lld: %d rows are wrong\n", (long long)shape_.head_dim,
             (long long)shape_.tokens, (long long)shape_.group, (long long)shape_.begin, (long long)shape_.window,
             wrong);
    }
    return wrong;
  }

 private:
  static constexpr int64_t page_size = 32;

  std::vector<float> numbers(int64_t rows) {  // of bfloat16, -2 to 2
    std::vector<float> values(static_cast<size_t>(rows * shape_.head_dim));
    for (float &value : values) {
      state_ = state_ * 1664525 + 1013904223;
      value = bfloat_to_float(
          float_to_bfloat(static_cast<float>(static_cast<int32_t>(state_ >> 8) - (1 << 23)) / (1 << 22)));
    }
    return values;
  }
  int64_t position_of(int64_t row) const { return shape_.begin + row / shape_.group; }
  int64_t first_of(int64_t row) const {
    return shape_.window > 0 ? std::max<int64_t>(0, position_of(row) - shape_.window + 1) : 0;
  }

  std::vector<float> attend(int64_t begin, int64_t end) {
    const CellLayout &cell = cache_.cell();
    const int64_t rows = end - begin, stride = cell.value_stride;
    const auto size = [](int64_t count) { return static_cast<size_t>(count); };
    std::vector<int64_t> first, last;
    std::vector<float> queries(size(rows * stride), NAN), scores(size(rows * score_stride), NAN),
        partial(size(rows * stride), NAN);
    std::vector<float> expanded(size(expanded_floats(cell) + rows * stride), NAN), result(size(rows * stride), NAN);
    std::vector<float> most(size(rows), -INFINITY), total(size(rows), 0);
    for (int64_t r = begin; r < end; r++) {
      first.push_back(first_of(r)), last.push_back(position_of(r));
      for (int64_t i = 0; i < shape_.head_dim; i++) {
        queries[size((r - begin) * stride + i)] = queries_[size(r * shape_.head_dim + i)] * scale();
      }
    }
    const std::vector<KeyBlock> blocks = key_blocks();
    AttentionTile tile{};
    tile.cell = &cell, tile.cells = cache_.cells(0, 0), tile.page_bytes = cache_.page_bytes(),
    tile.blocks = blocks.data();
    tile.rows = rows, tile.first = first.data(), tile.last = last.data();
    tile.queries = queries.data(), tile.scores = scores.data(), tile.partial = partial.data(),
    tile.expanded = expanded.data();
    tile.most = most.data(), tile.total = total.data(), tile.result = result.data();
    kernels_.attend(tile, first.front() / attention_block, last.back() / attention_block + 1);
    for (int64_t r = 0; r < rows; r++) {
      for (int64_t i = 0; i < stride; i++) result[size(r * stride + i)] /= total[size(r)];
    }
    return result;
  }
  std::vector<KeyBlock> key_blocks() const {
    std::vector<KeyBlock> blocks;
    for (int64_t start = 0; start < length_; start += attention_block) {
      const int64_t end = std::min(start + attention_block, pages_ * page_size);
      blocks.push_back({start, start, end - 1, &table_[static_cast<size_t>(start / page_size)]});
    }
    return blocks;
  }
  float scale() const { return 0.125f; }  // a power of two: scaled queries are bfloat16 too

  bool is_right(int64_t row, const float *result) const {
    const int64_t n = shape_.head_dim;
    std::vector<double> sums(static_cast<size_t>(n)), weights;
    double total = 0;
    for (int64_t t = first_of(row); t <= position_of(row); t++) {
      double score = 0;
      for (int64_t i = 0; i < n; i++) {
        score += double(queries_[static_cast<size_t>(row * n + i)]) * keys_[static_cast<size_t>(t * n + i)];
      }
      const double weight = std::exp(score * scale());
      total += weight;
      for (int64_t i = 0; i < n; i++) sums[static_cast<size_t>(i)] += weight * values_[static_cast<size_t>(t * n + i)];
    }
    for (int64_t i = 0; i < n; i++) {  // weights are rounded to 8 bits, values are 2 at most
      if (!(std::fabs(sums[static_cast<size_t>(i)] / total - result[i]) < 0x1p-8)) return false;
    }
    return true;
  }

  const VectorKernels &kernels_;
  const AttentionCase shape_;
  const int64_t length_, pages_;
  uint32_t state_ = 1;
  Cache cache_;
  std::vector<int32_t> table_;
  std::vector<float> keys_, values_, queries_;
};

// How many rows are wrong.
inline int check_attention(const VectorKernels &kernels) {
  // Whole and partly filled tiles of rows, key components, slots and columns; several blocks; windows.
  const AttentionCase cases[] = {{64, 3, 0, 42, 0},  {64, 3, 131, 1, 0}, {64, 1, 250, 17, 0}, {80, 2, 60, 20, 0},
                                 {16, 4, 5, 7, 0},   {96, 1, 0, 33, 0},  {128, 8, 300, 2, 0}, {64, 3, 150, 30, 40},
                                 {40, 2, 127, 3, 9}, {63, 1, 31, 18, 0}};
  int wrong = 0;
  for (const AttentionCase &shape : cases) wrong += AttentionCheck(kernels, shape).run();
  printf("attention: %d cases\n", static_cast<int>(std::end(cases) - std::begin(cases)));
  return wrong;
}

}  // namespace mnemos
