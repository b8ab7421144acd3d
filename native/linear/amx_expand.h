// Quantized weights as bfloat16 tiles of AMX, scales included; see amx_blocks.h.
//
// A code c of a block with scale s becomes the float16 number s * c, where a power of two has brought the largest scale
// of the row to between 2^4 and 2^5 (Matrix::raises). Those of layouts without minima but many bits become s * (c -
// offset); others stay positive, and what must be added is multiplied by the sum of the block's activations: a tile
// product has those of 32 blocks. A positive float16 number shifted right by 3 bits is a bfloat16 number 2^112 times
// smaller, without its last three bits: no conversion is needed. So that products are ordinary numbers, activations are
// multiplied by 2^48; the total is multiplied by the power of two that undoes all this.
#pragma once

#include "linear/avx512.h"

namespace mnemos {
namespace {

constexpr int64_t tile_bytes = 1024;

// Codes are expanded with their offset, so that nothing is to be added: fine codes, which would lose precision to it.
template <const Layout &L>
constexpr bool centred = !L.minimum() && L.bits() >= 6;

// Truncation loses half a unit of the last place on average, which scales make up for: 1 + 3 / 1024.
constexpr float mean_loss = 1.0029296875f;

struct alignas(64) PanelScales {
  uint16_t raise[32];  // float16: 2^k * mean_loss for each row, twice
  float undo[16];  // 2^(64 - k); NaN if a scale is not finite
};

inline void load_raises(const int8_t *raises, PanelScales &scales) {
  const __m512i k = _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(raises)));
  const __mmask16 finite = _mm512_cmpneq_epi32_mask(k, _mm512_set1_epi32(Matrix::not_finite));
  const __m512 power = _mm512_cvtepi32_ps(_mm512_maskz_mov_epi32(finite, k));
  const __m256i raise = _mm512_cvtps_ph(_mm512_scalef_ps(_mm512_set1_ps(mean_loss), power), _MM_FROUND_TO_NEAREST_INT);
  const __m512i twice = _mm512_cvtepu16_epi32(raise);
  _mm512_store_si512(scales.raise, _mm512_or_si512(twice, _mm512_slli_epi32(twice, 16)));
  const __m512 undo = _mm512_scalef_ps(_mm512_set1_ps(0x1p64f), _mm512_sub_ps(_mm512_setzero_ps(), power));
  _mm512_store_ps(scales.undo, _mm512_mask_mov_ps(_mm512_set1_ps(not_a_number), finite, undo));
}

// 16 numbers of 16 bits, each twice.
inline __m512i twice_each(__m256i halves) {
  const __m512i wide = _mm512_castsi256_si512(halves);
  const __m512i pairs = _mm512_set_epi16(15, 15, 14, 14, 13, 13, 12, 12, 11, 11, 10, 10, 9, 9, 8, 8, 7, 7, 6, 6, 5, 5,
                                         4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
  return _mm512_permutexvar_epi16(pairs, wide);
}
inline __m256i load_16_halves(const uint8_t *p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)); }
inline __m128i load_16_bytes(const uint8_t *p) { return _mm_loadu_si128(reinterpret_cast<const __m128i *>(p)); }

// The scales of one block of a record, for each pair of columns, and what is added for each unit of activation, as
// float16. One of each, or two for halves.
template <const Layout &L>
struct BlockScales {
  static constexpr int parts = L.halves() ? 2 : 1;
  __m512h scales[parts], added[parts];

  MNEMOS_INLINE BlockScales(const uint8_t *record, int block, const PanelScales &panel) {
    const uint8_t *subscales = record + L.group * L.code_bytes(), *minima = subscales + L.subscales() * 16;
    const uint8_t *supers = L.minimum() ? minima + L.subscales() * 16 : minima;
    const __m512h scale = raised(supers, panel);
    unroll<parts>([&](auto i) MNEMOS_INLINE {
      const int at = (block * parts + i) * 16;
      scales[i] = L.subscales() == 0 ? scale : _mm512_mul_ph(scale, integers(subscales + at));
      if constexpr (L.minimum()) {
        const __m512h minimum = raised(supers + 32, panel);
        added[i] = L.subscales() == 0 ? minimum : _mm512_mul_ph(negated(minimum), integers(minima + at));
      }
    });
  }

  // For layouts with an offset; and for scales below zero, which are turned round: their codes count from the other
  // end. Returns the bits of codes that change.
  MNEMOS_INLINE void turn(__m512i (&turned)[parts]) {
    constexpr int most = L.table ? 255 : (1 << L.bits()) - 1;
    unroll<parts>([&](auto i) MNEMOS_INLINE {
      const __m512i bits = _mm512_castph_si512(scales[i]);
      const __mmask32 negative = _mm512_movepi16_mask(bits);
      turned[i] = _mm512_maskz_set1_epi16(negative, most);
      scales[i] = _mm512_castsi512_ph(_mm512_and_si512(bits, _mm512_set1_epi16(0x7fff)));
      if constexpr (L.minimum())
        added[i] = _mm512_mask3_fmadd_ph(scales[i], _mm512_set1_ph(_Float16(-most)), added[i], negative);
      else
        added[i] = _mm512_mul_ph(scales[i], _mm512_mask_blend_ph(negative, _mm512_set1_ph(_Float16(-L.offset)),
                                                                 _mm512_set1_ph(_Float16(L.offset - most))));
    });
  }

