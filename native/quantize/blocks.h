// The types of 32 weights a block. Layouts are those of ggml's ggml-common.h (src/mnemos/formats/quants.py reads them).
#pragma once

#include <algorithm>
#include <vector>

#include "quantize/fits.h"
#include "quantize/weighing.h"

namespace mnemos {
namespace {

// Sixteen blocks at a time: `fit(x, w, q, scale, minimum)` finds their codes, `pack(codes, block)` stores the bits of one
// after its scale (and minimum, if the type has one). With importance, w is that times the root of the weight's and the
// row's mean square; without, it is not set.
template <int bytes, bool minima, typename Fit, typename Pack>
inline bool encode_blocks(const float *values, int64_t rows, int64_t columns, const float *importance, uint8_t *out,
                          const Fit &fit, const Pack &pack) {
  const int64_t blocks = rows * columns / 32;
  std::vector<float> spread(importance ? static_cast<size_t>(rows) : 0);
  if (importance) {
    sum_squares(values, columns, rows, spread.data());
    for (float &s : spread) s /= static_cast<float>(columns);
  }
  bool finite = true;
  alignas(64) uint8_t codes[32 * lanes];
  alignas(64) float scale[lanes], minimum[lanes], of_row[lanes];
  for (int64_t first = 0; first < blocks; first += lanes) {
    const int count = static_cast<int>(std::min<int64_t>(lanes, blocks - first));
    Floats x[32], w[32], q[32], scales, minima_found = {};
    load_groups(values + first * 32, count, x);
    if (importance) {
      load_columns(importance, first * 32 % columns, columns, w);
      for (int l = 0; l < lanes; l++) {
        of_row[l] = spread[static_cast<size_t>(std::min(rows - 1, (first + l) * 32 / columns))];
      }
      weigh(x, load(of_row), w);
    }
    fit(x, w, q, scales, minima_found);
    store_codes(q, codes);
    store(scales, scale);
    store(minima_found, minimum);
    for (int l = 0; l < count; l++) {
      uint8_t *block = out + (first + l) * bytes;
      finite &= store_half(block, scale[l]);
      if (minima) finite &= store_half(block + 2, minimum[l]);
      pack(codes + 32 * l, block + (minima ? 4 : 2));
    }
  }
  return finite;
}

inline void pack_nibbles(const uint8_t *codes, uint8_t *out) {
  for (int i = 0; i < 16; i++) out[i] = static_cast<uint8_t>(codes[i] | codes[i + 16] << 4);
}
inline void pack_five_bits(const uint8_t *codes, uint8_t *out) {
  uint32_t high = 0;
  for (int i = 0; i < 32; i++) high |= static_cast<uint32_t>(codes[i] >> 4 & 1) << i;
  std::memcpy(out, &high, 4);
  for (int i = 0; i < 16; i++) out[4 + i] = static_cast<uint8_t>((codes[i] & 15) | codes[i + 16] << 4);
}

template <int levels, int bytes, typename Pack>
bool encode_symmetric(const float *values, int64_t rows, int64_t columns, const float *importance, uint8_t *out,
                      const Pack &pack) {
  const auto fit = [&](const Floats (&x)[32], const Floats (&w)[32], Floats (&q)[32], Floats &scale, Floats &) {
    if (importance) {
      const Symmetric found = fit_symmetric(x, w, levels);
      scale = found.scale;
      found.codes(x, levels, q);
      return;
    }
    scale = largest_of(x) / static_cast<float>(-levels);
    const Floats inverse = inverse_of(scale);
    for (int i = 0; i < 32; i++) {
      const Floats shifted = x[i] * inverse + (levels + 0.5f);
      q[i] = select(shifted > 2 * levels - 1.f, all(2 * levels - 1.f), shifted);  // what follows the point is cut off
    }
  };
  return encode_blocks<bytes, false>(values, rows, columns, importance, out, fit, pack);
}

template <int levels, int bytes, typename Pack>
bool encode_affine(const float *values, int64_t rows, int64_t columns, const float *importance, uint8_t *out,
                   const Pack &pack) {
  const auto fit = [&](const Floats (&x)[32], const Floats (&w)[32], Floats (&q)[32], Floats &scale, Floats &minimum) {
    if (importance) {
      const Affine found = fit_affine(x, w, levels, {-0.9f, 0.05f, 36, false});
      scale = found.scale;
      minimum = -found.minimum;
      found.codes(x, levels, q);
      return;
    }
    Floats low = x[0], high = x[0];
    for (int i = 1; i < 32; i++) {
      low = select(x[i] < low, x[i], low);
      high = select(x[i] > high, x[i], high);
    }
    scale = (high - low) / static_cast<float>(levels);
    minimum = low;
    const Floats inverse = inverse_of(scale);
    for (int i = 0; i < 32; i++) q[i] = clamp((x[i] - low) * inverse + 0.5f, 0, levels);
  };
  return encode_blocks<bytes, true>(values, rows, columns, importance, out, fit, pack);
}

bool encode_q4_0(const float *values, int64_t rows, int64_t columns, const float *importance, uint8_t *out) {
  return encode_symmetric<8, 18>(values, rows, columns, importance, out, pack_nibbles);
}
bool encode_q5_0(const float *values, int64_t rows, int64_t columns, const float *importance, uint8_t *out) {
  return encode_symmetric<16, 22>(values, rows, columns, importance, out, pack_five_bits);
}
bool encode_q4_1(const float *values, int64_t rows, int64_t columns, const float *importance, uint8_t *out) {
  return encode_affine<15, 20>(values, rows, columns, importance, out, pack_nibbles);
}
bool encode_q5_1(const float *values, int64_t rows, int64_t columns, const float *importance, uint8_t *out) {
  return encode_affine<31, 24>(values, rows, columns, importance, out, pack_five_bits);
}
bool encode_q8_0(const float *values, int64_t rows, int64_t columns, const float *, uint8_t *out) {
  const auto fit = [](const Floats (&x)[32], const Floats (&)[32], Floats (&q)[32], Floats &scale, Floats &) {
    scale = magnitude(largest_of(x)) / 127.f;
    const Floats inverse = inverse_of(scale);
    for (int i = 0; i < 32; i++) q[i] = clamp(rounded(x[i] * inverse), -127, 127);
  };
  const auto pack = [](const uint8_t *codes, uint8_t *block) { std::memcpy(block, codes, 32); };
  return encode_blocks<34, false>(values, rows, columns, nullptr, out, fit, pack);
}
bool encode_iq4_nl(const float *values, int64_t rows, int64_t columns, const float *importance, uint8_t *out) {
  const int64_t blocks = rows * columns / 32;
  alignas(64) uint8_t codes[32 * lanes];
  alignas(64) float scale[lanes];
  bool finite = true;
  for (int64_t first = 0; first < blocks; first += lanes) {
    const int count = static_cast<int>(std::min<int64_t>(lanes, blocks - first));
    Floats x[32], w[32], q[32];
    load_groups(values + first * 32, count, x);
    weigh_by_squares(x, w);
    if (importance) {
      const Floats spread = sum_of(w) * (2.f / 32);
      load_columns(importance, first * 32 % columns, columns, w);
      weigh(x, spread, w);
    }
    const Floats scales = fit_iq4(x, w), inverse = inverse_of(scales);
    for (int i = 0; i < 32; i++) q[i] = nearest_iq4_code(inverse * x[i]);
    store_codes(q, codes);
    store(scales, scale);
    for (int l = 0; l < count; l++) {
      uint8_t *block = out + (first + l) * 18;
      finite &= store_half(block, scale[l]);
      pack_nibbles(codes + 32 * l, block + 2);
    }
  }
  return finite;
}

}  // namespace
}  // namespace mnemos
