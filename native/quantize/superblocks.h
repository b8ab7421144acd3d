// The types of 256 weights a block. Layouts are those of ggml's ggml-common.h (src/mnemos/formats/quants.py reads them).
#pragma once

#include <algorithm>
#include <vector>

#include "quantize/blocks.h"
#include "quantize/fits.h"
#include "quantize/weighing.h"

namespace mnemos {
namespace {

// Sixteen groups of n weights: one superblock with groups of 16, two with groups of 32. `encode(x, w, spread, out)`
// stores them; w is the importance, or null; spread is the mean square of each group's superblock.
template <int n, int bytes, typename Encode>
inline bool encode_superblocks(const float *values, int64_t rows, int64_t columns, const float *importance, uint8_t *out,
                               const Encode &encode) {
  constexpr int together = n * lanes / 256;
  const int64_t blocks = rows * columns / 256;
  bool finite = true;
  std::vector<float> squares(static_cast<size_t>(blocks));
  sum_squares(values, 256, blocks, squares.data());
  alignas(64) float of_block[lanes];
  for (int64_t first = 0; first < blocks; first += together) {
    const int count = static_cast<int>(std::min<int64_t>(together, blocks - first));
    Floats x[n], w[n];
    load_groups(values + first * 256, count * 256 / n, x);
    if (importance) load_columns(importance, first * 256 % columns, columns, w);
    for (int l = 0; l < lanes; l++) of_block[l] = squares[static_cast<size_t>(first + std::min(l * n / 256, count - 1))];
    finite &= encode(x, w, load(of_block), count, out + first * bytes);
  }
  return finite;
}

// Four codes of 2 bits a byte, in runs of 32 of each 128.
inline void pack_two_bits(const uint8_t *codes, uint8_t *out) {
  for (int j = 0; j < 256; j += 128) {
    for (int i = 0; i < 32; i++) {
      const uint8_t *c = codes + j + i;
      out[j / 4 + i] = static_cast<uint8_t>((c[0] & 3) | (c[32] & 3) << 2 | (c[64] & 3) << 4 | (c[96] & 3) << 6);
    }
  }
}

bool encode_q2_k(const float *values, int64_t rows, int64_t columns, const float *importance, uint8_t *out) {
  const auto encode = [&](const Floats (&x)[16], Floats (&w)[16], Floats squares, int, uint8_t *block) {
    alignas(64) float scale[16], minimum[16], weight[16];
    alignas(64) uint8_t scales[16] = {}, minima[16] = {}, codes[256];
    Affine found;
    float unit = 0, minimum_unit = 0;
    if (importance) {
      weigh(x, squares / 256.f, w);
      found = fit_affine(x, w, 3, {-0.9f, 0.05f, 36, false});
      store(found.scale, scale);
      store(found.minimum, minimum);
      store(sum_of(w), weight);
      unit = fit_unit<16>(scale, weight, 15, scales);
      minimum_unit = fit_unit<16>(minimum, weight, 15, minima);
    } else {
      for (int i = 0; i < 16; i++) w[i] = magnitude(x[i]);
      found = fit_affine(x, w, 3, {-0.5f, 0.1f, 15, true});
      store(found.scale, scale);
      store(found.minimum, minimum);
      const float largest = std::max(0.f, *std::max_element(scale, scale + 16));
      const float largest_minimum = std::max(0.f, *std::max_element(minimum, minimum + 16));
      for (int g = 0; g < 16; g++) {
        if (largest > 0) scales[g] = static_cast<uint8_t>(static_cast<int>(nearest(15.f / largest * scale[g])));
        if (largest_minimum > 0) {
          minima[g] = static_cast<uint8_t>(static_cast<int>(nearest(15.f / largest_minimum * minimum[g])));
        }
      }
      unit = largest / 15.f;
      minimum_unit = largest_minimum / 15.f;
    }
    const bool finite = store_half(block + 80, unit) & store_half(block + 82, minimum_unit);
    for (int g = 0; g < 16; g++) {
      block[g] = static_cast<uint8_t>(scales[g] | minima[g] << 4);
      scale[g] = load_half(block + 80) * static_cast<float>(block[g] & 15);
      minimum[g] = load_half(block + 82) * static_cast<float>(block[g] >> 4);
    }
    Floats q[16], first[16];
    const Floats d = load(scale), m = load(minimum);
    found.codes(x, 3, first);
    for (int i = 0; i < 16; i++) q[i] = select(d != 0.f, clamp(nearest((x[i] + m) / d), 0, 3), first[i]);
    store_codes(q, codes);
    pack_two_bits(codes, block + 16);
    return finite;
  };
  return encode_superblocks<16, 84>(values, rows, columns, importance, out, encode);
}

bool encode_q3_k(const float *values, int64_t rows, int64_t columns, const float *importance, uint8_t *out) {
  const auto encode = [&](const Floats (&x)[16], Floats (&w)[16], Floats squares, int, uint8_t *block) {
    alignas(64) float scale[16];
    alignas(64) uint8_t codes[256];
    Floats q[16], integers;
    float unit;
    if (importance) {
      weigh(x, 2.f * squares / 256.f, w);
      const Symmetric found = fit_symmetric(x, w, 4);
      found.codes(x, 4, q);
      // The scales are the weights of one group more; the other lanes stay empty.
      alignas(64) float weight[16];
      store(found.scale, scale);
      store(sum_of(w), weight);
      Floats group[16], shares[16], found_scales[16];
      alignas(64) float first[lanes] = {};
      const auto only_first = [&](float x) {
        first[0] = x;
        return load(first);
      };
      for (int g = 0; g < 16; g++) {
        group[g] = only_first(scale[g]);
        shares[g] = only_first(weight[g]);
      }
      const Symmetric outer = fit_symmetric(group, shares, 32);
      outer.codes(group, 32, found_scales);
      store(outer.scale, first);
      unit = first[0];
      for (int g = 0; g < 16; g++) {
        store(found_scales[g], first);
        scale[g] = first[0];
      }
      integers = load(scale) - 32.f;
    } else {
      const Floats found = fit_by_descent(x, 4, q);
      store(found, scale);
      float largest = 0, size = 0;
      for (int g = 0; g < 16; g++) {
        if (std::fabs(scale[g]) > size) size = std::fabs(scale[g]), largest = scale[g];
      }
      const float inverse = largest != 0 ? -32.f / largest : 0;
      integers = largest != 0 ? clamp(nearest(inverse * found), -32, 31) : all(-32.f);
      unit = largest != 0 ? 1 / inverse : 0;
    }
    const bool finite = store_half(block + 108, unit);
    const Floats d = load_half(block + 108) * integers;
    for (int i = 0; i < 16; i++) q[i] = select(d != 0.f, clamp(nearest(x[i] / d), -4, 3) + 4.f, q[i]);
    store_codes(q, codes);
    store(integers + 32.f, scale);
    std::memset(block, 0, 32);
    std::memset(block + 96, 0, 12);
    for (int g = 0; g < 16; g++) {
      const int s = static_cast<int>(scale[g]);
      block[96 + g % 8] |= static_cast<uint8_t>((s & 15) << g / 8 * 4);
      block[104 + g % 4] |= static_cast<uint8_t>((s >> 4) << g / 4 * 2);
    }
    for (int j = 0; j < 256; j++) block[j % 32] |= static_cast<uint8_t>((codes[j] >> 2) << j / 32);
    pack_two_bits(codes, block + 32);
    return finite;
  };
  return encode_superblocks<16, 110>(values, rows, columns, importance, out, encode);
}

bool encode_q6_k(const float *values, int64_t rows, int64_t columns, const float *importance, uint8_t *out) {
  const auto encode = [&](const Floats (&x)[16], Floats (&w)[16], Floats, int, uint8_t *block) {
    alignas(64) float scale[16];
    alignas(64) uint8_t codes[256];
    if (!importance) weigh_by_squares(x, w);
    const Symmetric found = fit_symmetric(x, w, 32);
    store(found.scale, scale);
    float largest = 0, size = 0;
    for (int g = 0; g < 16; g++) {
      if (std::fabs(scale[g]) > size) size = std::fabs(scale[g]), largest = scale[g];
    }
    if (size < least_magnitude) {
      std::memset(block, 0, 210);
      return true;
    }
    const float inverse = -128.f / largest;
    const bool finite = store_half(block + 208, 1 / inverse);
    const Floats integers = clamp(nearest(inverse * found.scale), -128, 127);
    const Floats d = load_half(block + 208) * integers;
    Floats q[16];
    found.codes(x, 32, q);
    for (int i = 0; i < 16; i++) q[i] = select(d != 0.f, clamp(nearest(x[i] / d), -32, 31) + 32.f, q[i]);
    store_codes(q, codes);
    store(integers, scale);
    for (int g = 0; g < 16; g++) block[192 + g] = static_cast<uint8_t>(static_cast<int>(scale[g]));
    for (int j = 0; j < 256; j += 128) {
      for (int i = 0; i < 32; i++) {
        const uint8_t *c = codes + j + i;
        uint8_t *low = block + j / 2 + i;
        low[0] = static_cast<uint8_t>((c[0] & 15) | c[64] << 4);
        low[32] = static_cast<uint8_t>((c[32] & 15) | c[96] << 4);
        block[128 + j / 4 + i] =
            static_cast<uint8_t>(c[0] >> 4 | c[32] >> 4 << 2 | c[64] >> 4 << 4 | c[96] >> 4 << 6);
      }
    }
    return finite;
  };
  return encode_superblocks<16, 210>(values, rows, columns, importance, out, encode);
}

// Q4_K and Q5_K: eight groups of 32 with 6-bit scales and minima.
template <int levels, int bytes, typename Pack>
bool encode_with_minima(const float *values, int64_t rows, int64_t columns, const float *importance, uint8_t *out,
                        AffineSearch plain, const Pack &pack) {
  const auto encode = [&](const Floats (&x)[32], Floats (&w)[32], Floats squares, int count, uint8_t *blocks) {
    alignas(64) float scale[lanes], minimum[lanes], weight[lanes];
    alignas(64) uint8_t scales[lanes] = {}, minima[lanes] = {}, codes[32 * lanes];
    float unit[2], minimum_unit[2];
    Affine found;
    if (importance) {
      weigh(x, 2.f * squares / 256.f, w);
      found = fit_affine(x, w, levels, {-0.9f, 0.05f, 36, false});
      store(sum_of(w), weight);
    } else {
      weigh_by_squares(x, w);
      const Floats mean = roots(sum_of(w) / 32.f);
      for (int i = 0; i < 32; i++) w[i] = mean + magnitude(x[i]);
      found = fit_affine(x, w, levels, plain);
    }
    store(found.scale, scale);
    store(found.minimum, minimum);
    bool finite = true;
    for (int b = 0; b < count; b++) {
      const float *s = scale + 8 * b, *m = minimum + 8 * b;
      if (importance) {
        unit[b] = fit_unit<8>(s, weight + 8 * b, 63, scales + 8 * b);
        minimum_unit[b] = fit_unit<8>(m, weight + 8 * b, 63, minima + 8 * b);
      } else {
        const float largest = std::max(0.f, *std::max_element(s, s + 8));
        const float largest_minimum = std::max(0.f, *std::max_element(m, m + 8));
        const float inverse = largest > 0 ? 63.f / largest : 0;
        const float inverse_minimum = largest_minimum > 0 ? 63.f / largest_minimum : 0;
        for (int g = 0; g < 8; g++) {
          const uint8_t code = static_cast<uint8_t>(static_cast<int>(nearest(inverse * s[g])));
          const uint8_t minimum_code = static_cast<uint8_t>(static_cast<int>(nearest(inverse_minimum * m[g])));
          scales[8 * b + g] = std::min<uint8_t>(63, code);
          minima[8 * b + g] = std::min<uint8_t>(63, minimum_code);
        }
        unit[b] = largest / 63.f;
        minimum_unit[b] = largest_minimum / 63.f;
      }
      uint8_t *block = blocks + b * bytes;
      finite &= store_half(block, unit[b]) & store_half(block + 2, minimum_unit[b]);
      for (int g = 0; g < 4; g++) {
        const uint8_t low = scales[8 * b + g], high = scales[8 * b + 4 + g];
        const uint8_t low_minimum = minima[8 * b + g], high_minimum = minima[8 * b + 4 + g];
        block[4 + g] = static_cast<uint8_t>(low | high >> 4 << 6);
        block[8 + g] = static_cast<uint8_t>(low_minimum | high_minimum >> 4 << 6);
        block[12 + g] = static_cast<uint8_t>((high & 15) | high_minimum << 4);
      }
      for (int g = 0; g < 8; g++) {
        scale[8 * b + g] = load_half(block) * static_cast<float>(scales[8 * b + g]);
        minimum[8 * b + g] = load_half(block + 2) * static_cast<float>(minima[8 * b + g]);
      }
    }
    Floats q[32], first[32];
    const Floats d = load(scale), m = load(minimum);
    found.codes(x, levels, first);
    for (int i = 0; i < 32; i++) q[i] = select(d != 0.f, clamp(nearest((x[i] + m) / d), 0, levels), first[i]);
    store_codes(q, codes);
    for (int b = 0; b < count; b++) pack(codes + 256 * b, blocks + b * bytes + 16);
    return finite;
  };
  return encode_superblocks<32, bytes>(values, rows, columns, importance, out, encode);
}

bool encode_q4_k(const float *values, int64_t rows, int64_t columns, const float *importance, uint8_t *out) {
  const auto pack = [](const uint8_t *codes, uint8_t *block) {
    for (int j = 0; j < 256; j += 64) {
      for (int i = 0; i < 32; i++) block[j / 2 + i] = static_cast<uint8_t>(codes[j + i] | codes[j + 32 + i] << 4);
    }
  };
  return encode_with_minima<15, 144>(values, rows, columns, importance, out, {-1.f, 0.1f, 20, false}, pack);
}
bool encode_q5_k(const float *values, int64_t rows, int64_t columns, const float *importance, uint8_t *out) {
  const auto pack = [](const uint8_t *codes, uint8_t *block) {
    std::memset(block, 0, 32);
    for (int j = 0; j < 256; j += 64) {
      for (int i = 0; i < 32; i++) {
        const uint8_t low = codes[j + i], high = codes[j + 32 + i];
        block[i] |= static_cast<uint8_t>((low >> 4 | high >> 4 << 1) << j / 32);
        block[32 + j / 2 + i] = static_cast<uint8_t>((low & 15) | high << 4);
      }
    }
  };
  return encode_with_minima<31, 176>(values, rows, columns, importance, out, {-0.5f, 0.1f, 15, false}, pack);
}

bool encode_iq4_xs(const float *values, int64_t rows, int64_t columns, const float *importance, uint8_t *out) {
  const auto encode = [&](const Floats (&x)[32], Floats (&w)[32], Floats squares, int count, uint8_t *blocks) {
    alignas(64) float scale[lanes], unit[lanes], inverse[lanes];
    alignas(64) uint8_t codes[32 * lanes];
    if (importance) {
      weigh(x, squares * (2.f / 256), w);
    } else {
      weigh_by_squares(x, w);
    }
    const Floats found = fit_iq4(x, w);
    store(found, scale);
    bool finite = true;
    for (int b = 0; b < 2; b++) {
      float largest = 0, size = 0;
      for (int g = 8 * b; g < 8 * b + 8; g++) {
        if (std::fabs(scale[g]) > size) size = std::fabs(scale[g]), largest = scale[g];
      }
      const float d = -largest / 32;
      for (int g = 8 * b; g < 8 * b + 8; g++) unit[g] = d, inverse[g] = d != 0 ? 1 / d : 0;
    }
    const Floats integers = clamp(nearest(load(inverse) * found), -32, 31);
    const Floats inner = inverse_of(load(unit) * integers);
    Floats q[32];
    for (int i = 0; i < 32; i++) q[i] = nearest_iq4_code(inner * x[i]);
    store_codes(q, codes);
    store(integers, scale);
    for (int b = 0; b < count; b++) {
      uint8_t *block = blocks + b * 136;
      finite &= store_half(block, unit[8 * b]);
      std::memset(block + 2, 0, 6);
      for (int g = 0; g < 8; g++) {
        const int s = static_cast<int>(scale[8 * b + g]) + 32;
        block[2 + g / 4] |= static_cast<uint8_t>((s >> 4) << g % 4 * 2);
        block[4 + g / 2] |= static_cast<uint8_t>((s & 15) << g % 2 * 4);
      }
      for (int g = 0; g < 8; g++) pack_nibbles(codes + 256 * b + 32 * g, block + 8 + 16 * g);
    }
    return finite;
  };
  return encode_superblocks<32, 136>(values, rows, columns, importance, out, encode);
}

}  // namespace
}  // namespace mnemos
