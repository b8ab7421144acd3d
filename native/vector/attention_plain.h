// Attention of one query over adjacent keys and values, written with vec.h; included by kernels_impl.h.
#pragma once

#include "vector/vec.h"
#include "vector/vector_kernels.h"

namespace mnemos {
namespace {

// How far ahead to prefetch, where reading must not evict what the caches hold.
constexpr int64_t passing_floats = 1024;

inline void pass(const float *from, int64_t floats) {
  for (int64_t i = 0; i < floats; i += 16) __builtin_prefetch(from + passing_floats + i, 0, 0);
}

// y[j] = sum over t of weights[t] * rows[t][j] for N vectors of j.
template <int N>
inline void weigh(const float *weights, const float *rows, int64_t count, int64_t n, int64_t j, int part, bool passing,
                  float *y) {
  Vec even[N], odd[N];  // two sums each, to hide the latency of an addition
  for (int v = 0; v < N; v++) even[v] = odd[v] = zero();
  const auto take = [&](int64_t t, Vec *sums) {
    if (passing) pass(rows + t * n, n);
    const Vec weight = splat(weights[t]);
    for (int v = 0; v < N; v++)
      sums[v] = fma(weight, load_any(rows + t * n + j + v * width, N > 1 ? width : part), sums[v]);
  };
  int64_t t = 0;
  for (; t + 1 < count; t += 2) take(t, even), take(t + 1, odd);
  if (t < count) take(t, even);
  for (int v = 0; v < N; v++) store_any(y + j + v * width, add(even[v], odd[v]), N > 1 ? width : part);
}

void attend_plain(const float *query, const float *keys, const float *values, int64_t count, int64_t n, float scale,
                  bool passing, float *scores, float *y) {
  constexpr int together = 4;  // keys, whose sums do not wait for each other
  int64_t t = 0;
  const auto dots = [&](auto tag) {
    constexpr int K = decltype(tag)::value;
    for (; t + K <= count; t += K) {
      Vec sums[K];
      for (int k = 0; k < K; k++) sums[k] = zero();
      if (passing) pass(keys + t * n, K * n);
      for_vectors(n, [&](int64_t j, int part) {
        const Vec q = load_any(query + j, part);
        for (int k = 0; k < K; k++) sums[k] = fma(q, load_any(keys + (t + k) * n + j, part), sums[k]);
      });
      for (int k = 0; k < K; k++) scores[t + k] = sum(sums[k]) * scale;
    }
  };
  dots(std::integral_constant<int, together>{});
  dots(std::integral_constant<int, 1>{});
  softmax(scores, count);
  int64_t j = 0;  // longer and shorter values are read several times, so they should not bypass the caches
  for (; j + 4 * width <= n; j += 4 * width) weigh<4>(scores, values, count, n, j, width, passing && n == 4 * width, y);
  for_vectors(n - j, [&](int64_t at, int part) { weigh<1>(scores, values, count, n, j + at, part, false, y); });
}

}  // namespace
}  // namespace mnemos
