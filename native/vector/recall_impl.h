// How well pages suit a row, from an index of their keys in 4 bits; see Recall in contract.py. All arithmetic is exact,
// in integers or in single float operations, so that the choice is the same with every instruction set.
#pragma once

#include "vector/vec.h"
#include "vector/vector_kernels.h"

namespace mnemos {
namespace {

#if defined(__AVX512VNNI__)
// R rows at once share the keys of a run.
template <int R>
inline void score_run(const IndexLayout &layout, const uint8_t *index, const IndexedQueries &queries, int64_t row,
                      Vec *best) {
  const __m512i low = _mm512_set1_epi8(15);
  __m512i even[R], odd[R];
  for (int r = 0; r < R; r++) even[r] = odd[r] = _mm512_setzero_si512();
  for (int64_t g = 0; g < layout.groups; g++) {
    const __m512i pairs = _mm512_loadu_si512(index + g * 64);
    const __m512i first = _mm512_and_si512(pairs, low), second = _mm512_and_si512(_mm512_srli_epi16(pairs, 4), low);
    for (int r = 0; r < R; r++) {
      int32_t four;
      std::memcpy(&four, queries.codes + (row + r) * layout.groups * 4 + g * 4, 4);
      const __m512i query = _mm512_set1_epi32(four);
      even[r] = _mm512_dpbusd_epi32(even[r], first, query);
      odd[r] = _mm512_dpbusd_epi32(odd[r], second, query);
    }
  }
  const auto scales = [&](int64_t half) {
    const auto *words = reinterpret_cast<const __m256i *>(index + layout.groups * 64 + half * 32);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(words)), 16));
  };
  const Vec even_scales = scales(0), odd_scales = scales(1);
  for (int r = 0; r < R; r++) {
    const __m512i offset = _mm512_set1_epi32(index_offset * queries.sums[row + r]);
    const Vec a = mul(_mm512_cvtepi32_ps(_mm512_sub_epi32(even[r], offset)), even_scales);
    const Vec b = mul(_mm512_cvtepi32_ps(_mm512_sub_epi32(odd[r], offset)), odd_scales);
    best[r] = max(max(a, b), best[r]);
  }
}

template <int R>
inline void score_rows_of_page(const IndexLayout &layout, const uint8_t *index, const IndexedQueries &queries,
                               int64_t row, float *scores, int64_t stride) {
  Vec best[R];
  for (int r = 0; r < R; r++) best[r] = splat(-INFINITY);
  for (int64_t run = 0; run < layout.runs; run++)
    score_run<R>(layout, index + run * layout.run_bytes, queries, row, best);
  for (int r = 0; r < R; r++) scores[(row + r) * stride] = largest(best[r]);
}

void score_page(const IndexLayout &layout, const uint8_t *index, const IndexedQueries &queries, float *scores,
                int64_t stride) {
  int64_t row = 0;
  for (; row + 8 <= queries.rows; row += 8) score_rows_of_page<8>(layout, index, queries, row, scores, stride);
  for (; row + 3 <= queries.rows; row += 3) score_rows_of_page<3>(layout, index, queries, row, scores, stride);
  for (; row < queries.rows; row++) score_rows_of_page<1>(layout, index, queries, row, scores, stride);
}
#else
void score_page(const IndexLayout &layout, const uint8_t *index, const IndexedQueries &queries, float *scores,
                int64_t stride) {
  for (int64_t row = 0; row < queries.rows; row++) {
    const int8_t *codes = queries.codes + row * layout.groups * 4;
    float best = -INFINITY;
    for (int64_t run = 0; run < layout.runs; run++) {
      const uint8_t *bytes = index + run * layout.run_bytes;
      int32_t even[16] = {}, odd[16] = {};
      for (int64_t g = 0; g < layout.groups; g++, bytes += 64) {
        for (int lane = 0; lane < 16; lane++) {
          for (int i = 0; i < 4; i++) {
            even[lane] += codes[g * 4 + i] * (bytes[lane * 4 + i] & 15);
            odd[lane] += codes[g * 4 + i] * (bytes[lane * 4 + i] >> 4);
          }
        }
      }
      uint16_t words[32];
      std::memcpy(words, bytes, sizeof words);
      for (int key = 0; key < 32; key++) {
        const uint32_t bits = static_cast<uint32_t>(words[key]) << 16;
        float scale;
        std::memcpy(&scale, &bits, 4);
        const int32_t dot = (key < 16 ? even[key] : odd[key - 16]) - index_offset * queries.sums[row];
        const float score = static_cast<float>(dot) * scale;
        best = score > best ? score : best;
      }
    }
    scores[row * stride] = best;
  }
}
#endif

void score_pages(const IndexLayout &layout, const PageIndices &pages, const IndexedQueries &queries, float *scores) {
  constexpr int64_t ahead = 8, line = 64;  // pages, whose indices are short and may be anywhere
  for (int64_t n = 0; n < pages.count; n++) {
    if (n + ahead < pages.count) {
      const uint8_t *next = pages.cells + pages.pages[n + ahead] * layout.bytes;
      for (int64_t i = 0; i < layout.bytes; i += line) __builtin_prefetch(next + i);
    }
    score_page(layout, pages.cells + pages.pages[n] * layout.bytes, queries, scores + n, pages.count);
  }
}

void choose_pages(const PageChoice &choice, int32_t *chosen) {
  float *combined = choice.combined;
  for (int64_t g = 0; g < choice.group; g++) {
    const float *scores = choice.scores + g * choice.stride;
    const float factor = choice.factors[g];
    const float most = largest_of(scores, choice.pages) * factor;
    for (int64_t n = choice.begin; n < choice.end; n++) {
      const float score = scores[n] * factor - most;
      combined[n] = g == 0 || score > combined[n] ? score : combined[n];
    }
  }
  int64_t count = 0;
  float *best = choice.best;
  for (int64_t n = choice.begin; n < choice.end; n++) {
    const float score = combined[n];
    if (count == choice.count && !(score > best[count - 1])) continue;
    int64_t at = count < choice.count ? count++ : count - 1;
    for (; at > 0 && score > best[at - 1]; at--) best[at] = best[at - 1], chosen[at] = chosen[at - 1];
    best[at] = score;
    chosen[at] = static_cast<int32_t>(n);
  }
  for (int64_t i = 1; i < count; i++) {  // in order of their positions; no template that other levels share
    const int32_t page = chosen[i];
    int64_t at = i;
    for (; at > 0 && chosen[at - 1] > page; at--) chosen[at] = chosen[at - 1];
    chosen[at] = page;
  }
}

}  // namespace
}  // namespace mnemos
