// Products with matrices that store some of their blocks only: panel by panel, as each has blocks of its own. What is
// computed for an output, and in which order, is what the products of whole matrices do, without the steps that add
// zero.
#pragma once

#include "linear/product_float.h"
#include "linear/product_quantized.h"

namespace mnemos {
namespace {

// These blocks of P panels by R rows, added to the output; all are within float_chunk columns.
template <class S, WeightType W, int P, int R>
void kept_float_tile(const uint8_t *const *panels, const int32_t *places, int64_t blocks, const Input &input,
                     int64_t row, const Output &out) {
  constexpr int column_bytes = W == WeightType::f32 ? 64 : 32;
  typename S::Floats sums[R][P];
  for (int r = 0; r < R; r++)
    for (int p = 0; p < P; p++) sums[r][p] = S::zero();
  for (int64_t b = 0, at = 0; b < blocks; b++)
    for (int64_t c = places[b] * 32, end = c + 32; c < end; c += 2, at += 2 * column_bytes)
      add_columns<S, W, P, R, 2>(panels, at, input, row, c, sums);
  for (int r = 0; r < R; r++)
    for (int p = 0; p < P; p++)
      S::store(out.rows[p] + r * out.stride[p], S::add(S::load(out.starts[p] + r * out.start_stride[p]), sums[r][p]));
}

// P panels that store the same blocks.
template <class S, WeightType W, int P>
void multiply_kept_floats(const Matrix &matrix, const Input &input, int64_t row_begin, int64_t row_end, int64_t panel,
                          const Results &results) {
  constexpr int block_bytes = W == WeightType::f32 ? 2048 : 1024, chunk = float_chunk / 32;
  const int32_t *places = matrix.places(panel);
  const int64_t blocks = matrix.stored_blocks(panel);
  for (int64_t first = 0, end; first < blocks; first = end) {
    const int32_t limit = (places[first] / chunk + 1) * chunk;
    for (end = first + 1; end < blocks && places[end] < limit;) end++;
    const uint8_t *weights[P];
    for (int p = 0; p < P; p++) weights[p] = matrix.panel(panel + p) + first * block_bytes;
    for_tiles<P, 1, 2 / P * S::float_rows>(
        matrix, panel, P, row_begin, row_end, results, first > 0, [&](auto r, int64_t row, const Output &out) {
          kept_float_tile<S, W, P, r>(weights, places + first, end - first, input, row, out);
        });
  }
}

template <class S, const Layout &L, int Parts>
void multiply_kept_quantized(const Matrix &matrix, const Input &input, int64_t row_begin, int64_t row_end,
                             int64_t panel, const Results &results) {
  const SomePlaces places{matrix.places(panel)};
  if (row_end - row_begin <= S::stream_rows)
    return for_tiles < 1, 1,
           Parts == 1 ? S::stream_rows
                      : S::fine_rows > (matrix, panel, 1, row_begin, row_end, results, false,
                                        [&](auto r, int64_t row, const Output &out) {
                                          stream<S, L, Parts, r>(matrix.panel(panel), matrix.stored_blocks(panel),
                                                                 places, input, row, out);
                                        });
  for_chunks<S, L, Parts, 1, S::stream_rows + 1, S::tile_panels * S::tile_rows, InVectors<S>>(
      matrix, input, row_begin, row_end, panel, 1, results,
      [&](auto r, const Expanded &weights, int64_t row, int64_t first, int64_t count, const Output &out,
          Prefetch &prefetch) {
        constexpr const Layout &layout = same_arithmetic<L>();
        const SomePlaces own{places.places + first};
        if constexpr (S::adds_exponents) {
          if (weights.ordinary && tile<S, layout, Parts, 1, r, true>(weights, input, row, 0, count, own, out, prefetch))
            return;
        }
        tile<S, layout, Parts, 1, r, false>(weights, input, row, 0, count, own, out, prefetch);
      });
}

// Calls body(Quantized<layout>) for the quantized types that can skip blocks.
template <class Body>
void with_kept_layout(WeightType type, Body &&body) {
  if (type == WeightType::q4_1) return body(Quantized<layouts::q4_1>{});
  if (type == WeightType::q5_1) return body(Quantized<layouts::q5_1>{});
  if (type == WeightType::q8_0) return body(Quantized<layouts::q8_0>{});
}

template <class S, WeightType W>
void multiply_all_kept_floats(const Matrix &matrix, const Input &input, int64_t row_begin, int64_t row_end,
                              int64_t panel_begin, int64_t panel_end, const Results &results) {
  const auto multiply = [&](auto panels, int64_t panel) {
    multiply_kept_floats<S, W, panels>(matrix, input, row_begin, row_end, panel, results);
  };
  if (row_end - row_begin > 2) return for_kept_panels(matrix, panel_begin, panel_end, multiply);
  for_panels<1>(panel_begin, panel_end, multiply);  // see multiply_floats
}

template <class S>
void multiply_kept(const Matrix &matrix, const Input &input, int64_t row_begin, int64_t row_end, int64_t panel_begin,
                   int64_t panel_end, const Results &results) {
  if (matrix.layout.type == WeightType::f32)
    return multiply_all_kept_floats<S, WeightType::f32>(matrix, input, row_begin, row_end, panel_begin, panel_end,
                                                        results);
  if (matrix.layout.type == WeightType::bf16)
    return multiply_all_kept_floats<S, WeightType::bf16>(matrix, input, row_begin, row_end, panel_begin, panel_end,
                                                         results);
  with_kept_layout(matrix.layout.type, [&](auto q) {
    constexpr const Layout &layout = decltype(q)::layout;
    const auto multiply =
        input.form == Form::int15 ? multiply_kept_quantized<S, layout, 2> : multiply_kept_quantized<S, layout, 1>;
    for (int64_t panel = panel_begin; panel < panel_end; panel++)
      multiply(matrix, input, row_begin, row_end, panel, results);
  });
}

}  // namespace
}  // namespace mnemos
