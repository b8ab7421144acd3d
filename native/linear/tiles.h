// The matrix products are written once over a vector policy S; each instruction set's translation unit includes them.
// Here: how tiles cover panels and rows.
//
// S has `Bytes` (64 bytes), `Ints` (16 int32) and `Floats` (16 float32), one lane of four bytes for each row of a panel, and:
//   load, lookup, bits<shift, mask> (shifts each byte left, or right if negative, then masks), and the usual arithmetic;
//   begin, dot and end<bits>: a sum of at most 32 products of codes (of so many bits) and activations for each lane,
//   four at a time, which starts from an integer.
// Everything is in an anonymous namespace: the same template compiled for two instruction sets must not be merged.
#pragma once

#include <type_traits>
#include <utility>

#include "linear/kernels.h"

namespace mnemos {
namespace {

template <class Body, int... I>
inline __attribute__((always_inline)) void unroll(Body &&body, std::integer_sequence<int, I...>) {
  (body(std::integral_constant<int, I>{}), ...);
}
// body(0), ..., body(N - 1) with constants.
template <int N, class Body>
inline __attribute__((always_inline)) void unroll(Body &&body) {
  unroll(body, std::make_integer_sequence<int, N>{});
}

constexpr int most_panels = 2;  // of a tile

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Where a kernel's results go: rows `stride` floats apart, one run of 16 floats a panel.
struct Output {
  float *rows[most_panels];
  int64_t stride[most_panels];
};

// How far ahead of a record its successor is asked for from memory.
constexpr int64_t prefetch_bytes = 4096;

// Results of the matrix's last panel where it is partly empty: they are made in a buffer of their own.
struct Edge {
  alignas(64) float values[16][panel_rows];
};

// Calls body(integral_constant P, integral_constant R, row, output) for tiles that cover the rows; the panels have started.
template <int P, int Most, class Body>
void for_tiles(const Matrix &matrix, int64_t panel, int64_t row_begin, int64_t row_end, float *y, int64_t y_stride,
               Body &&body) {
  const int64_t last_rows = matrix.rows - (panel + P - 1) * panel_rows;
  const int filled = int(smaller(last_rows, panel_rows));
  Edge edge;
  for (int64_t row = row_begin; row < row_end;) {
    const int64_t count = smaller(row_end - row, Most);
    Output out;
    for (int p = 0; p < P; p++) {
      out.rows[p] = y + row * y_stride + (panel + p) * panel_rows;
      out.stride[p] = y_stride;
    }
    float *target = out.rows[P - 1];
    if (filled < panel_rows) {
      for (int r = 0; r < count; r++)
        for (int i = 0; i < panel_rows; i++) edge.values[r][i] = i < filled ? target[r * y_stride + i] : 0;
      out.rows[P - 1] = edge.values[0];
      out.stride[P - 1] = panel_rows;
    }
    unroll<Most>([&](auto less) {
      if (count == less + 1) body(std::integral_constant<int, less + 1>{}, row, out);
    });
    if (filled < panel_rows)
      for (int r = 0; r < count; r++)
        for (int i = 0; i < filled; i++) target[r * y_stride + i] = edge.values[r][i];
    row += count;
  }
}

// y = bias or 0, which the chunks are then added to.
inline void start_rows(const Matrix &matrix, int64_t panel, int panels, int64_t row_begin, int64_t row_end, float *y,
                       int64_t y_stride, const float *bias) {
  const int64_t first = panel * panel_rows, last = smaller(matrix.rows, first + panels * panel_rows);
  for (int64_t row = row_begin; row < row_end; row++)
    for (int64_t i = first; i < last; i++) y[row * y_stride + i] = bias ? bias[i] : 0;
}

// Calls body(integral_constant panels, panel) for groups of `Most` panels, then for single ones.
template <int Most, class Body>
void for_panels(int64_t panel_begin, int64_t panel_end, Body &&body) {
  int64_t panel = panel_begin;
  for (; panel + Most <= panel_end; panel += Most) body(std::integral_constant<int, Most>{}, panel);
  for (; panel < panel_end; panel++) body(std::integral_constant<int, 1>{}, panel);
}

}  // namespace
}  // namespace mnemos
