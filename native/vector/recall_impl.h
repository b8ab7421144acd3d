// How well pages suit queries, from an index of their keys in 3 bits; see Recall in contract.py. All arithmetic is
// exact, in integers or in single float operations, so that the choice is the same with every instruction set.
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

// The index of a text's page, while those of the next pages, which may be anywhere, are fetched.
inline const uint8_t *index_of(const IndexLayout &layout, const PageIndices &pages, int64_t page) {
  constexpr int64_t ahead = 32, line = 64;  // and not into the first level: more lines can be on their way
  if (page + ahead < pages.last) {
    const uint8_t *next = pages.cells + pages.table[page + ahead] * layout.bytes;
    for (int64_t i = 0; i < layout.bytes; i += line) __builtin_prefetch(next + i, 0, 2);
  }
  return pages.cells + pages.table[page] * layout.bytes;
}

// Drops all but the `count` best pages that a query has named, the first of equal ones being better: those than which
// fewer are better. The others keep their order. Rare, and not to be in the way of what calls it.
__attribute__((noinline)) void keep_best(const Named &named, int64_t row) {
  constexpr unsigned lanes = (1u << width) - 1;
  float *scores = named.scores + row * named.stride;
  int32_t *pages = named.pages + row * named.stride;
  const int64_t found = named.found[row];
  for (int64_t i = found; i < named.stride; i++) scores[i] = -INFINITY;
  // Equal scores are rare, and are only looked for where too many pages would stay.
  const auto drop = [&](auto &&better_than) {
    int64_t left = 0;
    for (int64_t i = 0; i < found; i++) {
      const Vec own = splat(scores[i]);
      int64_t better = 0;
      for (int64_t j = 0; j < found; j += width) better += __builtin_popcount(better_than(own, load(scores + j), i, j));
      if (better >= named.count) pages[i] = -1;
      left += better < named.count;
    }
    return left;
  };
  const auto larger = [](Vec own, Vec others, int64_t, int64_t) { return bits(less(own, others)); };
  const auto larger_or_earlier = [](Vec own, Vec others, int64_t i, int64_t j) {
    const unsigned earlier = j >= i ? 0 : i - j >= width ? lanes : (1u << (i - j)) - 1;
    return (bits(less(own, others)) & ~earlier) | (~bits(less(others, own)) & earlier);
  };
  if (drop(larger) > named.count) drop(larger_or_earlier);
  int64_t kept = 0;
  float least = INFINITY;
  for (int64_t i = 0; i < found; i++) {
    if (pages[i] < 0) continue;
    least = scores[i] < least ? scores[i] : least;
    scores[kept] = scores[i], pages[kept++] = pages[i];
  }
  named.found[row] = static_cast<int32_t>(kept);
  named.least[row] = least;
}

inline void name_page(const Named &named, int64_t row, float score, int64_t page) {
  int32_t &found = named.found[row];
  const int64_t at = row * named.stride + found;
  named.scores[at] = score, named.pages[at] = static_cast<int32_t>(page);
  if (++found == 2 * named.count) keep_best(named, row);
}

inline bool can_name(const NamingQueries &queries, int64_t page) { return page >= queries.begin && page < queries.end; }

// Adds a page, whose scores are those of `rows` queries from `row` on.
inline void add_scores(const NamingQueries &queries, int64_t row, int64_t rows, const float *scores, int64_t page) {
  for (int64_t r = 0; r < rows; r++) {
    float &most = queries.named.most[row + r];
    most = scores[r] > most ? scores[r] : most;
    if (scores[r] > queries.named.least[row + r] && can_name(queries, page))
      name_page(queries.named, row + r, scores[r], page);
  }
}

constexpr int64_t group_bytes = 4 * index_half;  // of 16 keys in one group of components, in bytes each

#if defined(__AVX512VNNI__)
// The values that four neighbouring components share, for every key.
inline __m512i four_of(const void *values) {
  int32_t four;
  std::memcpy(&four, values, 4);
  return _mm512_set1_epi32(four);
}

// The keys of both halves of a run in four groups of components from `group` on, their lowest values less Offset.
template <int Offset>
inline void keys_of_groups(const IndexLayout &layout, const uint8_t *run, int64_t group, __m512i (*keys)[4]) {
  const __m512i pairs[2] = {_mm512_loadu_si512(run + group * 16), _mm512_loadu_si512(run + layout.half() + group * 16)};
  for (int g = 0; g < 4; g++) {
    __m512i low = four_of(run + layout.lows() + (group + g) * 4);
    if (Offset != 0) low = _mm512_sub_epi8(low, _mm512_set1_epi8(static_cast<char>(Offset)));
    const __m512i step = four_of(run + layout.steps() + (group + g) * 4), twice = _mm512_add_epi8(step, step);
    const __m512i four = _mm512_add_epi8(twice, twice);
    for (int half = 0; half < 2; half++) {
      uint64_t thirds;
      std::memcpy(&thirds, run + half * layout.half() + layout.thirds() + (group + g) * 8, 8);
      const auto bit = [&](int number) {
        return _mm512_test_epi8_mask(pairs[half], _mm512_set1_epi8(static_cast<char>(1 << (2 * g + number))));
      };
      const __m512i odd = _mm512_mask_add_epi8(low, bit(0), low, step);
      const __m512i even = _mm512_mask_add_epi8(odd, bit(1), odd, twice);
      keys[half][g] = _mm512_mask_add_epi8(even, thirds, even, four);
    }
  }
}

