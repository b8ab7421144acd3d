// How well pages suit a row, from an index of their keys in 3 bits; see Recall in contract.py. All arithmetic is exact,
// in integers or in single float operations, so that the choice is the same with every instruction set.
#pragma once

#include "vector/vec.h"
#include "vector/vector_kernels.h"

namespace mnemos {
namespace {

inline float scale_of(const IndexLayout &layout, const uint8_t *run) {
  float scale;
  std::memcpy(&scale, run + layout.scale(), 4);
  return scale;
}

#if defined(__AVX512VNNI__)
// Bytes of 16 keys in one group of components, from their lowest value on in steps; `half`: keys 0 to 15, or 16 to 31.
inline __m512i keys_of_group(__m512i pairs, __mmask64 third, int half, __m512i low, __m512i step) {
  const auto bit = [&](int number) {  // of keys 0 to 7 in the lower half of the vector, of keys 8 to 15 in the upper
    const __m512i lower = _mm512_set1_epi8(static_cast<char>(1 << (4 * half + number)));
    return _mm512_inserti64x4(lower, _mm256_set1_epi8(static_cast<char>(1 << (4 * half + 2 + number))), 1);
  };
  const __m512i odd = _mm512_mask_add_epi8(low, _mm512_test_epi8_mask(pairs, bit(0)), low, step);
  const __m512i twice = _mm512_add_epi8(step, step);
  const __m512i paired = _mm512_mask_add_epi8(odd, _mm512_test_epi8_mask(pairs, bit(1)), odd, twice);
  return _mm512_mask_add_epi8(paired, third, paired, _mm512_add_epi8(twice, twice));
}

// The values that four neighbouring components share, for every key.
inline __m512i four_of(const uint8_t *values, int64_t group) {
  int32_t four;
  std::memcpy(&four, values + group * 4, 4);
  return _mm512_set1_epi32(four);
}

inline __m512i pairs_of(const uint8_t *run, int64_t group) {
  return _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(run + group * 32)));
}

// The third bits of a group's codes, for the keys of one half.
inline __mmask64 thirds_of(const IndexLayout &layout, const uint8_t *run, int64_t group, int half) {
  uint64_t thirds;
  std::memcpy(&thirds, run + layout.thirds() + group * 16 + half * 8, 8);
  return thirds;
}

// R rows at once share the keys of a run.
template <int R>
inline void score_run(const IndexLayout &layout, const uint8_t *run, const IndexedQueries &queries, int64_t row,
                      float *best) {
  __m512i sums[2][R];
  for (int r = 0; r < R; r++) sums[0][r] = sums[1][r] = _mm512_setzero_si512();
  const uint8_t *lows = run + layout.lows(), *steps = run + layout.steps();
  for (int64_t g = 0; g < layout.groups; g++) {
    const __m512i pairs = pairs_of(run, g), low = four_of(lows, g), step = four_of(steps, g);
    const __m512i keys[2] = {keys_of_group(pairs, thirds_of(layout, run, g, 0), 0, low, step),
                             keys_of_group(pairs, thirds_of(layout, run, g, 1), 1, low, step)};
    for (int r = 0; r < R; r++) {
      const auto *codes = reinterpret_cast<const uint8_t *>(queries.codes + (row + r) * layout.groups * 4);
      const __m512i query = four_of(codes, g);
      sums[0][r] = _mm512_dpbusd_epi32(sums[0][r], keys[0], query);
      sums[1][r] = _mm512_dpbusd_epi32(sums[1][r], keys[1], query);
    }
  }
  const float scale = scale_of(layout, run);
  for (int r = 0; r < R; r++) {
    const int32_t most = _mm512_reduce_max_epi32(_mm512_max_epi32(sums[0][r], sums[1][r]));
    const float score = static_cast<float>(most - index_offset * queries.sums[row + r]) * scale;
    best[r] = score > best[r] ? score : best[r];
  }
}

template <int R>
inline void score_rows_of_page(const IndexLayout &layout, const uint8_t *index, const IndexedQueries &queries,
                               int64_t row, float *scores, int64_t stride) {
  float best[R];
  for (int r = 0; r < R; r++) best[r] = -INFINITY;
  for (int64_t run = 0; run < layout.runs; run++)
    score_run<R>(layout, index + run * layout.run_bytes, queries, row, best);
  for (int r = 0; r < R; r++) scores[(row + r) * stride] = best[r];
}

void score_page(const IndexLayout &layout, const uint8_t *index, const IndexedQueries &queries, float *scores,
                int64_t stride) {
  int64_t row = 0;
  for (; row + 8 <= queries.rows; row += 8) score_rows_of_page<8>(layout, index, queries, row, scores, stride);
  for (; row + 3 <= queries.rows; row += 3) score_rows_of_page<3>(layout, index, queries, row, scores, stride);
  for (; row < queries.rows; row++) score_rows_of_page<1>(layout, index, queries, row, scores, stride);
}
#else
// The keys of a run in one group of components, in signed bytes: component i of key k is number 4 k + i.
inline void expand_group(const IndexLayout &layout, const uint8_t *run, int64_t group, int8_t *keys) {
  const uint8_t *lows = run + layout.lows() + group * 4, *steps = run + layout.steps() + group * 4;
  uint8_t low[32], step[32], pairs[32], thirds[16];
  for (int i = 0; i < 32; i++) low[i] = static_cast<uint8_t>(lows[i % 4] - index_offset), step[i] = steps[i % 4];
  std::memcpy(pairs, run + group * 32, 32);
  std::memcpy(thirds, run + layout.thirds() + group * 16, 16);
  for (int eight = 0; eight < 4; eight++) {
    for (int i = 0; i < 32; i++) {
      const auto code = static_cast<uint8_t>(pairs[i] >> (2 * eight));
      const auto once = static_cast<uint8_t>(-(code & 1) & step[i]);
      const auto twice = static_cast<uint8_t>(-((code >> 1) & 1) & (2 * step[i]));
      const int third = thirds[4 * eight + i / 8] >> (i % 8) & 1;
      const auto four = static_cast<uint8_t>(-third & (4 * step[i]));
      keys[32 * eight + i] = static_cast<int8_t>(low[i] + once + twice + four);
    }
  }
}

