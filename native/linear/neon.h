// The vector policy of NEON with its integer dot product: a panel's 16 rows are four registers.
#pragma once

#include <arm_neon.h>

#include "linear/product.h"

namespace mnemos {
namespace {

struct Neon {
  struct Bytes {
    uint8x16_t v[4];
  };
  struct Ints {
    int32x4_t v[4];
  };
  struct Floats {
    float32x4_t v[4];
  };
  using Quad = int8x16_t;
  static constexpr Form bf16_form = Form::f32;
  static constexpr bool signed_bytes = true;  // the dot product takes two signed operands
  static constexpr int narrow_bits = 0;
  static constexpr int tile_panels = 1, tile_rows = 4, float_rows = 2, stream_rows = 4, fine_rows = 3, split_rows = 2;
  template <int Bits>
  static constexpr int together = 1;
  static constexpr int rows_together = 8, blocks_together = 1;
  static constexpr bool bfloat_minima = false, adds_exponents = false;

  template <class Vectors, class Lane>
  static Vectors each(Lane lane) {
    return {{lane(0), lane(1), lane(2), lane(3)}};
  }

  static Bytes load(const uint8_t *p) {
    return each<Bytes>([&](int i) { return vld1q_u8(p + i * 16); });
  }
  static Bytes in_register(const Bytes &a) { return a; }
  static void store(uint8_t *p, const Bytes &a) {
    for (int i = 0; i < 4; i++) vst1q_u8(p + i * 16, a.v[i]);
  }
  template <int Shift>
  static Bytes shift(const Bytes &a) {
    return each<Bytes>([&](int i) {
      uint8x16_t v = a.v[i];
      if constexpr (Shift > 0) v = vshlq_n_u8(v, Shift);
      if constexpr (Shift < 0) v = vshrq_n_u8(v, -Shift);
      return v;
    });
  }
  template <int Shift, int Mask>
  static Bytes bits(const Bytes &a) {
    const Bytes shifted = shift<Shift>(a);
    return each<Bytes>([&](int i) { return vandq_u8(shifted.v[i], vdupq_n_u8(Mask)); });
  }
  static Bytes either(const Bytes &a, const Bytes &b) {
    return each<Bytes>([&](int i) { return vorrq_u8(a.v[i], b.v[i]); });
  }
  static Bytes lookup(const Bytes &a, const uint8_t *table) {
    const uint8x16_t values = vld1q_u8(table);
    return each<Bytes>([&](int i) { return vqtbl1q_u8(values, a.v[i]); });
  }

  static Ints add_ints(const Ints &a, const Ints &b) {
    return each<Ints>([&](int i) { return vaddq_s32(a.v[i], b.v[i]); });
  }
  static Ints shift_part(const Ints &a) {
    return each<Ints>([&](int i) { return vshlq_n_s32(a.v[i], 7); });
  }
  static int8x16_t broadcast_quad(const int8_t *p) {
    int32_t quad;
    __builtin_memcpy(&quad, p, 4);
    return vreinterpretq_s8_s32(vdupq_n_s32(quad));
  }
  template <int Bits>
  static Ints begin(int32_t start) {
    return each<Ints>([&](int) { return vdupq_n_s32(start); });
  }
  template <int Bits>
  static Ints dot(const Ints &sum, const Bytes &codes, int8x16_t x) {
    return each<Ints>([&](int i) {
      const uint8x16_t code = Bits == 8 ? veorq_u8(codes.v[i], vdupq_n_u8(0x80)) : codes.v[i];
      return vdotq_s32(sum.v[i], vreinterpretq_s8_u8(code), x);
    });
  }
  template <int Bits>
  static Ints end(const Ints &sum, int32_t) {
    return sum;
  }

