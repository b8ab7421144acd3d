// The matrix products with AMX: the tile unit multiplies blocks of quantized weights by up to 12 rows, the vector units
// scale and add up what it stores, step by step as the AVX-512 kernels without bfloat16 do, so that the bits are
// theirs.
//
// The expanded codes of a block (8 vectors of 64 bytes, byte 4r + i of vector v: row r, column 4v + i) are the second
// operand of the tile product as they are. Activations are the first one, in place, a row of a tile for each row.
//
// Few rows of quantized weights, and float32 and float16 ones, go to the AVX-512 kernels; bfloat16 has its own tile
// products for any number of rows (amx_float.h).
#include "linear/amx_float.h"
#include "linear/amx_tiles.h"
#include "linear/avx512.h"

namespace mnemos {
namespace {

// Rows of a tile: the totals of 12 rows by two panels are 24 registers, and the others hold what the scaling needs.
//
// Measured on Sapphire Rapids, in cycles, with all data in the level-1 cache:
//   2 tile products of 12 rows   25
//   2 tiles of sums stored       32, alongside, if the four sums take turns and each is stored two products later: a
//                                store waits for its product, and the next products wait for the store
//   scaling, 24 vectors          an addition, a product and a multiply-add each, one more multiply-add with minima
// From a tile instruction on, and for 300 cycles after it, products, multiply-adds and conversions of 64 bytes run at
// one a cycle instead of two, but additions still at two: so sums come as floats with an offset that a subtraction
// removes, rather than as integers that are converted. Side by side all this would take 73 cycles, 85 with minima; it
// takes about 100. Separate scales for halves of a block double all of this; there it is 13% faster to scale the sums
// of the block before between the products, a few rows after each, but slower otherwise.
constexpr int amx_rows = 12;

// The same by one panel: as many as the tile unit takes.
constexpr int most_amx_rows = 16;

// AVX-512 multiplies up to this many rows.
constexpr int few_rows = 8;

// Tiles 0 to 3 are sums, 4 and 5 weights, 6 and 7 activations, each in turn.
constexpr int sum_tiles = 4, first_weights = 4, first_activations = 6;
// A product's sums are stored when this many further products have begun, or the next one, of a block that has only
// one.
constexpr int most_lag = 2;

// Sums of one part start from this number's bits, and so are the bits of (number + sum) while they are below 2^22.
constexpr float sum_offset = 0x1.8p23f;
static_assert(32 * 128 * 127 < 1 << 22);

struct OffsetSums : Avx512 {
  static Floats to_floats(Ints a) { return _mm512_sub_ps(_mm512_castsi512_ps(a), _mm512_set1_ps(sum_offset)); }
};
// Sums of two parts are put together first.
template <int Parts>
using Sums = std::conditional_t<Parts == 1, OffsetSums, Avx512>;

struct alignas(64) SumStart {
  float values[panel_rows];
};
constexpr SumStart offset_start = [] {
  SumStart start{};
  for (float &value : start.values) value = sum_offset;
  return start;
}();

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
    Avx512::store(codes, _mm512_sub_epi8(vector, _mm512_set1_epi8(char(centre_of<Avx512, L>))));
  }
  static void finish(uint8_t *) {}
};

// Dot products of a block, of each part and half.
template <const Layout &L, int Parts, int P, int R>
struct Dots {
  static constexpr int halves = L.halves() ? 2 : 1, products = Parts * halves * P;
  static constexpr int lag = products < most_lag ? products : most_lag;
  static constexpr int tiles = 2 * products < sum_tiles ? 2 * products : sum_tiles;  // that sums take turns in
  alignas(64) uint8_t values[Parts][halves][P][R][64];
};

// Stores what product number I of a block has summed.
template <int Sum, const Layout &L, int Parts, int P, int R, int I>
inline MNEMOS_INLINE void store_sums(Dots<L, Parts, P, R> &dots, std::integral_constant<int, I>) {
  constexpr int halves = Dots<L, Parts, P, R>::halves;
  AmxTiles::store<Sum>(dots.values[I / P / halves][I / P % halves][I % P], 64);
}

