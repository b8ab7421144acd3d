// What one instruction set's translation unit offers.
#pragma once

#include "linear/layout.h"

namespace mnemos {

struct ProductKernels {
  const char *name;
  Form bf16_form;  // the input of a bfloat16 matrix: bf16 if there is a bfloat16 dot product, else f32
  Form quantized_form;  // the coarsest input of a quantized matrix: int8 or bf16_sums
  void (*prepare)(const Input &input, const float *x, int64_t x_stride, int64_t row_begin, int64_t row_end,
                  int64_t column_begin, int64_t column_end);
  void (*multiply)(const Matrix &matrix, const Input &input, int64_t row_begin, int64_t row_end, int64_t panel_begin,
                   int64_t panel_end, float *y, int64_t y_stride, const float *starts, int64_t start_stride);
  void (*weight_lengths)(const Matrix &matrix, int64_t panel_begin, int64_t panel_end, float *lengths);
  int64_t (*multiply_registers)(Form form, int64_t rounds);
};

extern const ProductKernels scalar_kernels;
#if defined(__x86_64__)
extern const ProductKernels avx2_kernels, avxvnni_kernels, avx512_kernels, avx512bf16_kernels, amx_kernels,
    amxbf16_kernels;
#elif defined(__aarch64__)
extern const ProductKernels neon_kernels, neoni8mm_kernels;
#endif

}  // namespace mnemos
