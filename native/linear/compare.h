// Whether two sets of kernels multiply quantized weights to the same bits.
#pragma once

#include "linear/kernels.h"

namespace mnemos {

struct ProductShape {
  WeightType type;  // a quantized one
  bool precise;     // activations in two parts
  int64_t rows, columns, tokens;
  bool bias;
};

// On random weights and activations, the largest and smallest codes among them.
bool same_products(const Kernels &one, const Kernels &other, const ProductShape &shape);

// Some products of few blocks that take every kind of scales: a check that takes less than a millisecond.
bool same_products(const Kernels &one, const Kernels &other);

}  // namespace mnemos
