// Products of quantized weights by activations in bfloat16 (Form::bf16_sums), with bfloat16 tiles of AMX: weights are
// expanded to bfloat16, scales included, so that sums stay in a tile from the first column to the last. See amx_float.h
// for what a tile product computes.
//
// A code c of a block with scale s becomes the float16 number s * c, where a power of two has brought the largest scale
// of the row to between 2^4 and 2^5 (Matrix::raises). Those of layouts without minima but many bits become s * (c -
// offset); others stay positive, and what must be added is multiplied by the sum of the block's activations: a tile
// product has those of 32 blocks. A positive float16 number shifted right by 3 bits is a bfloat16 number 2^112 times
// smaller, without its last three bits: no conversion is needed. So that products are ordinary numbers, activations are
// multiplied by 2^48; the total is multiplied by the power of two that undoes all this.
//
// Cycles on Sapphire Rapids, measured: a block of 4-bit codes takes 47 to expand and to multiply by one row. At least
// 32 of them are 16 multiply-adds and 16 shifts by 3, which go to the same unit while tiles are in use. Memory delivers
// a block in about 39. 16 rows by 16 outputs and 32 columns take 16 in the tile unit, and about 23 with their loads.
#pragma once

#include "linear/amx_tiles.h"
#include "linear/avx512.h"

namespace mnemos {
namespace {

constexpr int64_t tile_rows_most = 16, tile_bytes = 1024;
// Tile products of a chunk: two panels' weights take 40 KB, and activations pass by the level-1 cache.
constexpr int chunk_steps = 20;
// Tiles of rows that are multiplied by a chunk of weights; their sums stay in the second-level cache.
constexpr int most_row_tiles = 17;
// Up to this many tiles of rows are multiplied while weights are expanded, these many products later.
constexpr int streamed_tiles = 2, stream_lag = 2, stream_slots = 4;

// Tiles: 2t + p is the sum of row tile t and panel p, 4 + p weights of panel p, 6 + t rows of t.
constexpr int block_weights = 4, block_inputs = 6;

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

// Rows of a call: tiles of the same height, the last of which overlaps the one before rather than being lower.
struct RowTiles {
  int64_t begin, end, height;

