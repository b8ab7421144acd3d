// Products with weights in float32, float16 or bfloat16; see tiles.h.
#pragma once

#include "linear/tiles.h"

namespace mnemos {
namespace {

// Columns that the float products sum before adding to the total: short sums round less.
constexpr int64_t float_chunk = 256;

// Like prefetch_bytes, for float32: data that bypasses the caches waits in the first-level one, which is small.
constexpr int64_t float_prefetch_bytes = 4096;

// The even (0) or odd (1) one of two columns.
template <class S, WeightType W, int Which>
inline typename S::Floats load_column(const uint8_t *pair) {
  if constexpr (W == WeightType::f32)
    return S::load(reinterpret_cast<const float *>(pair + Which * 64));
  else if constexpr (W == WeightType::f16)
    return S::load_halves(pair + Which * 32);
  else
    return Which == 0 ? S::load_low_bfloats(pair) : S::load_high_bfloats(pair);
}

// Column c of P panels, or two of them, which the bfloat16 layout has side by side, by R rows; stored at `at`.
template <class S, WeightType W, int P, int R, int Count>
inline MNEMOS_INLINE void add_columns(const uint8_t *const *panels, int64_t at, const Input &input, int64_t row,
                                      int64_t c, typename S::Floats (&sums)[R][P]) {
  if constexpr (R <= 2 && Count == 2) {  // few rows: reading the weights dominates
    constexpr int bytes = W == WeightType::f32 ? 128 : 64;
    const bool passing = W == WeightType::f32 && input.passing;
    for (int p = 0; p < P; p++)
      for (int line = 0; line < bytes; line += 64) {
        const uint8_t *ahead = panels[p] + at + (W == WeightType::f32 ? float_prefetch_bytes : prefetch_bytes) + line;
        if (passing)
          __builtin_prefetch(ahead, 0, 0);
        else
          __builtin_prefetch(ahead);
      }
  }
  if constexpr (W == WeightType::bf16 && S::bf16_form == Form::bf16) {
    for (int r = 0; r < R; r++) {
      const auto x = S::broadcast_bfloats(input.halves + (row + r) * input.padded + c);
      for (int p = 0; p < P; p++) sums[r][p] = S::dot_bfloats(sums[r][p], S::load(panels[p] + at), x);
    }
  } else {
    unroll<Count>([&](auto which) MNEMOS_INLINE {
      typename S::Floats weights[P];
      for (int p = 0; p < P; p++) weights[p] = load_column<S, W, which>(panels[p] + at);
      for (int r = 0; r < R; r++) {
        const auto x = S::broadcast(input.values[(row + r) * input.padded + c + which]);
        for (int p = 0; p < P; p++) sums[r][p] = S::fma(weights[p], x, sums[r][p]);
      }
    });
  }
}

// The most rows of a tile: of one panel there are more, so that as many sums are independent of each other.
template <class S, int P>
constexpr int most_float_rows = 2 / P *S::float_rows;

// The float forms: these blocks of 32 columns (the row's last one may have fewer) of P panels by R rows, added to the
// output.
template <class S, WeightType W, int P, int R>
MNEMOS_KERNEL void float_tile(const uint8_t *const *panels, Places places, int64_t blocks, const Input &input,
                              int64_t row, const Output &out) {
  constexpr int column_bytes = W == WeightType::f32 ? 64 : 32;
  typename S::Floats sums[R][P];
  for (int r = 0; r < R; r++)
    for (int p = 0; p < P; p++) sums[r][p] = S::zero();
  int64_t at = 0, c = 0, end = 0;
  for (int64_t b = 0, run; b < blocks; b += run) {
    run = places.run(b, blocks);
    c = places[b] * 32, end = smaller(c + run * 32, input.columns);
    for (; c + 1 < end; c += 2, at += 2 * column_bytes) add_columns<S, W, P, R, 2>(panels, at, input, row, c, sums);
  }
  // The bfloat16 layout and input end with a zero.
  if (c < end) add_columns<S, W, P, R, 1>(panels, at, input, row, c, sums);
  for (int r = 0; r < R; r++)
    for (int p = 0; p < P; p++) {
      float *y = out.rows[p] + r * out.stride[p];
      S::store(y, S::add(S::load(out.starts[p] + r * out.start_stride[p]), sums[r][p]));
    }
}

// P panels that store the same blocks.
template <class S, WeightType W, int P>
void multiply_float(const Matrix &matrix, const Input &input, int64_t row_begin, int64_t row_end, int64_t panel,
                    const Results &results) {
  constexpr int64_t block_bytes = W == WeightType::f32 ? 2048 : 1024, chunk = float_chunk / 32;
  Places places{matrix.places(panel), 0};
  const int64_t blocks = matrix.skips_blocks() ? matrix.stored_blocks(panel) : (matrix.columns + 31) / 32;
  while (places.first < blocks) {
    const int64_t first = places.first, limit = (places[0] / chunk + 1) * chunk;
    int64_t count = 1;
    while (first + count < blocks && places[count] < limit) count++;
    const uint8_t *panels[P];
    for (int p = 0; p < P; p++) panels[p] = matrix.panel(panel + p) + first * block_bytes;
    for_tiles<P, 1, most_float_rows<S, P>>(matrix, panel, P, row_begin, row_end, results, first > 0,
                                           [&](auto r, int64_t row, const Output &out) {
                                             float_tile<S, W, P, r>(panels, places, count, input, row, out);
                                           });
    places.first += count;
  }
}

template <class S, WeightType W>
void multiply_floats(const Matrix &matrix, const Input &input, int64_t row_begin, int64_t row_end, int64_t panel_begin,
                     int64_t panel_end, const Results &results) {
  const auto multiply = [&](auto panels, int64_t panel) {
    multiply_float<S, W, panels>(matrix, input, row_begin, row_end, panel, results);
  };
  // Few rows: memory is read faster from one place at a time than from two alternately.
  if (W == WeightType::f32 && row_end - row_begin <= 2)
    for_panels<1>(panel_begin, panel_end, multiply);
  else
    for_like_panels<2>(matrix, panel_begin, panel_end, multiply);
}

}  // namespace
}  // namespace mnemos
