// The matrix products with AMX: the tile unit multiplies blocks of quantized weights by up to 12 rows, the vector units
// scale and add up what it stores, step by step as the AVX-512 kernels do, so that the bits are theirs.
//
// The expanded codes of a block (8 vectors of 64 bytes, byte 4r + i of vector v: row r, column 4v + i) are the second
// operand of the tile product as they are. Activations are the first one, in place, a row of a tile for each row.
//
// Few rows of quantized weights, and float32 and float16 ones, go to the AVX-512 kernels; bfloat16 has its own tile
// products for any number of rows (amx_float.h).
#include "linear/amx_float.h"
#include "linear/amx_tiles.h"
#include "linear/avx512bf16.h"
#include "linear/product_kept.h"

namespace mnemos {
namespace {

// Rows of a tile: the totals of 12 rows by two panels are 24 registers, and the others hold what the scaling needs.
//
// What a block of 12 rows by two panels takes on Sapphire Rapids in cycles, from the throughputs that Intel's
// optimization manual gives:
//   tile products          2 of 12 rows         24 (32 if one takes 16 cycles whatever its rows)
//   scaling, ports 0 and 5 24 x 3 or 3.5 of 2   36 or 42, the latter with minima
//   loads, 2 of 64 bytes   12 + 16 rows of tiles, 24 sums, 12 or 24 activations' scales   32 or 38
//   stores, 1 of 64 bytes  24 rows of tiles     24
// They run side by side, as a block's sums are stored while those of the block before are scaled: about 50, against
// 2 * 12 * 8 / 2 = 96 for the AVX-512 dot products alone, and their scaling comes on top. Not measured.
constexpr int amx_rows = 12;

// The same by one panel, of a matrix that skips blocks.
constexpr int kept_rows = 16;

// AVX-512 multiplies up to this many rows.
constexpr int few_rows = 8;

// Tiles 0 to 3 are sums, 4 and 5 weights, 6 and 7 activations, each in turn.
constexpr int sum_tiles = 4, first_weights = 4, first_activations = 6;

// The tiles' shapes follow the number of rows.
class Shapes {
 public:
  // A block, or half of it if the halves have separate scales, has this many columns.
  explicit Shapes(int columns) : columns_(columns) {}

  void set_rows(int rows) {
    if (rows == rows_) return;
    rows_ = rows;
    TileShapes shapes;
    for (int tile = 0; tile < 8; tile++) {
      const bool weights = tile == first_weights || tile == first_weights + 1;
      shapes.rows[tile] = uint8_t(weights ? columns_ / 4 : rows);
      shapes.row_bytes[tile] = uint16_t(tile >= first_activations ? columns_ : 64);
    }
    tiles_.configure(shapes);
  }

