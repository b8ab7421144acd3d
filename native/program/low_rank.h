// Products with the two thin factors of low-rank adapters; see `Ops.add_low_rank` in ops/protocol.py.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "linear/linear.h"

namespace mnemos {

// What each adapter adds to one weight (rows, columns): scale * b (a x). An adapter of rank 0 adds nothing.
struct LowRank {
  struct Pair {
    int64_t rank = 0;
    float scale = 1;
    std::vector<uint8_t> a, b;  // (rank, columns) and (rows, rank) of the type, until they are packed
    std::vector<std::unique_ptr<Matrix>> down;  // a, in pieces of its columns
    std::unique_ptr<Matrix> up;  // b
  };
  // type: of the factors, f32 or f16
  LowRank(int64_t columns, int64_t rows, WeightType type, const ProductKernels &kernels)
      : columns(columns), rows(rows), type(type), kernels(kernels) {}
  LowRank(const LowRank &) = delete;
  LowRank &operator=(const LowRank &) = delete;

  const int64_t columns, rows;
  const WeightType type;
  const ProductKernels &kernels;
  std::vector<Pair> pairs;  // by adapter

  // Pieces have a multiple of 256 columns, and there are at most 8: enough work to share out, few sums to add up.
  int64_t piece_columns() const { return (columns + 8 * 256 - 1) / (8 * 256) * 256; }
  int64_t pieces() const { return (columns + piece_columns() - 1) / piece_columns(); }
  int64_t largest_rank() const {
    int64_t largest = 0;
    for (const Pair &pair : pairs) largest = std::max(largest, pair.rank);
    return largest;
  }
};

// Packs the factors that have not been packed before, all in one piece of memory. Throws std::bad_alloc.
void pack_factors(const std::vector<std::shared_ptr<LowRank>> &weights);

}  // namespace mnemos
