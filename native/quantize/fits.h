// The scales that leave the least weighted squared error, as ggml searches for them: its bytes are what others compare
// with, so every sum and every comparison has its order. x[i] and w[i] hold weight i of sixteen groups and its weight in
// the error.
#pragma once

#include "quantize/lanes.h"

namespace mnemos {
namespace {

constexpr float least_magnitude = 1e-15f;  // a group below it counts as zero

// The value of largest magnitude, the first of several.
template <int n>
inline Floats largest_of(const Floats (&x)[n]) {
  Floats largest = {}, size = {};
  for (int i = 0; i < n; i++) {
    const Mask more = magnitude(x[i]) > size;
    largest = select(more, x[i], largest);
    size = select(more, magnitude(x[i]), size);
  }
  return largest;
}

// x is about scale * q, q = nearest(inverse * x) in [-levels, levels).
struct Symmetric {
  Floats scale, inverse;
  Mask empty;  // groups without any weight of at least least_magnitude: their codes are stored as 0

  template <int n>
  void codes(const Floats (&x)[n], float levels, Floats (&q)[n]) const {
    for (int i = 0; i < n; i++) {
      q[i] = select(empty, all(0.f), clamp(nearest(inverse * x[i]), -levels, levels - 1) + levels);
    }
  }
};

template <int n>
inline Symmetric fit_symmetric(const Floats (&x)[n], const Floats (&w)[n], float levels) {
  Floats largest = largest_of(x);
  const Mask empty = magnitude(largest) < least_magnitude;
  largest = select(empty, all(1.f), largest);
  Floats wx[n];
  for (int i = 0; i < n; i++) wx[i] = w[i] * x[i];
  const auto sums = [&](Floats inverse, Floats &products, Floats &squares) {
    products = squares = all(0.f);
    for (int i = 0; i < n; i++) {
      const Floats q = clamp(nearest(inverse * x[i]), -levels, levels - 1);
      products += wx[i] * q;
      squares += w[i] * q * q;
    }
  };
  Floats inverse = -levels / largest, products, squares;
  sums(inverse, products, squares);
  Floats scale = select(squares != 0.f, products / squares, all(0.f));
  Floats best = scale * products;
  for (int step = -9; step <= 9; step++) {
    if (step == 0) continue;
    const Floats trial = -(levels + 0.1f * static_cast<float>(step)) / largest;
    sums(trial, products, squares);
    const Mask better = (squares > 0.f) & (products * products > best * squares);
    scale = select(better, products / squares, scale);
    best = select(better, scale * products, best);
    inverse = select(better, trial, inverse);
  }
  return {select(empty, all(0.f), scale), inverse, empty};
}

// Q3_K's without importance: the weights' codes are moved one at a time while that helps. q in [-levels, levels).
template <int n>
inline Floats fit_by_descent(const Floats (&x)[n], float levels, Floats (&q)[n]) {
  Floats largest = largest_of(x);
  const Mask empty = magnitude(largest) < least_magnitude;
  const Floats inverse = -levels / select(empty, all(1.f), largest);
  Floats products = {}, squares = {};
  for (int i = 0; i < n; i++) {
    const Floats w = x[i] * x[i];
    q[i] = clamp(nearest(inverse * x[i]), -levels, levels - 1);
    products += w * x[i] * q[i];
    squares += w * q[i] * q[i];
  }
  for (int round = 0; round < 5; round++) {
    Mask changed = {};
    for (int i = 0; i < n; i++) {
      const Floats w = x[i] * x[i];
      Floats others = products - w * x[i] * q[i], other_squares = squares - w * q[i] * q[i];
      const Mask possible = others > 0.f;
      const Floats moved = clamp(nearest(x[i] * other_squares / others), -levels, levels - 1);
      others += w * x[i] * moved;
      other_squares += w * moved * moved;
      const Mask better = possible & (moved != q[i]) & (other_squares > 0.f) &
                          (others * others * squares > products * products * other_squares);
      q[i] = select(better, moved, q[i]);
      products = select(better, others, products);
      squares = select(better, other_squares, squares);
      changed = changed | better;
    }
    if (!any(changed)) break;
  }
  for (int i = 0; i < n; i++) q[i] = select(empty, all(0.f), q[i] + levels);
  const Floats scale = select(squares > 0.f, products / squares, all(0.f));
  return select(empty, all(0.f), scale);
}

// x is about scale * q - minimum, q = nearest(inverse * (x - start)) in [0, levels].
struct Affine {
  Floats scale, minimum, inverse, start;