 private:
  static MNEMOS_INLINE __m512h raised(const uint8_t *halves, const PanelScales &panel) {
    return _mm512_mul_ph(_mm512_castsi512_ph(twice_each(load_16_halves(halves))),
                         _mm512_castsi512_ph(_mm512_load_si512(panel.raise)));
  }
  static MNEMOS_INLINE __m512h integers(const uint8_t *bytes) {
    return _mm512_cvtepi16_ph(twice_each(_mm256_cvtepi8_epi16(load_16_bytes(bytes))));
  }
  static MNEMOS_INLINE __m512h negated(__m512h a) {
    return _mm512_castsi512_ph(_mm512_xor_si512(_mm512_castph_si512(a), _mm512_set1_epi16(short(0x8000))));
  }
};

// bfloat16 of float16, 2^112 times smaller, truncated.
inline MNEMOS_INLINE __m512i positive_bfloats(__m512h a) { return _mm512_srli_epi16(_mm512_castph_si512(a), 3); }
inline MNEMOS_INLINE __m512i bfloats(__m512h a) {
  return _mm512_and_si512(_mm512_srai_epi16(_mm512_castph_si512(a), 3), _mm512_set1_epi16(short(0x8fff)));
}

// Codes that were put into float16 numbers, which are First where the code is 0, times their scale.
template <const Layout &L, int First>
struct Multiplier {
  __m512h scale, start;

  MNEMOS_INLINE explicit Multiplier(__m512h by)
      : scale(by), start(_mm512_mul_ph(by, _mm512_set1_ph(_Float16(-First)))) {}
  MNEMOS_INLINE __m512i operator()(__m512i numbers) const {
    const __m512h number = _mm512_castsi512_ph(numbers);
    if constexpr (centred<L>)
      return bfloats(_mm512_mul_ph(_mm512_sub_ph(number, _mm512_set1_ph(_Float16(First + L.offset))), scale));
    else  // exact before it is rounded, and never below zero
      return positive_bfloats(_mm512_fmadd_ph(number, scale, start));
  }
};

// Block `block` of a record as a tile: a row for each pair of columns, of each four the first and the third, then the
// others. Returns what is added, unless all is in the codes.
template <const Layout &L, bool Turned>
inline MNEMOS_INLINE void expand_block(const uint8_t *record, int block, const PanelScales &panel, uint8_t *rows,
                                       __m512h *added) {
  constexpr int parts = L.halves() ? 2 : 1;
  const uint8_t *source = record + block * L.code_bytes();
  BlockScales<L> by(record, block, panel);
  // 1024 and 64 in float16: the last bits count ones, or those before the last four.
  const __m512i ones = _mm512_set1_epi16(0x6400), sixteenths = _mm512_set1_epi16(0x5400);
  constexpr int and_xor = 0x6a;  // (first and second) xor third
  __m512i turned[parts] = {};
  if constexpr (Turned) by.turn(turned);
  const auto store = [&](int row, __m512i vector) MNEMOS_INLINE { _mm512_store_si512(rows + row * 64, vector); };
  if constexpr (L.base == 4 && L.high == 0 && !L.table) {
    const Multiplier<L, 1024> low(by.scales[0]);
    const Multiplier<L, 64> high(by.scales[0]);
    const __m512i low_start = Turned ? _mm512_xor_si512(ones, turned[0]) : ones;
    const __m512i high_start = Turned ? _mm512_xor_si512(sixteenths, _mm512_slli_epi16(turned[0], 4)) : sixteenths;
    const __m512i low_codes = _mm512_set1_epi16(0x0f), high_codes = _mm512_set1_epi16(0xf0);
    const __m512i odd_bytes =
        _mm512_broadcast_i32x4(_mm_setr_epi8(1, -1, 3, -1, 5, -1, 7, -1, 9, -1, 11, -1, 13, -1, 15, -1));
    unroll<4>([&](auto v) MNEMOS_INLINE {
      const __m512i even = _mm512_loadu_si512(source + v * 64), odd = _mm512_shuffle_epi8(even, odd_bytes);
      store(2 * v, low(_mm512_ternarylogic_epi32(even, low_codes, low_start, and_xor)));
      store(2 * v + 8, high(_mm512_ternarylogic_epi32(even, high_codes, high_start, and_xor)));
      store(2 * v + 1, low(_mm512_ternarylogic_epi32(odd, low_codes, low_start, and_xor)));
      store(2 * v + 9, high(_mm512_ternarylogic_epi32(odd, high_codes, high_start, and_xor)));
    });
  } else {
    const Multiplier<L, 1024> first_half(by.scales[0]), second_half(by.scales[parts - 1]);
    HighBits<Avx512, L> high(source);
#pragma GCC unroll 4
    for (int turn = 0; turn < turns<L>; turn++, high.advance())
      unroll<8 / turns<L>>([&](auto i) MNEMOS_INLINE {
        constexpr int half = i * turns<L> / 4;
        const __m512i codes = code_vector<Avx512, L, i>(source, high, turn);
        const __m512i start = Turned ? _mm512_xor_si512(ones, turned[half * (parts - 1)]) : ones;
        const auto &multiply = half == 0 ? first_half : second_half;
        const int row = 2 * (turn + i * turns<L>);
        store(row, multiply(_mm512_ternarylogic_epi32(codes, _mm512_set1_epi16(0xff), start, and_xor)));
        store(row + 1, multiply(_mm512_xor_si512(_mm512_srli_epi16(codes, 8), start)));
      });
  }
  if constexpr (!centred<L>)
    for (int i = 0; i < parts; i++) added[i] = by.added[i];
}

