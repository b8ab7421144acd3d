// Products with bfloat16 weights on AMX tiles.
//
// A tile product (TDPBF16PS) takes 32 columns. Its second operand is 16 pairs of columns of a panel as stored,
// its first one rows of activations as stored. For each output it sums the products of even and odd columns separately,
// from zero, and adds the sum of both to the total (Intel's Software Developer's Manual). The bfloat16 dot product of
// AVX-512 adds each product to the total in turn, so a single row goes through tiles as well: its bits are those it has
// among many.
//
// Cycles on Sapphire Rapids, from the figures of Intel's optimization manual (a product can begin every 16 and ends
// after 52, a tile is loaded in 8 and stored in 16, ldtilecfg takes 204); not measured:
//   32 rows by two panels   4 products 64, 4 tiles loaded 32 in parallel:
//                           512 multiply-adds a cycle, 16 times what AVX-512
//                           reaches in float32. A chunk of columns is 8 of these;
//                           its sums are loaded and stored in 96 alongside its 512.
//   up to 16 rows           2 products that wait for those before them 52, 3 tiles
//                           loaded and 32 lines fetched 40: 2 KB of weights in 52,
//                           about 40 bytes a cycle; a core reads 5 to 8 from memory.
#pragma once

#include <cstring>

#include "linear/amx_tiles.h"
#include "linear/tiles.h"

namespace mnemos {
namespace {

// Rows of a tile, columns of a tile product, and bytes of a panel's part in it.
constexpr int64_t bfloat_rows = 16, bfloat_columns = 32, bfloat_bytes = 1024;

// The most tile products of a chunk of columns: its weights, two panels, take half of the level-1 cache.
constexpr int64_t bfloat_chunk = 12;

// Tile 2t + p is the sum of row tile t and panel p, 4 + p weights of panel p, 6 + t rows of t.
constexpr int bfloat_weights = 4, bfloat_inputs = 6;

class BfloatShapes {
 public:
  // All tiles of activations have this many rows.
  explicit BfloatShapes(int64_t rows) : rows_(uint8_t(rows)) {}

  // The current panels have this many outputs.
  void set_outputs(int64_t first, int64_t second) {
    if (first == outputs_[0] && second == outputs_[1]) return;
    outputs_[0] = first, outputs_[1] = second;
    TileShapes shapes;
    for (int tile = 0; tile < 8; tile++) {
      const bool weights = tile >= bfloat_weights && tile < bfloat_inputs;
      shapes.rows[tile] = weights ? bfloat_columns / 2 : rows_;
      shapes.row_bytes[tile] = uint16_t(tile >= bfloat_inputs ? bfloat_columns * 2 : outputs_[tile % 2] * 4);
    }
    tiles_.configure(shapes);
  }