// sums (128,): of products of each component of a group's keys with those of a query, summed up for every second one.
inline void add_products(const int8_t *keys, const int8_t *query, int32_t *sums) {
#if defined(__AVX2__)
  int32_t four;
  std::memcpy(&four, query, 4);
  const __m256i wide_query = _mm256_cvtepi8_epi16(_mm_set1_epi32(four));
  for (int i = 0; i < 128; i += 16) {
    const __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i *>(keys + i)));
    auto *into = reinterpret_cast<__m256i *>(sums + i / 2);
    _mm256_storeu_si256(into, _mm256_add_epi32(_mm256_loadu_si256(into), _mm256_madd_epi16(wide, wide_query)));
  }
#else
  for (int i = 0; i < 64; i++) sums[i] += keys[2 * i] * query[2 * i % 4] + keys[2 * i + 1] * query[2 * i % 4 + 1];
#endif
}

void score_page(const IndexLayout &layout, const uint8_t *index, const IndexedQueries &queries, float *scores,
                int64_t stride) {
  int32_t sums[max_tile_rows][2 * index_run];
  for (int64_t number = 0; number < layout.runs; number++) {
    const uint8_t *run = index + number * layout.run_bytes;
    std::memset(sums, 0, static_cast<size_t>(queries.rows) * sizeof sums[0]);
    for (int64_t g = 0; g < layout.groups; g++) {
      int8_t keys[4 * index_run];
      expand_group(layout, run, g, keys);
      for (int64_t row = 0; row < queries.rows; row++)
        add_products(keys, queries.codes + (row * layout.groups + g) * 4, sums[row]);
    }
    for (int64_t row = 0; row < queries.rows; row++) {
      int32_t most = INT32_MIN;
      for (int key = 0; key < index_run; key++) {
        const int32_t dot = sums[row][2 * key] + sums[row][2 * key + 1];
        most = dot > most ? dot : most;
      }
      const float score = static_cast<float>(most) * scale_of(layout, run);
      float &best = scores[row * stride];
      best = number == 0 || score > best ? score : best;
    }
  }
}
#endif

void score_pages(const IndexLayout &layout, const PageIndices &pages, const IndexedQueries &queries, float *scores,
                 int64_t stride) {
  constexpr int64_t ahead = 8, line = 64;  // pages, whose indices are short and may be anywhere
  for (int64_t n = 0; n < pages.count; n++) {
    if (n + ahead < pages.count) {
      const uint8_t *next = pages.cells + pages.pages[n + ahead] * layout.bytes;
      for (int64_t i = 0; i < layout.bytes; i += line) __builtin_prefetch(next + i);
    }
    score_page(layout, pages.cells + pages.pages[n] * layout.bytes, queries, scores + n, stride);
  }
}

void choose_pages(const PageChoice &choice, int32_t *chosen) {
  float *combined = choice.combined;
  for (int64_t g = 0; g < choice.group; g++) {
    const float *scores = choice.scores + g * choice.stride;
    const float factor = choice.factors[g];
    const float most = largest_of(scores, choice.pages) * factor;
    const Vec factors = splat(factor), mosts = splat(most);
    int64_t n = choice.begin;
    for (; n + width <= choice.end; n += width) {
      const Vec score = sub(mul(load(scores + n), factors), mosts);
      store(combined + n, g == 0 ? score : max(score, load(combined + n)));
    }
    for (; n < choice.end; n++) {
      const float score = scores[n] * factor - most;
      combined[n] = g == 0 || score > combined[n] ? score : combined[n];
    }
  }
  int64_t count = 0;
  float *best = choice.best;
  const auto consider = [&](int64_t n) {
    const float score = combined[n];
    if (count == choice.count && !(score > best[count - 1])) return;
    int64_t at = count < choice.count ? count++ : count - 1;
    for (; at > 0 && score > best[at - 1]; at--) best[at] = best[at - 1], chosen[at] = chosen[at - 1];
    best[at] = score;
    chosen[at] = static_cast<int32_t>(n);
  };
  int64_t n = choice.begin;
  for (; n < choice.end && count < choice.count; n++) consider(n);
  for (; n + width <= choice.end; n += width) {
    unsigned better = bits(less(splat(best[count - 1]), load(combined + n)));
    for (; better; better &= better - 1) consider(n + __builtin_ctz(better));
  }
  for (; n < choice.end; n++) consider(n);
  for (int64_t i = 1; i < count; i++) {  // in order of their positions; no template that other levels share
    const int32_t page = chosen[i];
    int64_t at = i;
    for (; at > 0 && chosen[at - 1] > page; at--) chosen[at] = chosen[at - 1];
    chosen[at] = page;
  }
}

}  // namespace
}  // namespace mnemos
