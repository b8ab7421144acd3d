// Weights into the block formats of GGUF, with the bytes of ggml's own quantizer.
#pragma once

#include <cstdint>

#include "linear/linear.h"
#include "system/pool.h"

namespace mnemos {

// Encodes a float32 matrix; `out` has rows * row_bytes(type, columns) bytes. `importance` has one non-negative weight a
// column for the squares of the errors, or is null: then they are weighed as ggml does. Returns the first row that the
// type cannot hold (an infinity or NaN, in the values or in a scale beyond float16), or -1. The bytes of such a row are
// undefined. Runs on the pool's threads; the bytes depend neither on their number nor on the instructions used.
int64_t encode_rows(WeightType type, const float *values, int64_t rows, int64_t columns, const float *importance,
                    uint8_t *out, Pool &pool);

// The encoders of one instruction set: each encodes some rows and tells whether all scales are finite.
struct EncodeKernels {
  using Encode = bool (*)(const float *values, int64_t rows, int64_t columns, const float *importance, uint8_t *out);
  Encode f16, bf16, q4_0, q4_1, q5_0, q5_1, q8_0, q2_k, q3_k, q4_k, q5_k, q6_k, iq4_nl, iq4_xs;
};

}  // namespace mnemos
