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

// The index of a text's page, while that of a later page is fetched.
inline const uint8_t *index_of(const IndexLayout &layout, const PageIndices &pages, int64_t page) {
  constexpr int64_t ahead = 8, line = 64;
  if (page + ahead < pages.last) {
    const uint8_t *next = pages.cells + index_at(layout, pages.chunk_bytes, pages.table[page + ahead]);
    for (int64_t i = 0; i < layout.bytes; i += line) __builtin_prefetch(next + i);
  }
  return pages.cells + index_at(layout, pages.chunk_bytes, pages.table[page]);
}

// Moves n numbers, of which as many vectors as they begin are touched, one place further on.
template <typename T>
inline void move_on(T *x, int64_t n) {
  static_assert(sizeof(T) == sizeof(float));
  for (int64_t i = (n - 1) / width * width; i >= 0; i -= width) {
    T few[width];
    std::memcpy(few, x + i, sizeof few);
    std::memcpy(x + i + 1, few, sizeof few);
  }
}

// Adds a page to those that a query has named, all of which are before it, if its score is above the query's `least`.
inline void name_page(const Named &named, int64_t row, float score, int64_t page) {
  float *scores = named.scores + row * named.stride;
  int32_t *pages = named.pages + row * named.stride;
  const int64_t count = named.count;
  const Vec own = splat(score);
#if defined(__AVX512F__)
  if (count <= width) {
    const Vec all = load(scores);
    const Mask before = _knot_mask16(less(all, own)), at = static_cast<Mask>(before + 1);
    const auto add = [&](__m512i x, __m512i one) {
      return _mm512_mask_mov_epi32(_mm512_mask_mov_epi32(_mm512_alignr_epi32(x, x, width - 1), before, x), at, one);
    };
    store(scores, _mm512_castsi512_ps(add(_mm512_castps_si512(all), _mm512_castps_si512(own))));
    _mm512_storeu_si512(pages, add(_mm512_loadu_si512(pages), _mm512_set1_epi32(static_cast<int>(page))));
    named.least[row] = scores[count - 1];
    return;
  }
#endif
  int64_t at = 0;
  for (int64_t i = 0; i < count; i += width) at += width - __builtin_popcount(bits(less(load(scores + i), own)));
  if (at + 1 < count) move_on(scores + at, count - 1 - at), move_on(pages + at, count - 1 - at);
  scores[at] = score, pages[at] = static_cast<int32_t>(page);
  named.least[row] = scores[count - 1];
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

// Pages that queries of a token name, each with its score relative to that of the query's best page.
struct Union {
  int64_t wanted, found;
  float *scores;  // descending; of equal ones, the lower page comes first
  int32_t *pages;

  bool comes_before(float score, int32_t page, int64_t other) const {
    return score > scores[other] || (score == scores[other] && page < pages[other]);
  }
  void add(float score, int32_t page) {
    int64_t at = 0;
    while (at < found && pages[at] != page) at++;
    if (at < found ? !(score > scores[at]) : found == wanted && !comes_before(score, page, found - 1)) return;
    if (at == found) at = found < wanted ? found++ : found - 1;
    for (; at > 0 && comes_before(score, page, at - 1); at--) scores[at] = scores[at - 1], pages[at] = pages[at - 1];
    scores[at] = score, pages[at] = page;
  }
};

void choose_pages(const Named *parts, int64_t count, int64_t row, int64_t group, float *scratch, int32_t *chosen) {
  const int64_t wanted = parts->count, room = named_room(wanted);
  Union all{wanted, 0, scratch + 2 * room, reinterpret_cast<int32_t *>(scratch + 2 * room + wanted)};
  for (int64_t r = row; r < row + group; r++) {
    // What a query names in all parts; pages of later ones are higher.
    float most = parts->most[r], least = parts->least[r];
    const Named own{wanted, room, nullptr, nullptr, &least, scratch, reinterpret_cast<int32_t *>(scratch + room)};
    const float *scores = parts->scores + r * room;
    const int32_t *pages = parts->pages + r * room;
    if (count > 1) {
      std::memcpy(own.scores, scores, static_cast<size_t>(room) * sizeof(float));
      std::memcpy(own.pages, pages, static_cast<size_t>(room) * sizeof(int32_t));
      scores = own.scores, pages = own.pages;
    }
    for (const Named *part = parts + 1; part < parts + count; part++) {
      most = part->most[r] > most ? part->most[r] : most;
      const float *further = part->scores + r * room;
      for (int64_t i = 0; i < wanted && further[i] > least; i++)
        name_page(own, 0, further[i], part->pages[r * room + i]);
    }
    const float factor = parts->factors[r];
    most *= factor;
    for (int64_t i = 0; i < wanted && scores[i] > -INFINITY; i++) {
      const float score = scores[i] * factor - most;
      if (all.found == wanted && score < all.scores[wanted - 1]) break;
      all.add(score, pages[i]);
    }
  }
  for (int64_t i = 0; i < all.found; i++) {
    int64_t before = 0;
    for (int64_t j = 0; j < all.found; j++) before += all.pages[j] < all.pages[i];
    chosen[before] = all.pages[i];
  }
}

}  // namespace
}  // namespace mnemos