// The largest of each of four vectors.
inline __m128i largest_of_four(__m512i a, __m512i b, __m512i c, __m512i d) {
  const __m512i ab = _mm512_max_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
  const __m512i cd = _mm512_max_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
  const __m512i all = _mm512_max_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
  const __m256i half = _mm256_max_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
  return _mm_max_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

// Of R rows at once, of the same 16 columns: their scores in a run, whose keys, with index_offset added, keys_at(group)
// gives for both halves and four groups.
template <int R, typename Keys>
inline void score_with(const IndexLayout &layout, float scale, const NamingQueries &queries, int64_t row, float *scores,
                       const Keys &keys_at) {
  const int8_t *columns =
      queries.columns + row / query_columns * layout.groups * group_bytes + row % query_columns * 4;
  __m512i sums[2][4];
  for (int r = 0; r < 4; r++) sums[0][r] = sums[1][r] = _mm512_setzero_si512();
  for (int64_t group = 0; group < layout.groups; group += 4) {
    __m512i keys[2][4];
    keys_at(group, keys);
    for (int g = 0; g < 4; g++) {
      for (int r = 0; r < R; r++) {
        const __m512i query = four_of(columns + (group + g) * group_bytes + 4 * r);
        sums[0][r] = _mm512_dpbusd_epi32(sums[0][r], keys[0][g], query);
        sums[1][r] = _mm512_dpbusd_epi32(sums[1][r], keys[1][g], query);
      }
    }
  }
  for (int r = 0; r < 4; r++) sums[0][r] = _mm512_max_epi32(sums[0][r], sums[1][r]);
  const __m128i code_sums = _mm_loadu_si128(reinterpret_cast<const __m128i *>(queries.sums + row));
  const __m128i offsets = _mm_mullo_epi32(code_sums, _mm_set1_epi32(index_offset));
  const __m128i most = _mm_sub_epi32(largest_of_four(sums[0][0], sums[0][1], sums[0][2], sums[0][3]), offsets);
  _mm_storeu_ps(scores, _mm_mul_ps(_mm_cvtepi32_ps(most), _mm_set1_ps(scale)));
}

template <int R>
inline void score_rows(const IndexLayout &layout, const uint8_t *keys, float scale, const NamingQueries &queries,
                       int64_t row, float *scores) {
  score_with<R>(layout, scale, queries, row, scores, [&](int64_t group, __m512i (*both)[4]) {
    for (int64_t half = 0; half < 2; half++) {
      for (int64_t g = 0; g < 4; g++)
        both[half][g] = _mm512_load_si512(keys + (half * layout.groups + group + g) * group_bytes);
    }
  });
}

inline void expand_run(const IndexLayout &layout, const uint8_t *run, uint8_t *keys) {
  for (int64_t group = 0; group < layout.groups; group += 4) {
    __m512i both[2][4];
    keys_of_groups<0>(layout, run, group, both);
    for (int64_t half = 0; half < 2; half++) {
      for (int64_t g = 0; g < 4; g++)
        _mm512_store_si512(keys + (half * layout.groups + group + g) * group_bytes, both[half][g]);
    }
  }
}

// One token's queries, of which there are R: keys stay in registers.
template <int R>
inline void name_for_token(const IndexLayout &layout, const PageIndices &pages, const NamingQueries &queries) {
  const int64_t last = queries.pages < pages.last ? queries.pages : pages.last;
  for (int64_t page = pages.first; page < last; page++) {
    const uint8_t *index = index_of(layout, pages, page);
    float best[4], scores[4];
    for (int64_t n = 0; n < layout.runs; n++) {
      const uint8_t *run = index + n * layout.run_bytes;
      score_with<R>(layout, scale_of(layout, run), queries, 0, n == 0 ? best : scores,
                    [&](int64_t group, __m512i (*both)[4]) { keys_of_groups<0>(layout, run, group, both); });
      for (int r = 0; n > 0 && r < R; r++) best[r] = scores[r] > best[r] ? scores[r] : best[r];
    }
    add_scores(queries, 0, R, best, page);
  }
}
#else
// The keys of half a run in one group of components, in signed bytes: component i of key k is number 4 k + i.
inline void expand_group(const IndexLayout &layout, const uint8_t *run, int64_t half, int64_t group, int8_t *keys) {
  const uint8_t *lows = run + layout.lows() + group * 4, *steps = run + layout.steps() + group * 4;
  const uint8_t *own = run + half * layout.half();
  const uint8_t *pairs = own + group / 4 * 64, *thirds = own + layout.thirds() + group * 8;
  const int shift = static_cast<int>(group % 4 * 2);
  for (int i = 0; i < group_bytes; i++) {
    const int code = (pairs[i] >> shift & 3) | (thirds[i / 8] >> (i % 8) & 1) << 2;
    keys[i] = static_cast<int8_t>(lows[i % 4] - index_offset + code * steps[i % 4]);
  }
}

// sums (32,) += products of each component of a group's keys with those of a query, summed up for every second one.
inline void add_products(const int8_t *keys, const int8_t *query, int32_t *sums) {
#if defined(__AVX2__)
  int32_t four;
  std::memcpy(&four, query, 4);
  const __m256i wide_query = _mm256_cvtepi8_epi16(_mm_set1_epi32(four));
  for (int i = 0; i < group_bytes; i += 16) {
    const __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i *>(keys + i)));
    auto *into = reinterpret_cast<__m256i *>(sums + i / 2);
    _mm256_storeu_si256(into, _mm256_add_epi32(_mm256_loadu_si256(into), _mm256_madd_epi16(wide, wide_query)));
  }
