// The matrix products without special instructions: what every machine can run.
#include <cmath>
#include <cstring>

#include "linear/product.h"

namespace mnemos {
namespace {

struct Scalar {
  struct Bytes {
    uint8_t v[64];
  };
  struct Ints {
    int32_t v[16];
  };
  struct Floats {
    float v[16];
  };
  struct Quad {
    int8_t v[4];
  };
  static constexpr Form bf16_form = Form::f32;
  static constexpr bool signed_bytes = false;
  static constexpr int narrow_bits = 0;
  static constexpr int tile_panels = 1, tile_rows = 1, float_rows = 1, stream_rows = 0, fine_rows = 0, split_rows = 0;
  template <int Bits>
  static constexpr int together = 1;
  static constexpr int rows_together = 8, blocks_together = 1;
  static constexpr bool bfloat_minima = false, adds_exponents = false;

  static Bytes load(const uint8_t *p) {
    Bytes bytes;
    memcpy(bytes.v, p, 64);
    return bytes;
  }
  static Bytes in_register(const Bytes &a) { return a; }
  static void store(uint8_t *p, const Bytes &bytes) { memcpy(p, bytes.v, 64); }
  template <int Shift>
  static Bytes shift(Bytes a) {
    for (uint8_t &byte : a.v) byte = uint8_t(Shift >= 0 ? byte << (Shift & 7) : byte >> (-Shift & 7));
    return a;
  }
  template <int Shift, int Mask>
  static Bytes bits(const Bytes &a) {
    Bytes shifted = shift<Shift>(a);
    for (uint8_t &byte : shifted.v) byte &= Mask;
    return shifted;
  }
  static Bytes either(Bytes a, const Bytes &b) {
    for (int i = 0; i < 64; i++) a.v[i] |= b.v[i];
    return a;
  }
  static Bytes lookup(Bytes a, const uint8_t *table) {
    for (uint8_t &byte : a.v) byte = table[byte];
    return a;
  }

  static Ints broadcast_int(int32_t value) {
    Ints ints;
    for (int32_t &lane : ints.v) lane = value;
    return ints;
  }
  static Quad broadcast_quad(const int8_t *p) { return {{p[0], p[1], p[2], p[3]}}; }
  template <int Bits>
  static Ints begin(int32_t start) {
    return broadcast_int(start);
  }
  template <int Bits>
  static Ints end(const Ints &sum, int32_t) {
    return sum;
  }
  template <int Bits>
  static Ints dot(Ints sum, const Bytes &codes, Quad x) {
    for (int r = 0; r < 16; r++)
      for (int i = 0; i < 4; i++) sum.v[r] += codes.v[r * 4 + i] * x.v[i];
    return sum;
  }
  static Ints add_ints(Ints a, const Ints &b) {
    for (int i = 0; i < 16; i++) a.v[i] += b.v[i];
    return a;
  }
  static Ints shift_part(Ints a) {
    for (int32_t &lane : a.v) lane *= 128;
    return a;
  }

  template <class Lane>
  static Floats each(Lane lane) {
    Floats floats;
    for (int i = 0; i < 16; i++) floats.v[i] = lane(i);
    return floats;
  }
  static Floats zero() { return broadcast(0); }
  static Floats broadcast(float value) {
    return each([&](int) { return value; });
  }
  static Floats load(const float *p) {
    return each([&](int i) { return p[i]; });
  }
  static void store(float *p, const Floats &a) { memcpy(p, a.v, 64); }
  static Floats load_halves(const uint8_t *p) {
    return each([&](int i) { return half_to_float(uint16_t(p[2 * i] | p[2 * i + 1] << 8)); });
  }
  static Floats load_int8s(const uint8_t *p) {
    return each([&](int i) { return float(int8_t(p[i])); });
  }
  static Floats load_low_bfloats(const uint8_t *p) {
    return each([&](int i) { return bfloat_to_float(uint16_t(p[4 * i] | p[4 * i + 1] << 8)); });
  }
  static Floats load_high_bfloats(const uint8_t *p) { return load_low_bfloats(p + 2); }
  static Floats to_floats(const Ints &a) {
    return each([&](int i) { return float(a.v[i]); });
  }
  static Floats negate(const Floats &a) {
    return each([&](int i) { return -a.v[i]; });
  }
  static Floats add(const Floats &a, const Floats &b) {
    return each([&](int i) { return a.v[i] + b.v[i]; });
  }
  static Floats multiply(const Floats &a, const Floats &b) {
    return each([&](int i) { return a.v[i] * b.v[i]; });
  }
  static Floats fma(const Floats &a, const Floats &b, const Floats &c) {  // rounds twice: there is no instruction
    return each([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
  }

  static float largest_magnitude(const float *x) {
    float largest = 0;
    for (int i = 0; i < 32; i++)
      largest = !(std::fabs(x[i]) <= largest) && largest == largest ? std::fabs(x[i]) : largest;
    return largest;
  }
  template <int Parts>
  static void quantize(const float *x, float inverse, int8_t *quants, int32_t *counts) {
    counts[0] = counts[1] = 0;
    for (int i = 0; i < 32; i++) {
      int value = inverse == 0 ? 0 : int(std::lrint(x[i] * inverse));
      counts[i / 16] += value;
      if constexpr (Parts == 2) {
        quants[i] = int8_t((value + 64) >> 7);
        value -= quants[i] * 128;
      }
      quants[(Parts - 1) * 32 + i] = int8_t(value);
    }
  }
};

}  // namespace

const ProductKernels scalar_kernels = kernels_of<Scalar>("scalar");

}  // namespace mnemos
