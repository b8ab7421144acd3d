// The matrix products are written once over a vector policy S; each instruction set's translation unit includes them.
// Here: how tiles cover panels and rows.
//
// S has `Bytes` (64 bytes), `Ints` (16 int32) and `Floats` (16 float32), one lane of four bytes for each row of a
// panel, and:
//   load, lookup, shift<count> (each byte left, or right if negative; a neighbour's bits may come in), bits<count,
//   mask> (which then masks), and the usual arithmetic; begin, dot and end<bits>: a sum of at most 32 products of codes
//   (of this many bits) and activations for each lane, four at a time, which starts from an integer. together<bits>: 2
//   where `dot_two` adds the products of two vectors of codes at once, else 1; stream_rows: up to how many rows are
//   multiplied by weights straight from their packed form, fine_rows at a time where activations have two parts;
//   split_rows: up to how many rows of a stream keep the sums of a block's halves apart (more have enough other sums);
//   rows_together: how many rows of a tile are multiplied before their sums are scaled;
//   bfloat_minima: two blocks' minima go through a bfloat16 dot product; adds_exponents: scales may be multiplied by
//   additions.
// Everything is in an anonymous namespace: the same template compiled for two instruction sets must not be merged.
#pragma once

#include <algorithm>
#include <type_traits>
#include <utility>

#include "linear/product_kernels.h"

namespace mnemos {
namespace {

// For the bodies of unrolled loops in a kernel. If GCC calls one instead, the sums that it captures stay in memory.
#define MNEMOS_INLINE __attribute__((always_inline))

template <class Body, int... I>
inline MNEMOS_INLINE void unroll(Body &&body, std::integer_sequence<int, I...>) {
  (body(std::integral_constant<int, I>{}), ...);
}
// body(0), ..., body(N - 1) with constants.
template <int N, class Body>
inline MNEMOS_INLINE void unroll(Body &&body) {
  unroll(body, std::make_integer_sequence<int, N>{});
}

constexpr int most_panels = 2;  // of a tile

constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// The functions that a matrix's product spends its time in: compiled once for all their callers. Inlined, they make
// functions of which each takes the compiler many seconds.
#define MNEMOS_KERNEL __attribute__((noinline))

// The places of a panel's blocks of 32 columns among a row's, counted from block `first`: all of them, or those listed.
struct Places {
  const int32_t *list;  // or null
  int64_t first;