 private:
  int columns_, rows_ = 0;
  ConfiguredTiles tiles_;
};

// Codes without their centre, as signed bytes.
template <const Layout &L>
struct SignedVectors {
  static void store(uint8_t *codes, __m512i vector) {
    Avx512::store(codes, _mm512_sub_epi8(vector, _mm512_set1_epi8(char(centre_of<Avx512Bf16, L>))));
  }
  static void finish(uint8_t *) {}
};

// Dot products of a block, of each part and half.
template <const Layout &L, int Parts, int P, int R>
struct Dots {
  static constexpr int halves = L.halves() ? 2 : 1;
  alignas(64) uint8_t values[Parts][halves][P][R][64];
};

// Turn 0 and 1 use other tiles, so that a block need not wait for the one before.
template <const Layout &L, int Parts, int P, int R, int Turn, class Places>
inline __attribute__((always_inline)) void multiply_block(const Expanded &weights, const QuantBlock<Parts> *x,
                                                          Places places, int64_t row_bytes, int64_t b,
                                                          Dots<L, Parts, P, R> &dots) {
  constexpr int halves = Dots<L, Parts, P, R>::halves, products = Parts * halves;
  unroll<products>([&](auto product) {
    constexpr int part = product / halves, half = product % halves;
    constexpr int a = first_activations + (Turn * products + product) % 2;
    AmxTiles::load<a>(x[places[b]].parts[part] + half * 16, row_bytes);
    unroll<P>([&](auto p) {
      constexpr int turn = (Turn * products + product) * P + p, sum = turn % sum_tiles, w = first_weights + turn % 2;
      AmxTiles::load<w>(weights.codes[p] + b * 512 + half * 256, 64);
      AmxTiles::zero<sum>();
      AmxTiles::dot<sum, a, w>();
      AmxTiles::store<sum>(dots.values[part][half][p], 64);
    });
  });
}

// Adds block b of the chunk to the totals.
template <const Layout &L, int Parts, int P, int R, class Places>
inline __attribute__((always_inline)) void finish_block(const Expanded &weights, const QuantBlock<Parts> *x,
                                                        Places places, int64_t row_blocks, int64_t b,
                                                        const Dots<L, Parts, P, R> &dots, __m512 (&totals)[R][P]) {
  constexpr int halves = Dots<L, Parts, P, R>::halves;
  __m512 scales[P][4];
  unroll<P>([&](auto p) {
    unroll<block_vectors<Avx512Bf16, L>>(
        [&](auto i) { scales[p][i] = Avx512::load(weights.scales[p] + scales_at<Avx512Bf16, L>(b) + i * 16); });
  });
  const QuantBlock<Parts> *block = x + places[b];
  unroll<R>([&](auto r) {
    unroll<P>([&](auto p) {
      __m512i ends[2];
      unroll<halves>([&](auto h) {
        ends[h] = Avx512::load(dots.values[Parts - 1][h][p][r]);
        if constexpr (Parts == 2)
          ends[h] = Avx512::add_ints(ends[h], Avx512::shift_part(Avx512::load(dots.values[0][h][p][r])));
      });
      totals[r][p] = add_block<Avx512Bf16, L, Parts>(totals[r][p], ends[0], ends[halves - 1], scales[p], *block);
    });
    block += row_blocks;
  });
}

// Adds the minima of block b and the one before.
template <const Layout &L, int Parts, int P, int R, class Places>
inline __attribute__((always_inline)) void finish_pair(const Expanded &weights, const QuantBlock<Parts> *x,
                                                       Places places, int64_t row_blocks, int64_t b,
                                                       __m512 (&totals)[R][P]) {
  if constexpr (paired<Avx512Bf16, L>) {
    const QuantBlock<Parts> *block = x + places[b / 2 * 2];
    Minima<Avx512Bf16, Parts> minima[P];
    unroll<P>([&](auto p) { minima[p] = Minima<Avx512Bf16, Parts>::load(weights.scales[p] + minima_at(b)); });
    unroll<R>([&](auto r) {
      unroll<P>([&](auto p) { totals[r][p] = minima[p].add_to(totals[r][p], block, b % 2 != 0); });
      block += row_blocks;
    });
  }
}

// P panels by R rows over the blocks of one chunk, whose places count from `first_block`.
template <const Layout &L, int Parts, int P, int R, class Places>
void amx_tile(const Expanded &weights, const Input &input, int64_t row, int64_t first_block, int64_t blocks,
              Places places, const Output &out, Prefetch &prefetch) {
  __m512 totals[R][P];
  unroll<R>([&](auto r) {
    unroll<P>([&](auto p) { totals[r][p] = Avx512::load(out.starts[p] + r * out.start_stride[p]); });
  });
  const QuantBlock<Parts> *x = blocks_of<Parts>(input, row) + first_block;
  const int64_t row_blocks = input.padded / 32, row_bytes = row_blocks * int64_t(sizeof *x);
  Dots<L, Parts, P, R> even, odd;
  multiply_block<L, Parts, P, R, 0>(weights, x, places, row_bytes, 0, even);
  for (int64_t b = 0;;) {
    if (b + 1 < blocks) multiply_block<L, Parts, P, R, 1>(weights, x, places, row_bytes, b + 1, odd);
    prefetch.advance(P);
    finish_block(weights, x, places, row_blocks, b, even, totals);
    if (++b == blocks) {
      finish_pair<L, Parts>(weights, x, places, row_blocks, b - 1, totals);
      break;
    }
    if (b + 1 < blocks) multiply_block<L, Parts, P, R, 0>(weights, x, places, row_bytes, b + 1, even);
    prefetch.advance(P);
    finish_block(weights, x, places, row_blocks, b, odd, totals);
    finish_pair<L, Parts>(weights, x, places, row_blocks, b, totals);
    if (++b == blocks) break;
  }
  unroll<R>([&](auto r) { unroll<P>([&](auto p) { Avx512::store(out.rows[p] + r * out.stride[p], totals[r][p]); }); });
}

template <const Layout &L, int Parts>
void multiply_panels(const Matrix &matrix, const Input &input, int64_t row_begin, int64_t row_end, int64_t panel,
                     int64_t panels, const Results &results, Shapes &shapes) {
  constexpr int P = most_panels;
  for_chunks<Avx512Bf16, L, Parts, P, few_rows + 1, amx_rows, SignedVectors<L>>(
      matrix, input, row_begin, row_end, panel, panels, results,
      [&](auto r, const Expanded &weights, int64_t row, int64_t first, int64_t count, const Output &out,
          Prefetch &prefetch) {
        shapes.set_rows(r);
        amx_tile<same_scales<L>(), Parts, P, r>(weights, input, row, first, count, AllPlaces{}, out, prefetch);
      });
}

// One panel of a matrix that skips blocks.
template <const Layout &L, int Parts>
void multiply_kept_panel(const Matrix &matrix, const Input &input, int64_t row_begin, int64_t row_end, int64_t panel,
                         const Results &results, Shapes &shapes) {
  for_chunks<Avx512Bf16, L, Parts, 1, few_rows + 1, kept_rows, SignedVectors<L>>(
      matrix, input, row_begin, row_end, panel, 1, results,
      [&](auto r, const Expanded &weights, int64_t row, int64_t first, int64_t count, const Output &out,
          Prefetch &prefetch) {
        shapes.set_rows(r);
        const SomePlaces places{matrix.places(panel) + first};
        amx_tile<same_scales<L>(), Parts, 1, r>(weights, input, row, 0, count, places, out, prefetch);
      });
}

void multiply_amx(const Matrix &matrix, const Input &input, int64_t row_begin, int64_t row_end, int64_t panel_begin,
                  int64_t panel_end, float *y, int64_t y_stride, const float *starts, int64_t start_stride) {
  if (matrix.layout.type == WeightType::bf16)
    return multiply_bfloats(matrix, input, row_begin, row_end, panel_begin, panel_end,
                            {y, y_stride, starts, start_stride});
  if (!matrix.layout.quantized() || row_end - row_begin <= few_rows)
    return avx512bf16_kernels.multiply(matrix, input, row_begin, row_end, panel_begin, panel_end, y, y_stride, starts,
                                       start_stride);
  Shapes shapes(matrix.layout.halves() ? 16 : 32);
  if (matrix.skips_blocks())
    return with_kept_layout(matrix.layout.type, [&](auto q) {
      constexpr const Layout &layout = decltype(q)::layout;
      const auto multiply = input.form == Form::int15 ? multiply_kept_panel<layout, 2> : multiply_kept_panel<layout, 1>;
      for (int64_t panel = panel_begin; panel < panel_end; panel++)
        multiply(matrix, input, row_begin, row_end, panel, {y, y_stride, starts, start_stride}, shapes);
    });
  with_layout(matrix.layout.type, [&](auto q) {
    constexpr const Layout &layout = decltype(q)::layout;
    const auto multiply = input.form == Form::int15 ? multiply_panels<layout, 2> : multiply_panels<layout, 1>;
    for (int64_t panel = panel_begin; panel < panel_end; panel += most_panels) {
      const int64_t panels = smaller(most_panels, panel_end - panel);
      multiply(matrix, input, row_begin, row_end, panel, panels, {y, y_stride, starts, start_stride}, shapes);
    }
  });
}

int64_t multiply_in_tiles(Form form, int64_t rounds) {
  if (form == Form::f32) return avx512bf16_kernels.multiply_registers(form, rounds);
  constexpr int rows = 16, bytes = 64;
  TileShapes shapes;
  for (int tile = 0; tile < 8; tile++) shapes.rows[tile] = rows, shapes.row_bytes[tile] = bytes;
  ConfiguredTiles tiles;
  tiles.configure(shapes);
  for (int64_t round = 0; round < rounds; round++)
    unroll<sum_tiles>([&](auto sum) {
      constexpr int a = first_activations + sum / 2, w = first_weights + sum % 2;
      if (form == Form::bf16)
        AmxTiles::dot_bfloats<sum, a, w>();
      else
        AmxTiles::dot<sum, a, w>();
    });
  return rounds * sum_tiles * rows * panel_rows * (form == Form::bf16 ? bytes / 2 : bytes);
}

}  // namespace

const ProductKernels amx_kernels{"amx",        Form::bf16,          prepare_all<Avx512Bf16>,
                                 multiply_amx, lengths_all<Avx512>, multiply_in_tiles};

}  // namespace mnemos
