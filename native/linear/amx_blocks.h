// Products of quantized weights by activations in bfloat16 (Form::bf16_sums), with bfloat16 tiles of AMX: weights are
// expanded to bfloat16, scales included, so that sums stay in a tile from the first column to the last. See
// amx_expand.h for how, and amx_float.h for what a tile product computes.
//
// Cycles on Sapphire Rapids, measured: a block of 4-bit codes takes 47 to expand and to multiply by one row. At least
// 32 of them are 16 multiply-adds and 16 shifts by 3, which go to the same unit while tiles are in use. Memory delivers
// a block in about 39. 16 rows by 16 outputs and 32 columns take 16 in the tile unit, and about 23 with their loads.
#pragma once

#include "linear/amx_expand.h"
#include "linear/amx_tiles.h"

namespace mnemos {
namespace {

constexpr int64_t tile_rows_most = 16;
// Tile products of a chunk: two panels' weights take 40 KB, and activations pass by the level-1 cache.
constexpr int chunk_steps = 20;
// Tiles of rows that are multiplied by a chunk of weights; their sums stay in the second-level cache.
constexpr int most_row_tiles = 17;
// Up to this many tiles of rows are multiplied while weights are expanded, these many products later.
constexpr int streamed_tiles = 2, stream_lag = 2, stream_slots = 4;

// Tiles: 2t + p is the sum of row tile t and panel p, 4 + p weights of panel p, 6 + t rows of t.
constexpr int block_weights = 4, block_inputs = 6;

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
