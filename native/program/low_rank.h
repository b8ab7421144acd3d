// Products with the two thin factors of low-rank adapters; see `Ops.add_low_rank` in ops/protocol.py.
#pragma once

#include <cstdint>
#include <vector>

namespace mnemos {

// What each adapter adds to one weight (rows, columns): b' (a x). An adapter of rank 0 adds nothing.
struct LowRank {
  struct Pair {
    int64_t rank = 0;
    std::vector<float> a;  // (rank, columns)
    std::vector<float> b;  // (rank, rows)
  };
  int64_t columns, rows;
  std::vector<Pair> pairs;  // by adapter
};

}  // namespace mnemos
