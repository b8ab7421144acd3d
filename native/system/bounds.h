// What bounds a step on this machine: how fast memory is read, and how fast its units multiply.
#pragma once

#include <cstdint>

#include "linear/linear.h"
#include "system/pool.h"

namespace mnemos {

// Bytes a second that all threads of the pool together read in sequence from `bytes` bytes: the best of `repeats`
// times.
double read_bandwidth(Pool &pool, int64_t bytes, int repeats);

// Multiply-adds a second that all threads of the pool reach together with products of this form, if these wait for
// nothing: the best of `repeats` times.
double multiply_rate(Pool &pool, const ProductKernels &kernels, Form form, int repeats);

}  // namespace mnemos
