// The matrix products with AMX where quantized weights are multiplied in bfloat16, too; see amx_blocks.h. Other weights
// are left to the AMX kernels.
#include "linear/amx_blocks.h"

namespace mnemos {
namespace {

void multiply_amxbf16(const Matrix &matrix, const Input &input, int64_t row_begin, int64_t row_end, int64_t panel_begin,
                      int64_t panel_end, float *y, int64_t y_stride, const float *starts, int64_t start_stride) {
  if (!matrix.layout.quantized())
    return amx_kernels.multiply(matrix, input, row_begin, row_end, panel_begin, panel_end, y, y_stride, starts,
                                start_stride);
  const Results results{y, y_stride, starts, start_stride};
  with_layout(matrix.layout.type, [&](auto q) {
    multiply_quantized_tiles<decltype(q)::layout>(matrix, input, row_begin, row_end, panel_begin, panel_end, results);
  });
}

void prepare_amxbf16(const Input &input, const float *x, int64_t x_stride, int64_t row_begin, int64_t row_end,
                     int64_t column_begin, int64_t column_end) {
  const auto prepare = input.form == Form::bf16_sums ? prepare_sums : amx_kernels.prepare;
  prepare(input, x, x_stride, row_begin, row_end, column_begin, column_end);
}

void lengths_amxbf16(const Matrix &matrix, int64_t panel_begin, int64_t panel_end, float *lengths) {
  amx_kernels.weight_lengths(matrix, panel_begin, panel_end, lengths);
}

int64_t multiply_in_tiles(Form form, int64_t rounds) { return amx_kernels.multiply_registers(form, rounds); }

}  // namespace

const ProductKernels amxbf16_kernels{"amx_bf16",       Form::bf16,      Form::bf16_sums,  prepare_amxbf16,
                                     multiply_amxbf16, lengths_amxbf16, multiply_in_tiles};

}  // namespace mnemos
