// Whether two sets of kernels multiply quantized weights to the same bits, and bfloat16 ones to the same sums.
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

// Both of these on some products of few blocks that take every kind of scales and bfloat16: a check that takes about a
// millisecond.
bool same_products(const ProductKernels &one, const ProductKernels &other);

}  // namespace mnemos