  template <int n>
  void codes(const Floats (&x)[n], float levels, Floats (&q)[n]) const {
    for (int i = 0; i < n; i++) q[i] = clamp(nearest(inverse * (x[i] - start)), 0, levels);
  }
};

// The scales tried: levels + first + step * delta on the range of the group.
struct AffineSearch {
  float first, delta;
  int steps;
  bool absolute;  // compares absolute errors, not squares
};

template <int n>
inline Affine fit_affine(const Floats (&x)[n], const Floats (&w)[n], float levels, AffineSearch search) {
  Floats low = x[0], high = x[0], sum_w = w[0], sum_x = w[0] * x[0];
  for (int i = 1; i < n; i++) {
    low = select(x[i] < low, x[i], low);
    high = select(x[i] > high, x[i], high);
    sum_w += w[i];
    sum_x += w[i] * x[i];
  }
  low = select(low > 0.f, all(0.f), low);
  const Mask flat = high <= low;
  const Floats flat_minimum = -low;
  high = select(flat, low + 1.f, high);

  Floats q[n];
  const auto error_of = [&](Floats scale, Floats start) {
    Floats error = {};
    for (int i = 0; i < n; i++) {
      const Floats rest = scale * q[i] + start - x[i];
      error += w[i] * (search.absolute ? magnitude(rest) : rest * rest);
    }
    return error;
  };
  Affine fit;
  fit.inverse = levels / (high - low);
  fit.start = low;
  fit.codes(x, levels, q);
  fit.scale = 1.f / fit.inverse;
  Floats best = error_of(fit.scale, low);
  for (int step = 0; step <= search.steps; step++) {
    const Floats inverse = (search.first + search.delta * static_cast<float>(step) + levels) / (high - low);
    Floats sum_q = {}, sum_qq = {}, sum_qx = {};
    for (int i = 0; i < n; i++) {
      q[i] = clamp(nearest(inverse * (x[i] - low)), 0, levels);
      const Floats wq = w[i] * q[i];
      sum_q += wq;
      sum_qq += wq * q[i];
      sum_qx += wq * x[i];
    }
    const Floats determinant = sum_w * sum_qq - sum_q * sum_q;
    Floats scale = (sum_w * sum_qx - sum_x * sum_q) / determinant;
    Floats start = (sum_qq * sum_x - sum_q * sum_qx) / determinant;
    const Mask above = start > 0.f;
    start = select(above, all(0.f), start);
    scale = select(above, sum_qx / sum_qq, scale);
    const Floats error = error_of(scale, start);
    const Mask better = (determinant > 0.f) & (error < best);
    fit.inverse = select(better, inverse, fit.inverse);
    fit.start = select(better, low, fit.start);
    fit.scale = select(better, scale, fit.scale);
    best = select(better, error, best);
    low = select(better, start, low);  // the next scales are tried from here
  }
  fit.minimum = select(flat, flat_minimum, -low);
  fit.scale = select(flat, all(0.f), fit.scale);
  fit.inverse = select(flat, all(0.f), fit.inverse);
  fit.start = select(flat, all(0.f), fit.start);
  return fit;
}

// IQ4's sixteen values. x is about scale * value.
constexpr float iq4_values[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

inline Floats nearest_iq4(Floats x) {
  Floats value = all(iq4_values[0]);
  for (int k = 1; k < 16; k++) {
    const float middle = 0.5f * (iq4_values[k - 1] + iq4_values[k]);
    value = select(x >= middle, all(iq4_values[k]), value);
  }
  return value;
}
inline Floats nearest_iq4_code(Floats x) {
  Floats code = {};
  for (int k = 1; k < 16; k++) {
    const float middle = 0.5f * (iq4_values[k - 1] + iq4_values[k]);
    code = select(x >= middle, all(static_cast<float>(k)), code);
  }
  return code;
}

inline Floats fit_iq4(const Floats (&x)[32], const Floats (&w)[32]) {
  Floats largest = largest_of(x);
  const Mask empty = magnitude(largest) < least_magnitude;
  largest = select(empty, all(1.f), largest);
  const auto sums = [&](Floats inverse, Floats &products, Floats &squares) {
    products = squares = all(0.f);
    for (int i = 0; i < 32; i++) {
      const Floats q = nearest_iq4(inverse * x[i]);
      products += w[i] * q * x[i];
      squares += w[i] * q * q;
    }
  };
  Floats products, squares;
  sums(1.f / (-largest / iq4_values[0]), products, squares);
  Floats scale = select(squares > 0.f, products / squares, all(0.f));
  Floats best = scale * products;
  for (int step = -7; step <= 7; step++) {
    sums((static_cast<float>(step) + iq4_values[0]) / largest, products, squares);
    const Mask better = (squares > 0.f) & (products * products > best * squares);
    scale = select(better, products / squares, scale);
    best = select(better, scale * products, best);
  }
  return select(empty, all(0.f), scale);
}

// The common unit of n non-negative scales, each then a whole number of at most `levels` of it; w weighs their errors.
template <int n>
inline float fit_unit(const float *x, const float *w, float levels, uint8_t *codes) {
  float largest = 0;
  for (int i = 0; i < n; i++) largest = x[i] > largest ? x[i] : largest;
  std::memset(codes, 0, n);
  if (largest < least_magnitude) return 0;
  const auto error_of = [&](float inverse) {
    const float unit = 1 / inverse;
    float error = 0;
    for (int i = 0; i < n; i++) {
      const float q = std::fmin(levels, nearest(inverse * x[i]));
      const float rest = x[i] - unit * q;
      error += w[i] * rest * rest;
    }
    return error;
  };
  float inverse = levels / largest;
  float best = error_of(inverse);
  for (int step = -4; step <= 4; step++) {
    if (step == 0) continue;
    const float trial = (0.1f * static_cast<float>(step) + levels) / largest;
    const float error = error_of(trial);
    if (error < best) {
      best = error;
      inverse = trial;
    }
  }
  float q[n], products = 0, squares = 0;
  for (int i = 0; i < n; i++) {
    q[i] = std::fmin(levels, nearest(inverse * x[i]));
    products += w[i] * x[i] * q[i];
    squares += w[i] * q[i] * q[i];
  }
  for (int round = 0; round < 5; round++) {
    bool changed = false;
    for (int i = 0; i < n; i++) {
      float others = products - w[i] * x[i] * q[i], other_squares = squares - w[i] * q[i] * q[i];
      if (!(others > 0 && other_squares > 0)) continue;
      const float moved = std::fmin(levels, nearest(x[i] * other_squares / others));
      if (moved == q[i]) continue;
      others += w[i] * x[i] * moved;
      other_squares += w[i] * moved * moved;
      if (others * others * squares > products * products * other_squares) {
        q[i] = moved;
        products = others;
        squares = other_squares;
        changed = true;
      }
    }
    if (!changed) break;
  }
  for (int i = 0; i < n; i++) codes[i] = static_cast<uint8_t>(static_cast<int>(q[i]));
  return squares > 0 ? products / squares : 0;
}

}  // namespace
}  // namespace mnemos
