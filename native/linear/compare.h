// Whether two sets of kernels multiply quantized weights to the same bits or nearly so, and bfloat16 ones to the same
// sums.
#pragma once

#include "linear/product_kernels.h"

namespace mnemos {

struct ProductShape {
  WeightType type;  // a quantized one or bf16
  bool precise;  // activations in two parts
  int64_t rows, columns, tokens;
  bool bias;
};

// On random weights and activations, the largest and smallest codes among them. Those of bfloat16 products, whose sums
// may differ in order, are small whole numbers: every order gives the same bits.
bool same_products(const ProductKernels &one, const ProductKernels &other, const ProductShape &shape);

// Whether each row has the same bits alone and among all others.
bool same_alone(const ProductKernels &kernels, const ProductShape &shape);

// Whether products of quantized weights differ by no more than roundings of weights and activations to 8 bits: no
// result by a twentieth of their root mean square, all together by a hundredth.
bool near_products(const ProductKernels &one, const ProductKernels &other, const ProductShape &shape);

// The same bits on some products of few blocks that take every kind of scales, and for bfloat16 the same sums and rows
// alone: a check that takes about a millisecond.
bool same_products(const ProductKernels &one, const ProductKernels &other);

// Such a check of kernels that multiply quantized weights in bfloat16: near others, and the same for rows alone.
bool right_products(const ProductKernels &kernels, const ProductKernels &other);

}  // namespace mnemos