// The products of block b, which begin while the last ones of the block before are stored. Turn 0 and 1 use other
// tiles. Calls after(integral_constant product) after each.
template <const Layout &L, int Parts, int P, int R, int Turn, class After>
inline MNEMOS_INLINE void multiply_block(const Expanded &weights, const QuantBlock<Parts> *x, Places places,
                                         int64_t row_bytes, int64_t b, Dots<L, Parts, P, R> *before,
                                         Dots<L, Parts, P, R> &dots, const After &after) {
  using Block = Dots<L, Parts, P, R>;
  unroll<Block::products>([&](auto product) MNEMOS_INLINE {
    constexpr int part = product / P / Block::halves, half = product / P % Block::halves, p = product % P;
    constexpr int turn = Turn * Block::products + product, sum = turn % Block::tiles;
    constexpr int stored = (turn + Block::tiles - Block::lag) % Block::tiles;
    constexpr int w = first_weights + turn % 2, a = first_activations + turn / P % 2;
    if constexpr (p == 0) AmxTiles::load<a>(x[places[b]].parts[part] + half * 16, row_bytes);
    AmxTiles::load<w>(weights.codes[p] + b * 512 + half * 256, 64);
    if constexpr (Parts == 1)
      AmxTiles::load<sum>(&offset_start, 0);
    else
      AmxTiles::zero<sum>();
    AmxTiles::dot<sum, a, w>();
    if constexpr (product >= Block::lag) {
      store_sums<stored>(dots, std::integral_constant<int, product - Block::lag>{});
    } else {
      if (before != nullptr)
        store_sums<stored>(*before, std::integral_constant<int, Block::products + product - Block::lag>{});
    }
    after(product);
  });
}

// Stores the last sums of a block that no other one follows.
template <const Layout &L, int Parts, int P, int R, int Turn>
inline MNEMOS_INLINE void store_last(Dots<L, Parts, P, R> &dots) {
  using Block = Dots<L, Parts, P, R>;
  unroll<Block::lag>([&](auto i) MNEMOS_INLINE {
    constexpr int product = Block::products - Block::lag + i;
    store_sums<(Turn * Block::products + product) % Block::tiles>(dots, std::integral_constant<int, product>{});
  });
}

// Adds rows Begin to End - 1 of block b of the chunk to the totals of Panels panels from the First.
template <int First, int Panels, int Begin, int End, const Layout &L, int Parts, int P, int R>
inline MNEMOS_INLINE void finish_rows(const Expanded &weights, const QuantBlock<Parts> *x, Places places,
                                      int64_t row_blocks, int64_t b, const Dots<L, Parts, P, R> &dots,
                                      __m512 (&totals)[R][P]) {
  constexpr int halves = Dots<L, Parts, P, R>::halves;
  __m512 scales[Panels][4];
  unroll<Panels>([&](auto p) MNEMOS_INLINE {
    unroll<block_vectors<Avx512, L>>([&](auto i) MNEMOS_INLINE {
      scales[p][i] = Avx512::load(weights.scales[First + p] + scales_at<Avx512, L>(b) + i * 16);
    });
  });
  const QuantBlock<Parts> *block = x + places[b] + Begin * row_blocks;
  unroll<End - Begin>([&](auto row) MNEMOS_INLINE {
    unroll<Panels>([&](auto panel) MNEMOS_INLINE {
      constexpr int r = Begin + row, p = First + panel;
      __m512i ends[2];
      unroll<halves>([&](auto h) MNEMOS_INLINE {
        ends[h] = Avx512::load(dots.values[Parts - 1][h][p][r]);
        if constexpr (Parts == 2)
          ends[h] = Avx512::add_ints(ends[h], Avx512::shift_part(Avx512::load(dots.values[0][h][p][r])));
      });
      totals[r][p] = add_block<Sums<Parts>, L, Parts>(totals[r][p], ends[0], ends[halves - 1], scales[panel], *block);
    });
    block += row_blocks;
  });
}

// P panels by R rows over the blocks of one chunk.
template <const Layout &L, int Parts, int P, int R>
MNEMOS_KERNEL void amx_tile(const Expanded &weights, const Input &input, int64_t row, Places places, int64_t blocks,
                            const Output &out, Prefetch &prefetch) {
  __m512 totals[R][P];
  unroll<R>([&](auto r) MNEMOS_INLINE {
    unroll<P>([&](auto p) MNEMOS_INLINE { totals[r][p] = Avx512::load(out.starts[p] + r * out.start_stride[p]); });
  });
  const QuantBlock<Parts> *x = blocks_of<Parts>(input, row);
  const int64_t row_blocks = input.padded / 32, row_bytes = row_blocks * int64_t(sizeof *x);
  Dots<L, Parts, P, R> dots[2];
  const auto step = [&](auto turn, int64_t b) MNEMOS_INLINE {
    auto &now = dots[turn], &next = dots[1 - turn];
    const auto finish = [&](auto product) MNEMOS_INLINE {
      using Block = Dots<L, Parts, P, R>;
      constexpr int slices = Block::products / P, p = product / slices, slice = product % slices;
      if constexpr (!L.halves() || Block::lag != P) {
        if constexpr (product + 1 == Block::products)
          finish_rows<0, P, 0, R>(weights, x, places, row_blocks, b, now, totals);
      } else {  // product p has stored the last sums of panel p
        finish_rows<p, 1, R * slice / slices, R *(slice + 1) / slices>(weights, x, places, row_blocks, b, now, totals);
      }
    };
    if (b + 1 < blocks) {
      multiply_block<L, Parts, P, R, 1 - turn>(weights, x, places, row_bytes, b + 1, &now, next, finish);
    } else {
      store_last<L, Parts, P, R, turn>(now);
      unroll<Dots<L, Parts, P, R>::products>(finish);
    }
    prefetch.advance(P);
  };
  multiply_block<L, Parts, P, R, 0>(weights, x, places, row_bytes, 0, nullptr, dots[0], [](auto) {});
  for (int64_t b = 0; b < blocks; b += 2) {
    step(std::integral_constant<int, 0>{}, b);
    if (b + 1 < blocks) step(std::integral_constant<int, 1>{}, b + 1);
  }
  unroll<R>([&](auto r) MNEMOS_INLINE {
    unroll<P>([&](auto p) MNEMOS_INLINE { Avx512::store(out.rows[p] + r * out.stride[p], totals[r][p]); });
  });
}

