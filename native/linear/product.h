// All kernels of one vector policy; see tiles.h.
#pragma once

#include "linear/product_float.h"
#include "linear/product_quantized.h"

namespace mnemos {
namespace {

template <class S>
void multiply_all(const Matrix &matrix, const Input &input, int64_t row_begin, int64_t row_end, int64_t panel_begin,
                  int64_t panel_end, float *y, int64_t y_stride, const float *bias) {
  auto floats = [&](auto multiply) {
    multiply(matrix, input, row_begin, row_end, panel_begin, panel_end, y, y_stride, bias);
  };
  switch (matrix.layout.type) {
    case WeightType::f32: return floats(multiply_floats<S, WeightType::f32>);
    case WeightType::f16: return floats(multiply_floats<S, WeightType::f16>);
    case WeightType::bf16: return floats(multiply_floats<S, WeightType::bf16>);
    default: break;
  }
  for_panels<S::tile_panels>(panel_begin, panel_end, [&](auto panels, int64_t panel) {
    with_layout(matrix.layout.type, [&](auto q) {
      constexpr const Layout &layout = decltype(q)::layout;
      const auto multiply = input.form == Form::int15 ? multiply_quantized<S, layout, 2, panels>
                                                      : multiply_quantized<S, layout, 1, panels>;
      multiply(matrix, input, row_begin, row_end, panel, {y, y_stride, bias});
    });
  });
}


// Each block of 32 activations has the scale of its largest magnitude, and rounds to the nearest.
// A block of nothing but tiny values is zero, so that no inverse overflows.
constexpr float smallest_magnitude = 1e-30f;

template <class S, int Parts>
inline void quantize_block(const float *x, QuantBlock<Parts> &block) {
  constexpr float most = Parts == 1 ? 127 : 127 * 128;
  const float largest = S::largest_magnitude(x);
  const bool tiny = !(largest > smallest_magnitude);
  block.scale = tiny ? 0 : largest / most;
  S::template quantize<Parts>(x, tiny ? 0 : most / largest, block.parts[0], block.counts);
  block.sum = block.scale * float(block.counts[0] + block.counts[1]);
}

template <class S, int Parts>
void quantize_row(const float *x, int64_t blocks, QuantBlock<Parts> *out) {
  for (int64_t b = 0; b < blocks; b++) quantize_block<S, Parts>(x + b * 32, out[b]);
}

template <class S>
void prepare_all(const Input &input, const float *x, int64_t x_stride, int64_t row_begin, int64_t row_end) {
  const int64_t columns = input.columns, padded = input.padded;
  for (int64_t row = row_begin; row < row_end; row++) {
    const float *source = x + row * x_stride;
    if (input.form == Form::f32) {
      float *values = input.values + row * padded;
      for (int64_t c = 0; c < padded; c++) values[c] = c < columns ? source[c] : 0;
    } else if (input.form == Form::bf16) {
      uint16_t *halves = input.halves + row * padded;
      for (int64_t c = 0; c < padded; c++) halves[c] = c < columns ? float_to_bfloat(source[c]) : 0;
    } else {
      const int64_t blocks = padded / 32;
      if (input.form == Form::int8) quantize_row<S, 1>(source, blocks, blocks_of<1>(input, row));
      else quantize_row<S, 2>(source, blocks, blocks_of<2>(input, row));
    }
  }
}

template <class S>
constexpr Kernels kernels_of(const char *name) {
  return {name, S::bf16_form, prepare_all<S>, multiply_all<S>};
}

}  // namespace
}  // namespace mnemos
