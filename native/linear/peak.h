// The peak rate of the arithmetic units: the dot products of a tile, from registers and the level-1 cache alone.
#pragma once

#include "linear/tiles.h"

namespace mnemos {
namespace {

// `rounds` times P vectors of weights by R rows, with enough sums that none waits for another. `dot` adds one
// product to one sum, `to_floats` makes a sum something that can be stored.
template <class S, int P, int R, class Sum, class Load, class Broadcast, class Dot, class ToFloats>
inline void multiply_tiles(int64_t rounds, Sum start, Load load, Broadcast broadcast, Dot dot, ToFloats to_floats) {
  Sum sums[R][P];
  unroll<R>([&](auto r) MNEMOS_INLINE { unroll<P>([&](auto p) MNEMOS_INLINE { sums[r][p] = start; }); });
  for (int64_t round = 0; round < rounds; round++) {
    __asm__ volatile("" : : : "memory");  // loads may give something else in each round
    decltype(load(0)) weights[P];
    unroll<P>([&](auto p) MNEMOS_INLINE { weights[p] = load(p); });
    unroll<R>([&](auto r) MNEMOS_INLINE {
      const auto x = broadcast(r);
      unroll<P>([&](auto p) MNEMOS_INLINE { sums[r][p] = dot(sums[r][p], weights[p], x); });
    });
  }
  unroll<R>([&](auto r) MNEMOS_INLINE {
    unroll<P>([&](auto p) MNEMOS_INLINE {
      alignas(64) float values[panel_rows];
      S::store(values, to_floats(sums[r][p]));
      __asm__ volatile("" : : "r"(values) : "memory");  // so that nothing is optimised away
    });
  });
}

// See ProductKernels::multiply_registers.
template <class S>
int64_t multiply_registers(Form form, int64_t rounds) {
  constexpr int P = S::tile_panels, R = S::tile_rows, lanes = panel_rows;
  alignas(64) constexpr uint8_t nothing[P * 64] = {};
  const uint8_t *weights = nothing;
  __asm__ volatile("" : "+r"(weights));  // their values are not known
  const auto bytes = [&](int p) MNEMOS_INLINE { return S::load(weights + p * 64); };
  const auto floats = [&](int p) MNEMOS_INLINE { return S::load(reinterpret_cast<const float *>(weights + p * 64)); };
  const auto same = [](auto sum) MNEMOS_INLINE { return sum; };
  if (form == Form::f32) {
    const auto broadcast = [&](int r)
                               MNEMOS_INLINE { return S::broadcast(reinterpret_cast<const float *>(weights)[r]); };
    const auto dot = [](auto sum, auto w, auto x) MNEMOS_INLINE { return S::fma(w, x, sum); };
    multiply_tiles<S, P, R>(rounds, S::zero(), floats, broadcast, dot, same);
    return rounds * P * R * lanes;
  }
  if constexpr (S::bf16_form == Form::bf16) {
    if (form == Form::bf16) {
      const auto *pairs = reinterpret_cast<const uint16_t *>(weights);
      const auto broadcast = [&](int r) MNEMOS_INLINE { return S::broadcast_bfloats(pairs + 2 * r); };
      const auto dot = [](auto sum, auto w, auto x) MNEMOS_INLINE { return S::dot_bfloats(sum, w, x); };
      multiply_tiles<S, P, R>(rounds, S::zero(), bytes, broadcast, dot, same);
      return rounds * P * R * lanes * 2;
    }
  }
  // Codes of few bits, which every level multiplies fastest.
  const auto *quads = reinterpret_cast<const int8_t *>(weights);
  const auto broadcast = [&](int r) MNEMOS_INLINE { return S::broadcast_quad(quads + 4 * r); };
  const auto dot = [](auto sum, auto w, auto x) MNEMOS_INLINE { return S::template dot<4>(sum, w, x); };
  const auto to_floats = [](auto sum) MNEMOS_INLINE { return S::to_floats(sum); };
  multiply_tiles<S, P, R>(rounds, S::template begin<8>(0), bytes, broadcast, dot, to_floats);
  return rounds * P * R * lanes * 4;
}

}  // namespace
}  // namespace mnemos
