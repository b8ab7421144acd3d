// The limits of a step on this machine: how fast memory is read, and how fast its units multiply.
#pragma once

#include <cstdint>

#include "linear/linear.h"
#include "system/pool.h"

namespace mnemos {

// Bytes per second that all threads of the pool together read sequentially from `bytes` bytes: the best of `repeats`
// times.
double read_bandwidth(Pool &pool, int64_t bytes, int repeats);

// Multiply-adds per second that all threads of the pool together reach with products of this form that wait for
// nothing: the best of `repeats` times.
double multiply_rate(Pool &pool, const ProductKernels &kernels, Form form, int repeats);

}  // namespace mnemos