  static Floats zero() { return broadcast(0); }
  static Floats broadcast(float value) {
    return each<Floats>([&](int) { return vdupq_n_f32(value); });
  }
  static Floats load(const float *p) {
    return each<Floats>([&](int i) { return vld1q_f32(p + i * 4); });
  }
  static void store(float *p, const Floats &a) {
    for (int i = 0; i < 4; i++) vst1q_f32(p + i * 4, a.v[i]);
  }
  static Floats load_halves(const uint8_t *p) {
    return each<Floats>([&](int i) { return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(p + i * 8))); });
  }
  static Floats load_int8s(const uint8_t *p) {
    const int8x16_t bytes = vreinterpretq_s8_u8(vld1q_u8(p));
    const int16x8_t low = vmovl_s8(vget_low_s8(bytes)), high = vmovl_s8(vget_high_s8(bytes));
    return to_floats({{vmovl_s16(vget_low_s16(low)), vmovl_s16(vget_high_s16(low)), vmovl_s16(vget_low_s16(high)),
                       vmovl_s16(vget_high_s16(high))}});
  }
  static Floats load_low_bfloats(const uint8_t *p) {
    return each<Floats>(
        [&](int i) { return vreinterpretq_f32_u32(vshlq_n_u32(vreinterpretq_u32_u8(vld1q_u8(p + i * 16)), 16)); });
  }
  static Floats load_high_bfloats(const uint8_t *p) {
    return each<Floats>([&](int i) {
      return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_u8(vld1q_u8(p + i * 16)), vdupq_n_u32(0xffff0000)));
    });
  }
  static Floats to_floats(const Ints &a) {
    return each<Floats>([&](int i) { return vcvtq_f32_s32(a.v[i]); });
  }
  static Floats negate(const Floats &a) {
    return each<Floats>([&](int i) { return vnegq_f32(a.v[i]); });
  }
  static Floats add(const Floats &a, const Floats &b) {
    return each<Floats>([&](int i) { return vaddq_f32(a.v[i], b.v[i]); });
  }
  static Floats multiply(const Floats &a, const Floats &b) {
    return each<Floats>([&](int i) { return vmulq_f32(a.v[i], b.v[i]); });
  }
  static Floats fma(const Floats &a, const Floats &b, const Floats &c) {
    return each<Floats>([&](int i) { return vfmaq_f32(c.v[i], a.v[i], b.v[i]); });
  }

  static float largest_magnitude(const float *x) {
    float32x4_t magnitude = vdupq_n_f32(0);
    for (int i = 0; i < 8; i++) magnitude = vmaxq_f32(magnitude, vabsq_f32(vld1q_f32(x + i * 4)));
    return vmaxvq_f32(magnitude);
  }
  template <int Parts>
  static void quantize(const float *x, float inverse, int8_t *quants, int32_t *counts) {
    for (int half = 0; half < 2; half++, quants += 16) {
      int32x4_t values[4], first[4];
      for (int i = 0; i < 4; i++) values[i] = vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(x + half * 16 + i * 4), inverse));
      counts[half] = vaddvq_s32(vaddq_s32(vaddq_s32(values[0], values[1]), vaddq_s32(values[2], values[3])));
      if constexpr (Parts == 2) {
        for (int i = 0; i < 4; i++) {
          first[i] = vshrq_n_s32(vaddq_s32(values[i], vdupq_n_s32(64)), 7);
          values[i] = vsubq_s32(values[i], vshlq_n_s32(first[i], 7));
        }
        store_int8s(quants, first);
      }
      store_int8s(quants + (Parts - 1) * 32, values);
    }
  }
  static void store_int8s(int8_t *p, const int32x4_t *a) {
    const int16x8_t low = vcombine_s16(vqmovn_s32(a[0]), vqmovn_s32(a[1]));
    const int16x8_t high = vcombine_s16(vqmovn_s32(a[2]), vqmovn_s32(a[3]));
    vst1q_s8(p, vcombine_s8(vqmovn_s16(low), vqmovn_s16(high)));
  }
};

}  // namespace
}  // namespace mnemos
