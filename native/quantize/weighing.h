// How much each weight counts in the error of its block.
#pragma once

#include <algorithm>

#include "quantize/lanes.h"

namespace mnemos {
namespace {

// The sums of squares of `count` runs of `length` weights, each in their order; several runs at a time, since a sum waits
// for the one before.
inline void sum_squares(const float *values, int64_t length, int64_t count, float *sums) {
  constexpr int together = 8;
  for (int64_t first = 0; first < count; first += together) {
    const int runs = static_cast<int>(std::min<int64_t>(together, count - first));
    const float *p = values + first * length;
    float sum[together] = {};
    if (runs == together) {
      for (int64_t j = 0; j < length; j++) {
        for (int r = 0; r < together; r++) sum[r] += p[r * length + j] * p[r * length + j];
      }
    } else {
      for (int r = 0; r < runs; r++) {
        for (int64_t j = 0; j < length; j++) sum[r] += p[r * length + j] * p[r * length + j];
      }
    }
    std::copy(sum, sum + runs, sums + first);
  }
}

// A weight's share in the error: its column's importance times the root of its square and `spread`, one number a lane.
template <int n>
inline void weigh(const Floats (&x)[n], Floats spread, Floats (&w)[n]) {
  for (int i = 0; i < n; i++) w[i] *= roots(spread + x[i] * x[i]);
}
template <int n>
inline void weigh_by_squares(const Floats (&x)[n], Floats (&w)[n]) {
  for (int i = 0; i < n; i++) w[i] = x[i] * x[i];
}
template <int n>
inline Floats sum_of(const Floats (&w)[n]) {
  Floats sum = {};
  for (int i = 0; i < n; i++) sum += w[i];
  return sum;
}
inline Floats inverse_of(Floats x) { return select(x != 0.f, 1.f / x, all(0.f)); }

}  // namespace
}  // namespace mnemos