#else
  for (int i = 0; i < group_bytes / 2; i++)
    sums[i] += keys[2 * i] * query[2 * i % 4] + keys[2 * i + 1] * query[2 * i % 4 + 1];
#endif
}

template <int R>
inline void score_rows(const IndexLayout &layout, const uint8_t *keys, float scale, const NamingQueries &queries,
                       int64_t row, float *scores) {
  for (int r = 0; r < R; r++) {
    const int8_t *columns =
        queries.columns + (row + r) / query_columns * layout.groups * group_bytes + (row + r) % query_columns * 4;
    int32_t most = INT32_MIN;
    for (int64_t half = 0; half < 2; half++) {
      const auto *own = reinterpret_cast<const int8_t *>(keys) + half * layout.groups * group_bytes;
      int32_t sums[group_bytes / 2] = {};
      for (int64_t g = 0; g < layout.groups; g++) add_products(own + g * group_bytes, columns + g * group_bytes, sums);
      for (int key = 0; key < index_half; key++) {
        const int32_t dot = sums[2 * key] + sums[2 * key + 1];
        most = dot > most ? dot : most;
      }
    }
    scores[r] = static_cast<float>(most) * scale;
  }
}

inline void expand_run(const IndexLayout &layout, const uint8_t *run, uint8_t *keys) {
  for (int64_t half = 0; half < 2; half++) {
    for (int64_t g = 0; g < layout.groups; g++, keys += group_bytes)
      expand_group(layout, run, half, g, reinterpret_cast<int8_t *>(keys));
  }
}
#endif

void name_pages(const IndexLayout &layout, const PageIndices &pages, const NamingQueries *sets, int64_t count) {
#if defined(__AVX512VNNI__)
  if (count == 1 && sets->rows <= 4) {
    if (sets->rows == 4) return name_for_token<4>(layout, pages, *sets);
    if (sets->rows == 3) return name_for_token<3>(layout, pages, *sets);
    if (sets->rows == 2) return name_for_token<2>(layout, pages, *sets);
    return name_for_token<1>(layout, pages, *sets);
  }
#endif
  const int64_t run_keys = 2 * layout.groups * group_bytes;
  for (int64_t page = pages.first; page < pages.last; page++) {
    const uint8_t *index = index_of(layout, pages, page);
    for (int64_t run = 0; run < layout.runs; run++)
      expand_run(layout, index + run * layout.run_bytes, pages.expanded + run * run_keys);
    for (const NamingQueries *set = sets; set < sets + count; set++) {
      for (int64_t row = 0; page < set->pages && row < set->rows; row += 4) {
        float best[4], scores[4];
        const int64_t rows = set->rows - row < 4 ? set->rows - row : 4;
        for (int64_t run = 0; run < layout.runs; run++) {
          const uint8_t *keys = pages.expanded + run * run_keys;
          const float scale = scale_of(layout, index + run * layout.run_bytes);
          float *into = run == 0 ? best : scores;
          if (rows == 4) {
            score_rows<4>(layout, keys, scale, *set, row, into);
          } else if (rows == 3) {
            score_rows<3>(layout, keys, scale, *set, row, into);
          } else {
            score_rows<2>(layout, keys, scale, *set, row, into);
          }
          for (int64_t r = 0; run > 0 && r < rows; r++) best[r] = scores[r] > best[r] ? scores[r] : best[r];
        }
        add_scores(*set, row, rows, best, page);
      }
    }
  }
}

}  // namespace
}  // namespace mnemos
