// The encoders of all types, for one instruction set.
#pragma once

#include "quantize/blocks.h"
#include "quantize/encode.h"
#include "quantize/superblocks.h"

namespace mnemos {
namespace {

bool encode_f16(const float *values, int64_t rows, int64_t columns, const float *, uint8_t *out) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < rows * columns; i++) {
    const uint16_t half = half_of(values[i]);
    std::memcpy(out + 2 * i, &half, 2);
    largest = std::max<uint32_t>(largest, half & 0x7fff);
  }
  return largest < 0x7c00;
}
bool encode_bf16(const float *values, int64_t rows, int64_t columns, const float *, uint8_t *out) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < rows * columns; i++) {
    uint32_t bits;
    std::memcpy(&bits, values + i, 4);
    const uint32_t up = bits + 0x7fff + (bits >> 16 & 1);
    const uint16_t half = static_cast<uint16_t>(up >> 16);
    std::memcpy(out + 2 * i, &half, 2);
    largest = std::max(largest, up & 0x7fffffff);
  }
  return largest < 0x7f800000;
}

constexpr EncodeKernels all_encoders() {
  return {encode_f16,  encode_bf16, encode_q4_0, encode_q4_1, encode_q5_0, encode_q5_1,   encode_q8_0,
          encode_q2_k, encode_q3_k, encode_q4_k, encode_q5_k, encode_q6_k, encode_iq4_nl, encode_iq4_xs};
}

}  // namespace
}  // namespace mnemos