// Turns P panels into tiles, one after the other: those of blocks, and after each 32 blocks (16, if they have halves),
// or the last one, that of what they add.
template <const Layout &L, int P>
class TileSource {
 public:
  TileSource(const Matrix &matrix, int64_t panel, int64_t padded)
      : places_{matrix.places(panel), 0}, blocks_(matrix.stored_blocks(panel)),
        sums_column_(L.halves() ? sums_row(padded).half_sums : sums_row(padded).block_sums) {
    for (int p = 0; p < P; p++) {
      records_[p] = matrix.panel(panel + p);
      load_raises(matrix.raises(panel + p), scales_[p]);
      negative_[p] = !L.minimum() || matrix.turns(panel + p);
    }
  }

  bool done() const { return at_ == blocks_ && !pending_; }
  // How many of the panel's blocks have been expanded.
  int64_t expanded() const { return at_; }

  // The next tile of each panel goes to tiles[p]; returns the first of its columns among an input's cells.
  MNEMOS_INLINE int64_t next(uint8_t *const *tiles) {
    if (!centred<L> && pending_) {
      for (int p = 0; p < P; p++) memcpy(tiles[p], sums_[p], tile_bytes);
      pending_ = false;
      return sums_column_ + group_ * 32;
    }
    const int64_t place = places_[at_];
    const int block = int(at_ % L.group);
    if constexpr (!centred<L>) {
      if (place / group_blocks != group_ || at_ == 0) {
        group_ = place / group_blocks;
        memset(sums_, 0, sizeof sums_);
      }
    }
    unroll<P>([&](auto p) MNEMOS_INLINE {
      __m512h added[2];
      if (!L.minimum() || negative_[p])
        expand_block<L, !centred<L>>(records_[p], block, scales_[p], tiles[p], added);
      else
        expand_block<L, false>(records_[p], block, scales_[p], tiles[p], added);
      if constexpr (!centred<L>) add(p, place, added);
      constexpr int share = L.record_bytes() / L.group;
      for (int ahead = 0; ahead < share; ahead += 64)
        __builtin_prefetch(records_[p] + prefetch_bytes + block * share + ahead);
      if (block == L.group - 1) records_[p] += L.record_bytes();
    });
    at_++;
    if constexpr (!centred<L>) {
      pending_ = at_ == blocks_ || places_[at_] / group_blocks != group_;
      if (!L.halves() && pending_ && place % 2 == 0)
        for (int p = 0; p < P; p++) store_added(p, place, even_[p], _mm512_setzero_ph());
    }
    return place * 32;
  }

 private:
  static constexpr int64_t group_blocks = L.halves() ? 16 : 32;

  MNEMOS_INLINE void add(int p, int64_t place, const __m512h *added) {
    if (L.halves()) return store_added(p, place, added[0], added[1]);
    if (place % 2 != 0) store_added(p, place, even_[p], added[0]);
    even_[p] = added[0];
  }
  MNEMOS_INLINE void store_added(int p, int64_t place, __m512h first, __m512h second) {
    const int64_t row = L.halves() ? place % 16 : place % 32 / 2;
    _mm512_store_si512(sums_[p] + row * 64, bfloats(_mm512_mask_blend_ph(0xaaaaaaaa, first, second)));
  }

  const Places places_;
  const int64_t blocks_, sums_column_;
  const uint8_t *records_[P];
  PanelScales scales_[P];
  bool negative_[P];
  int64_t at_ = 0, group_ = 0;
  bool pending_ = false;
  __m512h even_[P] = {};
  alignas(64) uint8_t sums_[P][tile_bytes];

 public:
  const PanelScales &scales(int p) const { return scales_[p]; }
};

}  // namespace
}  // namespace mnemos