// P panels, of which `panels` exist, that store the same blocks.
template <const Layout &L, int Parts, int P>
void multiply_panels(const Matrix &matrix, const Input &input, int64_t row_begin, int64_t row_end, int64_t panel,
                     int64_t panels, const Results &results, Shapes &shapes) {
  for_chunks<Avx512, L, Parts, P, few_rows + 1, P == 1 ? most_amx_rows : amx_rows, SignedVectors<L>>(
      matrix, input, row_begin, row_end, panel, panels, results,
      [&](auto r, const Expanded &weights, int64_t row, Places places, int64_t count, const Output &out,
          Prefetch &prefetch) {
        shapes.set_rows(r);
        amx_tile<same_scales<L>(), Parts, P, r>(weights, input, row, places, count, out, prefetch);
      });
}

void multiply_amx(const Matrix &matrix, const Input &input, int64_t row_begin, int64_t row_end, int64_t panel_begin,
                  int64_t panel_end, float *y, int64_t y_stride, const float *starts, int64_t start_stride) {
  const Results results{y, y_stride, starts, start_stride};
  if (matrix.layout.type == WeightType::bf16)
    return multiply_bfloats(matrix, input, row_begin, row_end, panel_begin, panel_end, results);
  if (!matrix.layout.quantized() || row_end - row_begin <= few_rows)
    return avx512_kernels.multiply(matrix, input, row_begin, row_end, panel_begin, panel_end, y, y_stride, starts,
                                   start_stride);
  Shapes shapes(matrix.layout.halves() ? 16 : 32);
  const bool fine = input.form == Form::int15;
  if (matrix.skips_blocks())
    return with_kept_layout(matrix.layout.type, [&](auto q) {
      constexpr const Layout &layout = decltype(q)::layout;
      for_like_panels<most_panels>(matrix, panel_begin, panel_end, [&](auto panels, int64_t panel) {
        const auto multiply = fine ? multiply_panels<layout, 2, panels> : multiply_panels<layout, 1, panels>;
        multiply(matrix, input, row_begin, row_end, panel, panels, results, shapes);
      });
    });
  with_layout(matrix.layout.type, [&](auto q) {
    constexpr const Layout &layout = decltype(q)::layout;
    const auto multiply = fine ? multiply_panels<layout, 2, most_panels> : multiply_panels<layout, 1, most_panels>;
    for (int64_t panel = panel_begin; panel < panel_end; panel += most_panels)
      multiply(matrix, input, row_begin, row_end, panel, smaller(most_panels, panel_end - panel), results, shapes);
  });
}

int64_t multiply_in_tiles(Form form, int64_t rounds) {
  if (form == Form::f32) return avx512_kernels.multiply_registers(form, rounds);
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

// What the tile unit has no part in.
void prepare_amx(const Input &input, const float *x, int64_t x_stride, int64_t row_begin, int64_t row_end,
                 int64_t column_begin, int64_t column_end) {
  avx512_kernels.prepare(input, x, x_stride, row_begin, row_end, column_begin, column_end);
}
void lengths_amx(const Matrix &matrix, int64_t panel_begin, int64_t panel_end, float *lengths) {
  avx512_kernels.weight_lengths(matrix, panel_begin, panel_end, lengths);
}

}  // namespace

const ProductKernels amx_kernels{"amx",        Form::bf16,  Form::int8,       prepare_amx,
                                 multiply_amx, lengths_amx, multiply_in_tiles};

}  // namespace mnemos