  RowTiles(int64_t begin, int64_t end) : begin(begin), end(end), height(smaller(end - begin, tile_rows_most)) {}
  int64_t count() const { return (end - begin + tile_rows_most - 1) / tile_rows_most; }
  int64_t row(int64_t tile) const { return smaller(begin + tile * tile_rows_most, end - height); }
  int64_t repeated(int64_t tile) const { return begin + tile * tile_rows_most - row(tile); }
};

// Rows of a tile of sums go to the results.
inline void finish_tile(const Matrix &matrix, const float (&sums)[16][16], const PanelScales &scales, int64_t panel,
                        const RowTiles &rows, int64_t tile, const Results &results) {
  const int64_t column = panel * panel_rows, filled = smaller(matrix.rows - column, panel_rows);
  const auto mask = static_cast<__mmask16>((1u << filled) - 1);
  const __m512 undo = _mm512_load_ps(scales.undo);
  for (int64_t r = rows.repeated(tile), row = rows.row(tile) + r; r < rows.height; r++, row++) {
    const float *starts = results.starts;
    const __m512 start = starts == nullptr ? _mm512_setzero_ps()
                                           : _mm512_maskz_loadu_ps(mask, starts + row * results.start_stride + column);
    const __m512 total = _mm512_fmadd_ps(_mm512_load_ps(sums[r]), undo, start);
    _mm512_mask_storeu_ps(results.y + row * results.stride + column, mask, total);
  }
}

template <int Tile, bool Passing>
inline void load_inputs(const void *rows, int64_t stride) {
  if constexpr (Passing)
    AmxTiles::load_passing<Tile>(rows, stride);
  else
    AmxTiles::load<Tile>(rows, stride);
}

// One tile of P panels by T tiles of rows, from their column on. Passing: the rows do not fit into the level-1 cache.
template <int T, int P, bool Passing>
inline MNEMOS_INLINE void multiply_tiles(const uint8_t *const *weights, const uint16_t *const *x, int64_t column,
                                         int64_t row_bytes) {
  AmxTiles::load<block_weights>(weights[0], 64);
  load_inputs<block_inputs, Passing>(x[0] + column, row_bytes);
  AmxTiles::dot_bfloats<0, block_inputs, block_weights>();
  if constexpr (P == 2) {
    AmxTiles::load<block_weights + 1>(weights[1], 64);
    AmxTiles::dot_bfloats<1, block_inputs, block_weights + 1>();
  }
  if constexpr (T == 2) {
    load_inputs<block_inputs + 1, Passing>(x[1] + column, row_bytes);
    AmxTiles::dot_bfloats<2, block_inputs + 1, block_weights>();
    if constexpr (P == 2) AmxTiles::dot_bfloats<3, block_inputs + 1, block_weights + 1>();
  }
}

// All rows are few: they are multiplied by each tile soon after it was expanded.
template <const Layout &L, int T, int P>
MNEMOS_KERNEL void stream_blocks(const Matrix &matrix, const Input &input, const RowTiles &rows, int64_t panel,
                                 const Results &results) {
  TileSource<L, P> source(matrix, panel, input.padded);
  const int64_t cells = sums_row(input.padded).cells;
  alignas(64) uint8_t slots[stream_slots][P][tile_bytes];
  int64_t columns[stream_slots];
  const uint16_t *x[T];
  for (int t = 0; t < T; t++) x[t] = input.halves + rows.row(t) * cells;
  unroll<T>([&](auto t) { unroll<P>([&](auto p) { AmxTiles::zero<2 * t + p>(); }); });
  const auto multiply = [&](int64_t step) MNEMOS_INLINE {
    const uint8_t *weights[P];
    for (int p = 0; p < P; p++) weights[p] = slots[step % stream_slots][p];
    multiply_tiles<T, P, false>(weights, x, columns[step % stream_slots], cells * 2);
  };
  int64_t step = 0;
  for (; !source.done(); step++) {
    if (step >= stream_lag) multiply(step - stream_lag);
    uint8_t *tiles[P];
    for (int p = 0; p < P; p++) tiles[p] = slots[step % stream_slots][p];
    columns[step % stream_slots] = source.next(tiles);
  }
  for (int64_t last = step < stream_lag ? 0 : step - stream_lag; last < step; last++) multiply(last);
  alignas(64) float sums[16][16];
  unroll<T>([&](auto t) {
    unroll<P>([&](auto p) {
      AmxTiles::store<2 * t + p>(sums, 64);
      finish_tile(matrix, sums, source.scales(p), panel + p, rows, t, results);
    });
  });
}

// Many rows: a chunk of tiles is expanded, then all rows are multiplied by it.
template <const Layout &L, int P>
MNEMOS_KERNEL void multiply_blocks(const Matrix &matrix, const Input &input, const RowTiles &rows, int64_t panel,
                                   const Results &results) {
  TileSource<L, P> source(matrix, panel, input.padded);
  const int64_t cells = sums_row(input.padded).cells, count = rows.count();
  alignas(64) float sums[most_row_tiles][P][16][16];
  alignas(64) uint8_t chunk[chunk_steps][P][tile_bytes];
  int64_t columns[chunk_steps];
  const int64_t all = matrix.stored_blocks(panel), estimate = all + (centred<L> ? 0 : (all + 31) / 32);
  const int64_t chunks = (estimate + chunk_steps - 1) / chunk_steps, even = (estimate + chunks - 1) / chunks;
  for (bool first = true; !source.done(); first = false) {
    int64_t steps = 0;
    for (; steps < even && !source.done(); steps++) {
      uint8_t *tiles[P];
      for (int p = 0; p < P; p++) tiles[p] = chunk[steps][p];
      columns[steps] = source.next(tiles);
    }
    const bool last = source.done();
    // The next chunk's codes, or the next panels'.
    const int64_t from = source.expanded() / L.group * L.record_bytes();
    Prefetch prefetch{{}, even / L.group * L.record_bytes() + L.record_bytes(), 0, 0, input.ahead};
    prefetch.step = (prefetch.bytes / (steps * ((count + 1) / 2)) + 63) / 64 * 64;
    for (int p = 0; p < P; p++) prefetch.next[p] = last ? matrix.panel(panel + P + p) : matrix.panel(panel + p) + from;
    const auto multiply = [&](auto tiles, int64_t tile) MNEMOS_INLINE {
      constexpr int T = tiles;
      if (input.ahead != nullptr) input.ahead->refill();
      const uint16_t *x[T];
      for (int t = 0; t < T; t++) x[t] = input.halves + rows.row(tile + t) * cells;
      unroll<T>([&](auto t) {
        unroll<P>([&](auto p) {
          if (first)
            AmxTiles::zero<2 * t + p>();
          else
            AmxTiles::load<2 * t + p>(sums[tile + t][p], 64);
        });
      });
      for (int64_t step = 0; step < steps; step++) {
        const uint8_t *weights[P];
        for (int p = 0; p < P; p++) weights[p] = chunk[step][p];
        multiply_tiles<T, P, true>(weights, x, columns[step], cells * 2);
        prefetch.advance(P);
      }
      unroll<T>([&](auto t) { unroll<P>([&](auto p) { AmxTiles::store<2 * t + p>(sums[tile + t][p], 64); }); });
      if (last)
        for (int t = 0; t < T; t++)
          for (int p = 0; p < P; p++)
            finish_tile(matrix, sums[tile + t][p], source.scales(p), panel + p, rows, tile + t, results);
    };
    int64_t tile = 0;
    for (; tile + 1 < count; tile += 2) multiply(std::integral_constant<int, 2>{}, tile);
    if (tile < count) multiply(std::integral_constant<int, 1>{}, tile);
  }
}

template <const Layout &L>
void multiply_quantized_tiles(const Matrix &matrix, const Input &input, int64_t row_begin, int64_t row_end,
                              int64_t panel_begin, int64_t panel_end, const Results &results) {
  ConfiguredTiles configured;
  for (int64_t row = row_begin; row < row_end;) {
    const RowTiles rows(row, smaller(row_end, row + most_row_tiles * tile_rows_most));
    if (row == row_begin || rows.height < tile_rows_most) {
      TileShapes shapes;
      for (int tile = 0; tile < 8; tile++) {
        const bool weights = tile >= block_weights && tile < block_inputs;
        shapes.rows[tile] = uint8_t(weights ? 16 : rows.height), shapes.row_bytes[tile] = 64;
      }
      configured.configure(shapes);
    }
    for_like_panels<2>(matrix, panel_begin, panel_end, [&](auto panels, int64_t panel) {
      constexpr int P = panels;
      if (rows.count() == 1)
        stream_blocks<L, 1, P>(matrix, input, rows, panel, results);
      else if (rows.count() == 2)
        stream_blocks<L, 2, P>(matrix, input, rows, panel, results);
      else
        multiply_blocks<L, P>(matrix, input, rows, panel, results);
    });
    row = rows.end;
  }
}

// Rounds columns to bfloat16 and adds up blocks, in the form of `SumsRow`.
inline void prepare_sums(const Input &input, const float *x, int64_t x_stride, int64_t row_begin, int64_t row_end,
                         int64_t column_begin, int64_t column_end) {
  const SumsRow layout = sums_row(input.padded);
  const __m512i order = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15));
  const __m512 raise = _mm512_set1_ps(0x1p48f), zero = _mm512_setzero_ps();
  const auto ones = reinterpret_cast<__m512bh>(_mm512_set1_epi16(0x3f80));
  for (int64_t row = row_begin; row < row_end; row++) {
    const float *source = x + row * x_stride;
    uint16_t *cells = input.halves + row * layout.cells;
    for (int64_t b = column_begin / 32; b < column_end / 32; b++) {
      __m512 low = _mm512_mul_ps(_mm512_loadu_ps(source + b * 32), raise);
      __m512 high = _mm512_mul_ps(_mm512_loadu_ps(source + b * 32 + 16), raise);
      low = _mm512_fmadd_ps(low, zero, low), high = _mm512_fmadd_ps(high, zero, high);  // infinity becomes NaN
      const __m512bh rounded = _mm512_cvtne2ps_pbh(high, low);
      _mm512_storeu_si512(cells + b * 32, _mm512_shuffle_epi8(reinterpret_cast<__m512i>(rounded), order));
      __m512 sums = _mm512_dpbf16_ps(zero, rounded, ones);  // of pairs
      sums = _mm512_add_ps(sums, _mm512_shuffle_f32x4(sums, sums, 0xb1));
      sums = _mm512_add_ps(sums, _mm512_permute_ps(sums, 0x4e));
      sums = _mm512_add_ps(sums, _mm512_permute_ps(sums, 0xb1));  // of the first half, of the second one
      const __m128 first = _mm512_castps512_ps128(sums), second = _mm512_extractf32x4_ps(sums, 2);
      const __m128 both = _mm_unpacklo_ps(first, second), total = _mm_add_ps(first, second);
      const auto words = reinterpret_cast<__m128i>(_mm_cvtneps_pbh(_mm_movelh_ps(both, total)));
      const int32_t halves = _mm_cvtsi128_si32(words);
      memcpy(cells + layout.half_sums + b * 2, &halves, 4);
      cells[layout.block_sums + b] = uint16_t(_mm_extract_epi16(words, 2));
    }
    if (column_end == input.columns) {
      const int64_t blocks = input.padded / 32;
      for (int64_t i = layout.block_sums + blocks; i < layout.half_sums; i++) cells[i] = 0;
      for (int64_t i = layout.half_sums + 2 * blocks; i < layout.cells; i++) cells[i] = 0;
    }
  }
}

}  // namespace
}  // namespace mnemos