  int64_t operator[](int64_t stored) const { return list == nullptr ? first + stored : list[first + stored]; }
  // How many blocks before number `end` are side by side, from number `stored` on.
  int64_t run(int64_t stored, int64_t end) const {
    if (list == nullptr) return end - stored;
    const int32_t *from = list + first + stored;
    int64_t count = 1;
    while (count < end - stored && from[count] == from[0] + count) count++;
    return count;
  }
};

// Where a kernel's results go: rows `stride` floats apart, one run of 16 floats a panel; and what they start from.
struct Output {
  float *rows[most_panels];
  int64_t stride[most_panels];
  const float *starts[most_panels];
  int64_t start_stride[most_panels];
};

// All the results of a call; a tile is a part of them.
struct Results {
  float *y;
  int64_t stride;
  const float *starts;  // or null
  int64_t start_stride;
};

alignas(64) constexpr float zeros[panel_rows] = {};

// How far ahead of a record its successor is prefetched.
constexpr int64_t prefetch_bytes = 8192;

// Results of the matrix's last panel if it is partly empty, or of a panel that is multiplied only to fill a tile:
// they are computed in a separate buffer.
struct Edge {
  alignas(64) float values[16][panel_rows];
};

// The fewest rows of a tile when at least `fewest` rows are cut into as few tiles as possible, of even sizes.
constexpr int least_rows(int fewest, int most) {
  int least = most;
  for (int rows = fewest; rows < fewest + most; rows++) {
    const int tiles = (rows + most - 1) / most;
    least = rows / tiles < least ? rows / tiles : least;
  }
  return least;
}

// Calls body(integral_constant R, row, output) for tiles of P panels that cover the rows, of which there are at least
// `Fewest`: as few tiles as possible, of even sizes. They start from the caller's values, or continue with what is
// there if columns have been multiplied before. Of the P panels only `panels` exist; results of a tile for others are
// dropped.
template <int P, int Fewest, int Most, class Body>
void for_tiles(const Matrix &matrix, int64_t panel, int64_t panels, int64_t row_begin, int64_t row_end,
               const Results &results, bool go_on, Body &&body) {
  constexpr int least = least_rows(Fewest, Most);
  const int64_t last = panels - 1;
  const int filled = int(smaller(matrix.rows - (panel + last) * panel_rows, panel_rows));
  Edge edge, dropped;
  for (int64_t row = row_begin; row < row_end;) {
    const int64_t tiles = (row_end - row + Most - 1) / Most, count = (row_end - row + tiles - 1) / tiles;
    Output out;
    for (int p = 0; p < P; p++) {
      if (p > last) {
        out.rows[p] = dropped.values[0], out.stride[p] = panel_rows;
        out.starts[p] = zeros, out.start_stride[p] = 0;
        continue;
      }
      const int64_t first = (panel + p) * panel_rows;
      out.rows[p] = results.y + row * results.stride + first;
      out.stride[p] = results.stride;
      out.starts[p] = go_on            ? out.rows[p]
                      : results.starts ? results.starts + row * results.start_stride + first
                                       : zeros;
      out.start_stride[p] = go_on ? results.stride : results.starts ? results.start_stride : 0;
    }
    float *target = out.rows[last];
    if (filled < panel_rows) {
      const float *starts = out.starts[last];
      for (int r = 0; r < count; r++, starts += out.start_stride[last])
        for (int i = 0; i < panel_rows; i++) edge.values[r][i] = i < filled ? starts[i] : 0;
      out.starts[last] = out.rows[last] = edge.values[0];
      out.start_stride[last] = out.stride[last] = panel_rows;
    }
    if (out.start_stride[0] > 0) {  // the next tile's starting values, while this one is multiplied
      for (int64_t r = count; r < smaller(2 * count, row_end - row); r++)
        for (int p = 0; p < P; p++) __builtin_prefetch(out.starts[p] + r * out.start_stride[p]);
    }
    unroll<Most - least + 1>([&](auto more) {
      if (count == least + more) body(std::integral_constant<int, least + more>{}, row, out);
    });
    if (filled < panel_rows)
      for (int r = 0; r < count; r++)
        for (int i = 0; i < filled; i++) target[r * results.stride + i] = edge.values[r][i];
    row += count;
  }
}

// Calls body(integral_constant panels, panel) for groups of `Most` panels, then for single ones.
template <int Most, class Body>
void for_panels(int64_t panel_begin, int64_t panel_end, Body &&body) {
  int64_t panel = panel_begin;
  for (; panel + Most <= panel_end; panel += Most) body(std::integral_constant<int, Most>{}, panel);
  for (; panel < panel_end; panel++) body(std::integral_constant<int, 1>{}, panel);
}

// The same for groups that store the same blocks of their columns, and so share what they read of the activations.
template <int Most, class Body>
void for_like_panels(const Matrix &matrix, int64_t panel_begin, int64_t panel_end, Body &&body) {
  static_assert(Most <= 2);
  if (Most == 1 || !matrix.skips_blocks()) return for_panels<Most>(panel_begin, panel_end, body);
  for (int64_t panel = panel_begin; panel < panel_end;) {
    const int64_t blocks = matrix.stored_blocks(panel);
    const int32_t *places = matrix.places(panel);
    const bool twins = panel + 1 < panel_end && matrix.stored_blocks(panel + 1) == blocks &&
                       std::equal(places, places + blocks, matrix.places(panel + 1));
    if (twins)
      body(std::integral_constant<int, Most>{}, panel);
    else
      body(std::integral_constant<int, 1>{}, panel);
    panel += twins ? 2 : 1;
  }
}

}  // namespace
}  // namespace mnemos