 private:
  uint8_t rows_;
  int64_t outputs_[2] = {};  // none has 0
  ConfiguredTiles tiles_;
};

// P current panels, by all rows of the call.
template <int P>
struct BfloatPanels {
  const uint8_t *weights[P];
  alignas(64) uint8_t last[P][bfloat_bytes];  // the remaining columns, then zeros
  int64_t panel, outputs;  // of the last panel
  int64_t row_begin, row_end, tile_rows;
};

// Adds 32 columns, from number `column` of T tiles of rows, to their sums.
template <int T, int P>
inline __attribute__((always_inline)) void add_bfloats(const uint8_t *const *weights, const uint16_t *const *x,
                                                       int64_t column, int64_t row_bytes) {
  unroll<P>([&](auto p) { AmxTiles::load<bfloat_weights + p>(weights[p], 64); });
  unroll<T>([&](auto t) {
    if constexpr (T == 1)
      AmxTiles::load<bfloat_inputs + t>(x[t] + column, row_bytes);
    else  // many rows pass by the weights in the level-1 cache
      AmxTiles::load_passing<bfloat_inputs + t>(x[t] + column, row_bytes);
    unroll<P>([&](auto p) { AmxTiles::dot_bfloats<2 * t + p, bfloat_inputs + t, bfloat_weights + p>(); });
  });
}

// T tiles of rows, the first of which is number `tile`, by tile products begin to end, of which `whole` are stored as
// such. The call's last tile of rows overlaps the one before rather than having fewer rows, which would need other
// shapes; its duplicate rows are not stored. Listed: the panels skip blocks.
template <int T, int P, bool Listed>
void multiply_bfloat_tiles(const BfloatPanels<P> &panels, const Input &input, int64_t tile, int64_t begin, int64_t end,
                           int64_t whole, Places places, const Results &results) {
  const bool first = begin == 0;
  const float *starts = first ? results.starts : results.y;
  const int64_t start_stride = first ? results.start_stride : results.stride;
  const int64_t row_bytes = input.padded * 2, column = panels.panel * panel_rows;
  int64_t rows[T], done[T];
  const uint16_t *x[T];
  unroll<T>([&](auto t) {
    const int64_t next = panels.row_begin + (tile + t) * bfloat_rows;
    rows[t] = smaller(next, panels.row_end - panels.tile_rows);
    done[t] = next - rows[t];
    x[t] = input.halves + rows[t] * input.padded;
    unroll<P>([&](auto p) {
      const float *from = starts == nullptr ? zeros : starts + rows[t] * start_stride + column + p * panel_rows;
      AmxTiles::load<2 * t + p>(from, starts == nullptr ? 0 : start_stride * int64_t(sizeof(float)));
    });
  });
  const uint8_t *weights[P];
  for (int p = 0; p < P; p++) weights[p] = panels.weights[p] + begin * bfloat_bytes;
  for (int64_t step = begin; step < smaller(end, whole); step++) {
    if (tile == 0)  // the others find the weights in the cache
      for (int p = 0; p < P; p++)
        for (int line = 0; line < bfloat_bytes; line += 64) __builtin_prefetch(weights[p] + prefetch_bytes + line);
    add_bfloats<T, P>(weights, x, (Listed ? places[step] : step) * bfloat_columns, row_bytes);
    for (int p = 0; p < P; p++) weights[p] += bfloat_bytes;
  }
  if (end > whole) {
    for (int p = 0; p < P; p++) weights[p] = panels.last[p];
    add_bfloats<T, P>(weights, x, places[whole] * bfloat_columns, row_bytes);
  }
  unroll<T>([&](auto t) {
    unroll<P>([&](auto p) {
      float *y = results.y + rows[t] * results.stride + column + p * panel_rows;
      if (done[t] == 0) return AmxTiles::store<2 * t + p>(y, results.stride * int64_t(sizeof(float)));
      alignas(64) float values[bfloat_rows][panel_rows];
      AmxTiles::store<2 * t + p>(values, sizeof values[0]);
      const int64_t outputs = p == P - 1 ? panels.outputs : panel_rows;
      for (int64_t r = done[t]; r < panels.tile_rows; r++)
        memcpy(y + r * results.stride, values[r], size_t(outputs) * sizeof(float));
    });
  });
}

template <int P>
void multiply_bfloat_panels(const Matrix &matrix, const Input &input, int64_t row_begin, int64_t row_end, int64_t panel,
                            const Results &results, BfloatShapes &shapes) {
  const Places places{matrix.places(panel), 0};
  BfloatPanels<P> panels;
  panels.panel = panel, panels.outputs = smaller(matrix.rows - (panel + P - 1) * panel_rows, panel_rows);
  panels.row_begin = row_begin, panels.row_end = row_end, panels.tile_rows = smaller(row_end - row_begin, bfloat_rows);
  shapes.set_outputs(P == 1 ? panels.outputs : panel_rows, P == 1 ? panel_rows : panels.outputs);
  const int64_t whole = matrix.stored_blocks(panel), rest = matrix.columns % bfloat_columns;
  for (int p = 0; p < P; p++) {
    panels.weights[p] = matrix.panel(panel + p);
    if (rest == 0) continue;
    memset(panels.last[p], 0, sizeof panels.last[p]);
    memcpy(panels.last[p], panels.weights[p] + whole * bfloat_bytes, size_t((rest + 1) / 2 * 64));
  }
  const auto two = matrix.skips_blocks() ? multiply_bfloat_tiles<2, P, true> : multiply_bfloat_tiles<2, P, false>;
  const auto one = matrix.skips_blocks() ? multiply_bfloat_tiles<1, P, true> : multiply_bfloat_tiles<1, P, false>;
  const int64_t tiles = (row_end - row_begin + bfloat_rows - 1) / bfloat_rows, steps = whole + (rest > 0);
  // Chunks of even sizes; but weights that are used once need not stay in the cache.
  const int64_t chunks = tiles > 2 ? (steps + bfloat_chunk - 1) / bfloat_chunk : 1;
  const int64_t chunk = (steps + chunks - 1) / chunks;
  for (int64_t begin = 0; begin < steps; begin += chunk) {
    const int64_t end = smaller(begin + chunk, steps);
    for (int64_t tile = 0; tile < tiles; tile += 2)
      (tile + 1 < tiles ? two : one)(panels, input, tile, begin, end, whole, places, results);
  }
}

// Like multiply() in linear.h, for a bfloat16 matrix.
inline void multiply_bfloats(const Matrix &matrix, const Input &input, int64_t row_begin, int64_t row_end,
                             int64_t panel_begin, int64_t panel_end, const Results &results) {
  if (row_begin == row_end) return;  // there are no tiles without rows
  BfloatShapes shapes(smaller(row_end - row_begin, bfloat_rows));
  for_like_panels<2>(matrix, panel_begin, panel_end, [&](auto panels, int64_t panel) {
    multiply_bfloat_panels<panels>(matrix, input, row_begin, row_end, panel, results, shapes);
  });
}

}  // namespace
}  // namespace mnemos
