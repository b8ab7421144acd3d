// The vector kernels, written once over vec.h; compiled once for every instruction set.
#pragma once

#include "vector/vec.h"
#include "vector/vector_kernels.h"

namespace mnemos {
namespace {

constexpr int lanes_in_flight = 4;  // independent sums, to hide the latency of an addition

template <typename Term>
float sum_terms(int64_t n, const Term &term) {
  Vec sums[lanes_in_flight] = {zero(), zero(), zero(), zero()};
  int64_t i = 0;
  for (; i + lanes_in_flight * width <= n; i += lanes_in_flight * width) {
    for (int j = 0; j < lanes_in_flight; j++) sums[j] = add(sums[j], term(i + j * width, width));
  }
  for (; i < n; i += width) {
    sums[0] = add(sums[0], term(i, n - i < width ? static_cast<int>(n - i) : width));
  }
  return sum(add(add(sums[0], sums[1]), add(sums[2], sums[3])));
}

void rms_norm(const float *x, const float *weight, float epsilon, float *y, int64_t groups, int64_t n) {
  for (int64_t g = 0; g < groups; g++, x += n, y += n) {
    const float squares = sum_terms(n, [&](int64_t i, int k) {
      const Vec v = load_any(x + i, k);
      return mul(v, v);
    });
    const double mean = static_cast<double>(squares) / static_cast<double>(n);
    const Vec inverse = splat(static_cast<float>(1.0 / std::sqrt(mean + static_cast<double>(epsilon))));
    for_vectors(n, [&](int64_t i, int k) {
      store_any(y + i, mul(mul(load_any(x + i, k), inverse), load_any(weight + i, k)), k);
    });
  }
}

void layer_norm(const float *x, const float *weight, const float *bias, float epsilon, float *y, int64_t n) {
  const float total = sum_terms(n, [&](int64_t i, int k) { return load_any(x + i, k); });
  const Vec mean = splat(static_cast<float>(static_cast<double>(total) / static_cast<double>(n)));
  for_vectors(n, [&](int64_t i, int k) { store_any(y + i, sub(load_any(x + i, k), mean), k); });
  const float squares = sum_terms(n, [&](int64_t i, int k) {
    const Vec v = load_any(y + i, k);
    return mul(v, v);
  });
  const double variance = static_cast<double>(squares) / static_cast<double>(n);
  const Vec inverse = splat(static_cast<float>(1.0 / std::sqrt(variance + static_cast<double>(epsilon))));
  for_vectors(n, [&](int64_t i, int k) {
    const Vec scaled = mul(mul(load_any(y + i, k), inverse), load_any(weight + i, k));
    store_any(y + i, bias ? add(scaled, load_any(bias + i, k)) : scaled, k);
  });
}

inline Vec sigmoid(Vec x) { return div(splat(1.0f), add(splat(1.0f), exp(sub(zero(), x)))); }

// x / (1 + e^-x)
inline Vec silu(Vec x) { return div(x, add(splat(1.0f), exp(sub(zero(), x)))); }

// 0.5 x (1 + tanh(u)) = x / (1 + e^-2u) with u = sqrt(2 / pi) (x + 0.044715 x^3)
inline Vec gelu_tanh(Vec x) {
  const Vec cubic = fma(mul(mul(x, x), x), splat(0.044715f), x);
  return div(x, add(splat(1.0f), exp(mul(cubic, splat(-1.5957691216f)))));
}

// x Phi(x), by erfc(z) = e^(-z^2) t Q(t) with t = 1 / (1 + 0.5 z), z >= 0 (own minimax fit, relative error 2e-8)
inline Vec gelu(Vec x) {
  const Vec z = mul(abs(x), splat(0.70710678f)), one = splat(1.0f);
  const Vec t = div(one, fma(z, splat(0.5f), one));
  Vec q = splat(1.22833112e-2f);
  q = fma(q, t, splat(-0.12325180f));
  q = fma(q, t, splat(0.42892209f));
  q = fma(q, t, splat(-0.67001468f));
  q = fma(q, t, splat(0.42126831f));
  q = fma(q, t, splat(-9.8314732e-2f));
  q = fma(q, t, splat(0.22554095f));
  q = fma(q, t, splat(0.23864501f));
  q = fma(q, t, splat(0.28285703f));
  q = fma(q, t, splat(0.28206450f));
  const Vec upper = mul(splat(0.5f), mul(mul(q, t), exp(mul(splat(-0.5f), mul(x, x)))));  // 1 - Phi(|x|)
  return mul(x, select(less(x, zero()), upper, sub(one, upper)));
}

inline Vec tanh(Vec x) {
  const Vec size = abs(x), square = mul(x, x);
  Vec p = splat(-5.7049845e-3f);  // tanh x = x + x^3 P(x^2) below 0.625 (own minimax fit, relative error 5e-9)
  p = fma(p, square, splat(2.0639084e-2f));
  p = fma(p, square, splat(-5.3739715e-2f));
  p = fma(p, square, splat(0.13331442f));
  p = fma(p, square, splat(-0.33333281f));
  const Vec small = fma(mul(x, square), p, x);
  const Vec e = exp(add(size, size));
  const Vec large = sub(splat(1.0f), div(splat(2.0f), add(e, splat(1.0f))));
  return select(less(size, splat(0.625f)), small, copy_sign(large, x));
}

template <typename Function>
void map(const float *x, float *y, int64_t n, const Function &function) {
  for_vectors(n, [&](int64_t i, int k) { store_any(y + i, function(load_any(x + i, k)), k); });
}

template <typename Function>
void map(const float *x, const float *y, float *z, int64_t n, const Function &function) {
  for_vectors(n, [&](int64_t i, int k) { store_any(z + i, function(load_any(x + i, k), load_any(y + i, k)), k); });
}

// Calls run(function) with the function of that kind.
template <typename Run>
void with_activation(ActivationKind kind, const Run &run) {
  switch (kind) {
    case ActivationKind::silu: return run([](Vec x) { return silu(x); });
    case ActivationKind::gelu: return run([](Vec x) { return gelu(x); });
    case ActivationKind::gelu_tanh: return run([](Vec x) { return gelu_tanh(x); });
    case ActivationKind::relu: return run([](Vec x) { return max(x, zero()); });
    case ActivationKind::sigmoid: return run([](Vec x) { return sigmoid(x); });
    case ActivationKind::tanh: return run([](Vec x) { return tanh(x); });
  }
}

void activation(ActivationKind kind, const float *x, float *y, int64_t n) {
  with_activation(kind, [&](auto function) { map(x, y, n, function); });
}

void gated_activation(ActivationKind kind, const float *gate, const float *up, float *y, int64_t n) {
  with_activation(kind, [&](auto function) { map(gate, up, y, n, [&](Vec g, Vec u) { return mul(function(g), u); }); });
}

void add_arrays(const float *x, const float *y, float *z, int64_t n) {
  map(x, y, z, n, [](Vec a, Vec b) { return add(a, b); });
}

void scale(const float *x, float factor, float *y, int64_t n) {
  const Vec f = splat(factor);
  map(x, y, n, [&](Vec v) { return mul(v, f); });
}

void accumulate(const float *x, float factor, float *y, int64_t n) {
  const Vec f = splat(factor);
  map(x, y, y, n, [&](Vec a, Vec b) { return add(mul(a, f), b); });
}

float dot(const float *x, const float *y, int64_t n) {
  Vec sums[4] = {zero(), zero(), zero(), zero()};
  int64_t i = 0;
  for (; i + 4 * width <= n; i += 4 * width) {
    for (int k = 0; k < 4; k++) sums[k] = fma(load(x + i + k * width), load(y + i + k * width), sums[k]);
  }
  for_vectors(n - i, [&](int64_t at, int part) {
    const float *a = x + i + at, *b = y + i + at;
    sums[0] = fma(load_any(a, part), load_any(b, part), sums[0]);
  });
  return sum(add(add(sums[0], sums[1]), add(sums[2], sums[3])));
}

void softcap(const float *x, float cap, float *y, int64_t n) {
  const Vec c = splat(cap);
  map(x, y, n, [&](Vec v) { return mul(c, tanh(div(v, c))); });
}

void rope(const float *x, const float *cosines, const float *sines, float factor, float *y, int64_t half) {
  const Vec f = splat(factor);
  for_vectors(half, [&](int64_t i, int k) {
    const Vec a = load_any(x + i, k), b = load_any(x + half + i, k);
    const Vec cosine = load_any(cosines + i, k), sine = load_any(sines + i, k);
    store_any(y + i, mul(sub(mul(a, cosine), mul(b, sine)), f), k);
    store_any(y + half + i, mul(add(mul(b, cosine), mul(a, sine)), f), k);
  });
}

float largest_of(const float *x, int64_t n) {
  Vec most[lanes_in_flight];
  for (Vec &m : most) m = splat(-INFINITY);
  int64_t i = 0;
  for (; i + lanes_in_flight * width <= n; i += lanes_in_flight * width) {
    for (int j = 0; j < lanes_in_flight; j++) most[j] = max(load(x + i + j * width), most[j]);
  }
  float result = largest(max(max(most[0], most[1]), max(most[2], most[3])));
  for (; i < n; i++) result = x[i] > result ? x[i] : result;
  return result;
}

// Like largest_of, but infinite where any x is not a number: min gives its second operand then.
float largest_valid(const float *x, int64_t n) {
  const Vec bound = splat(INFINITY);
  Vec most[lanes_in_flight];
  for (Vec &m : most) m = splat(-INFINITY);
  int64_t i = 0;
  for (; i + lanes_in_flight * width <= n; i += lanes_in_flight * width) {
    for (int j = 0; j < lanes_in_flight; j++) most[j] = max(min(load(x + i + j * width), bound), most[j]);
  }
  float result = largest(max(max(most[0], most[1]), max(most[2], most[3])));
  for (; i < n; i++) {
    const float bounded = x[i] < INFINITY ? x[i] : INFINITY;
    result = bounded > result ? bounded : result;
  }
  return result;
}

double sum_exp(const float *x, float shift, float factor, int64_t n) {
  constexpr int64_t run = 1024;  // float sums of this few terms of one sign lose nothing that matters
  const Vec s = splat(shift), f = splat(factor);
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += run) {
    const int64_t count = n - begin < run ? n - begin : run;
    const float *part = x + begin;
    Vec sums[2] = {zero(), zero()};
    int64_t i = 0;
    for (; i + 2 * width <= count; i += 2 * width) {
      for (int j = 0; j < 2; j++) sums[j] = add(sums[j], exp(mul(sub(load(part + i + j * width), s), f)));
    }
    float lanes[width];
    for (; i < count; i += width) {
      const int k = count - i < width ? static_cast<int>(count - i) : width;
      store(lanes, exp(mul(sub(load_any(part + i, k), s), f)));
      for (int j = 0; j < k; j++) total += static_cast<double>(lanes[j]);
    }
    total += static_cast<double>(sum(add(sums[0], sums[1])));
  }
  return total;
}

void exponentials(const float *x, float shift, float factor, float *y, int64_t n) {
  const Vec s = splat(shift), f = splat(factor);
  map(x, y, n, [&](Vec v) { return exp(mul(sub(v, s), f)); });
}

void softmax(float *x, int64_t n) {
  const float most = largest_of(x, n);
  const Vec shift = splat(most);
  map(x, x, n, [&](Vec v) { return exp(sub(v, shift)); });
  const float total = sum_terms(n, [&](int64_t i, int k) { return load_any(x + i, k); });
  const Vec divisor = splat(total);
  map(x, x, n, [&](Vec v) { return div(v, divisor); });
}

int64_t select_at_least(const float *x, float threshold, int32_t *indices, int64_t most, int64_t n) {
  const Vec t = splat(threshold);
  int64_t found = 0, i = 0;
  for (; i + width <= n; i += width) {
    unsigned chosen = ~bits(less(load(x + i), t)) & ((1ull << width) - 1);
    for (; chosen; chosen &= chosen - 1) {
      const int64_t index = i + __builtin_ctz(chosen);
      if (!(x[index] >= threshold)) continue;  // NaN
      if (found == most) return found;
      indices[found++] = static_cast<int32_t>(index);
    }
  }
  for (; i < n; i++) {
    if (!(x[i] >= threshold)) continue;
    if (found == most) return found;
    indices[found++] = static_cast<int32_t>(i);
  }
  return found;
}

}  // namespace
}  // namespace mnemos

#include "vector/attention_impl.h"
#include "vector/attention_plain.h"
#include "vector/recall_impl.h"

namespace mnemos {
namespace {

constexpr VectorKernels table = {
    rms_norm,   layer_norm,   activation,    gated_activation, add_arrays,   scale,          accumulate, dot,
    softcap,    rope,         softmax,       store_key,        store_value,  attend,         merge,      attend_plain,
    name_pages, choose_pages, largest_valid, sum_exp,          exponentials, select_at_least};

}  // namespace
}  // namespace mnemos
