// Times kernels on a little typical work, which tells the levels of a machine apart in milliseconds.
#pragma once

#include "linear/linear.h"
#include "vector/vector_kernels.h"

namespace mnemos {

// Seconds of one thread on data in its caches: the geometric mean of products of one row and of many with some
// storage types, quantized ones or floats. The median of a few runs each.
double time_products(const ProductKernels &kernels, bool quantized);

// The same for attention of one token and of many after a few hundred positions, over a cache in bfloat16 or in
// float16.
double time_attention(const VectorKernels &kernels, bool bfloats);

}  // namespace mnemos
