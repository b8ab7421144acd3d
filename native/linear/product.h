// All kernels of one vector policy; see tiles.h.
#pragma once

#include <cstring>

#include "linear/product_float.h"
#include "linear/product_quantized.h"

namespace mnemos {
namespace {

template <class S>
void multiply_all(const Matrix &matrix, const Input &input, int64_t row_begin, int64_t row_end, int64_t panel_begin,
                  int64_t panel_end, float *y, int64_t y_stride, const float *starts, int64_t start_stride) {
  auto floats = [&](auto multiply) {
    multiply(matrix, input, row_begin, row_end, panel_begin, panel_end, y, y_stride, starts, start_stride);
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
      multiply(matrix, input, row_begin, row_end, panel, {y, y_stride, starts, start_stride});
    });
  });
}

// Each block of 32 activations has the scale of its largest magnitude, and rounds to the nearest.
// A block of nothing but tiny values is zero, so that no inverse overflows.
constexpr float smallest_magnitude = 1e-30f;
template <int Parts>
constexpr float largest_quant = Parts == 1 ? 127 : 127 * 128;

template <class S, int Parts>
inline void quantize_block(const float *x, QuantBlock<Parts> &block) {
  const float largest = S::largest_magnitude(x);
  const bool tiny = !(largest > smallest_magnitude);
  block.scale = tiny ? 0 : largest / largest_quant<Parts>;
  S::template quantize<Parts>(x, tiny ? 0 : largest_quant<Parts> / largest, block.parts[0], block.counts);
  block.sum = block.scale * float(block.counts[0] + block.counts[1]);
}

// A policy may take up to so many blocks at once, in fours, with the same steps for each as above.
template <class S, int Parts>
void quantize_rows(const Input &input, const float *x, int64_t x_stride, int64_t row_begin, int64_t row_end,
                   int64_t block_begin, int64_t block_end) {
  constexpr int most = S::blocks_together;
  const float *sources[most];
  QuantBlock<Parts> *blocks[most];
  int count = 0;
  const int64_t row_blocks = input.padded / 32;
  QuantBlock<Parts> *const first = blocks_of<Parts>(input, 0);
  for (int64_t row = row_begin; row < row_end; row++) {
    const float *source = x + row * x_stride + block_begin * 32;
    QuantBlock<Parts> *block = first + row * row_blocks + block_begin;
    for (int64_t b = block_begin; b < block_end; b++, source += 32, block++) {
      if constexpr (most == 1) {
        quantize_block<S, Parts>(source, *block);
      } else {
        sources[count] = source, blocks[count] = block;
        if (++count < most) continue;
        S::template quantize_together<Parts>(sources, blocks, most);
        count = 0;
      }
    }
  }
  if constexpr (most > 1) {
    for (; count % 4 != 0; count++) sources[count] = sources[0], blocks[count] = blocks[0];  // one of them again
    S::template quantize_together<Parts>(sources, blocks, count);
  }
}

template <class S>
void prepare_all(const Input &input, const float *x, int64_t x_stride, int64_t row_begin, int64_t row_end,
                 int64_t column_begin, int64_t column_end) {
  if (input.form == Form::int8) {
    return quantize_rows<S, 1>(input, x, x_stride, row_begin, row_end, column_begin / 32, column_end / 32);
  }
  if (input.form == Form::int15) {
    return quantize_rows<S, 2>(input, x, x_stride, row_begin, row_end, column_begin / 32, column_end / 32);
  }
  const int64_t count = column_end - column_begin, zeros = column_end == input.columns ? input.padded - column_end : 0;
  for (int64_t row = row_begin; row < row_end; row++) {
    const float *source = x + row * x_stride + column_begin;
    const int64_t first = row * input.padded + column_begin;
    if (input.form == Form::f32) {
      memcpy(input.values + first, source, size_t(count) * sizeof(float));
      memset(input.values + first + count, 0, size_t(zeros) * sizeof(float));
    } else {
      uint16_t *halves = input.halves + first;
      for (int64_t c = 0; c < count; c++) halves[c] = float_to_bfloat(source[c]);
      memset(halves + count, 0, size_t(zeros) * sizeof(uint16_t));
    }
  }
}

template <class S>
constexpr Kernels kernels_of(const char *name) {
  return {name, S::bf16_form, prepare_all<S>, multiply_all<S>};
}

}  // namespace
}  // namespace mnemos
