// The matrix products with NEON and its integer matrix product (i8mm): for more than a few rows, which go two by two
// through an instruction that does twice as much as the dot product. The rest, few rows and float weights, is the dot
// product kernels'.
#include "linear/neon.h"

namespace mnemos {
namespace {

// The dot product kernels multiply up to this many rows.
constexpr int few_rows = Neon::stream_rows;
constexpr int tile_rows = 4;

// SMMLA multiplies two rows of eight columns by two others. The expanded codes of a block are, for each eight columns,
// the panel's rows two by two, as signed bytes without their offset.
template <const Layout &L>
struct RowPairs {
  static void store(uint8_t *codes, const Neon::Bytes &vector) { Neon::store(codes, vector); }
  static void finish(uint8_t *codes) {
    for (int w = 0; w < 4; w++, codes += 128) {
      const Neon::Bytes low = Neon::load(codes), high = Neon::load(codes + 64);
      for (int quad = 0; quad < 4; quad++) {
        const uint32x4_t first = without_offset(low.v[quad]), second = without_offset(high.v[quad]);
        vst1q_u8(codes + quad * 32, vreinterpretq_u8_u32(vzip1q_u32(first, second)));
        vst1q_u8(codes + quad * 32 + 16, vreinterpretq_u8_u32(vzip2q_u32(first, second)));
      }
    }
  }
  static uint32x4_t without_offset(uint8x16_t codes) {
    return vreinterpretq_u32_u8(vsubq_u8(codes, vdupq_n_u8(uint8_t(centre_of<Neon, L>))));
  }
};

// Sums of two rows of activations by the panel's rows: eight registers of two by two.
using PairSums = int32x4_t[8];

// Adds the products of columns 16 * Half to 16 * Half + 15 of a block to the sums of all pairs of rows. x: each row's
// quants; an odd last row is multiplied together with itself.
template <int Half, int R>
inline __attribute__((always_inline)) void multiply_half(const uint8_t *codes, const int8_t *const (&x)[R],
                                                         PairSums (&sums)[(R + 1) / 2]) {
  constexpr int pairs = (R + 1) / 2;
  int8x16_t inputs[pairs][2];
  unroll<pairs>([&](auto p) {
    const int64x2_t a = vreinterpretq_s64_s8(vld1q_s8(x[2 * p] + Half * 16));
    const int64x2_t b = 2 * p + 1 < R ? vreinterpretq_s64_s8(vld1q_s8(x[2 * p + (2 * p + 1 < R)] + Half * 16)) : a;
    inputs[p][0] = vreinterpretq_s8_s64(vzip1q_s64(a, b));
    inputs[p][1] = vreinterpretq_s8_s64(vzip2q_s64(a, b));
  });
  unroll<16>([&](auto i) {
    const int8x16_t weights = vreinterpretq_s8_u8(vld1q_u8(codes + Half * 256 + i * 16));
    unroll<pairs>([&](auto p) { sums[p][i % 8] = vmmlaq_s32(sums[p][i % 8], inputs[p][i / 8], weights); });
  });
}

// The sums of the first (0) or the second (1) row of a pair, 16 adjacent rows of the panel.
template <int Row>
inline __attribute__((always_inline)) Neon::Ints row_of(const PairSums &sums) {
  const auto row = [](int32x4_t a, int32x4_t b) {
    const int64x2_t c = vreinterpretq_s64_s32(a), d = vreinterpretq_s64_s32(b);
    return vreinterpretq_s32_s64(Row == 0 ? vzip1q_s64(c, d) : vzip2q_s64(c, d));
  };
  return {{row(sums[0], sums[1]), row(sums[2], sums[3]), row(sums[4], sums[5]), row(sums[6], sums[7])}};
}

// One panel by R rows over the blocks of one chunk.
template <const Layout &L, int Parts, int R>
MNEMOS_KERNEL void pair_tile(const Expanded &weights, const Input &input, int64_t row, int64_t first_block,
                             int64_t blocks, const Output &out, Prefetch &prefetch) {
  constexpr int halves = L.halves() ? 2 : 1, pairs = (R + 1) / 2;
  const QuantBlock<Parts> *x = blocks_of<Parts>(input, row) + first_block;
  const int64_t row_blocks = input.padded / 32;
  Neon::Floats totals[R];
  unroll<R>([&](auto r) { totals[r] = Neon::load(out.starts[0] + r * out.start_stride[0]); });
  for (int64_t b = 0; b < blocks; b++, x++) {
    prefetch.advance(1);
    const uint8_t *codes = weights.codes[0] + b * 512;
    PairSums sums[halves][pairs] = {};
    unroll<Parts>([&](auto part) {
      const int8_t *quants[R];
      unroll<R>([&](auto r) { quants[r] = x[r * row_blocks].parts[part]; });
      if constexpr (part > 0)  // the first parts count 128 times as much
        unroll<halves * pairs * 8>([&](auto i) {
          int32x4_t &sum = sums[i / (pairs * 8)][i / 8 % pairs][i % 8];
          sum = vshlq_n_s32(sum, 7);
        });
      multiply_half<0, R>(codes, quants, sums[0]);
      multiply_half<1, R>(codes, quants, sums[halves - 1]);
    });
    Neon::Floats scales[4];
    unroll<block_vectors<Neon, L>>(
        [&](auto i) { scales[i] = Neon::load(weights.scales[0] + scales_at<Neon, L>(b) + i * 16); });
    unroll<R>([&](auto r) {
      const Neon::Ints first = row_of<r % 2>(sums[0][r / 2]), second = row_of<r % 2>(sums[halves - 1][r / 2]);
      totals[r] = add_block<Neon, L, Parts>(totals[r], first, second, scales, x[r * row_blocks]);
    });
  }
  unroll<R>([&](auto r) { Neon::store(out.rows[0] + r * out.stride[0], totals[r]); });
}

template <const Layout &L, int Parts>
void multiply_panel(const Matrix &matrix, const Input &input, int64_t row_begin, int64_t row_end, int64_t panel,
                    const Results &results) {
  for_chunks<Neon, L, Parts, 1, few_rows + 1, tile_rows, RowPairs<L>>(
      matrix, input, row_begin, row_end, panel, 1, results,
      [&](auto r, const Expanded &weights, int64_t row, Places places, int64_t count, const Output &out,
          Prefetch &prefetch) {
        pair_tile<same_scales<L>(), Parts, r>(weights, input, row, places.first, count, out, prefetch);
      });
}

void multiply_i8mm(const Matrix &matrix, const Input &input, int64_t row_begin, int64_t row_end, int64_t panel_begin,
                   int64_t panel_end, float *y, int64_t y_stride, const float *starts, int64_t start_stride) {
  if (!matrix.layout.quantized() || row_end - row_begin <= few_rows || matrix.skips_blocks())
    return neon_kernels.multiply(matrix, input, row_begin, row_end, panel_begin, panel_end, y, y_stride, starts,
                                 start_stride);
  for (int64_t panel = panel_begin; panel < panel_end; panel++)
    with_layout(matrix.layout.type, [&](auto q) {
      constexpr const Layout &layout = decltype(q)::layout;
      const auto multiply = input.form == Form::int15 ? multiply_panel<layout, 2> : multiply_panel<layout, 1>;
      multiply(matrix, input, row_begin, row_end, panel, {y, y_stride, starts, start_stride});
    });
}

int64_t multiply_in_pairs(Form form, int64_t rounds) {
  if (form == Form::f32) return neon_kernels.multiply_registers(form, rounds);
  alignas(64) constexpr uint8_t codes[512] = {};
  alignas(64) constexpr int8_t quants[32] = {};
  const int8_t *const rows[tile_rows] = {quants, quants, quants, quants};
  PairSums sums[tile_rows / 2] = {};
  for (int64_t round = 0; round < rounds; round++) {
    const uint8_t *weights = codes;
    __asm__ volatile("" : "+r"(weights) : : "memory");  // its values are not known
    multiply_half<0, tile_rows>(weights, rows, sums);
  }
  __asm__ volatile("" : : "r"(sums) : "memory");  // so that nothing is left out
  return rounds * tile_rows * 16 * panel_rows;
}

}  // namespace

const ProductKernels neoni8mm_kernels{"neon_i8mm",   Form::f32,         prepare_all<Neon>,
                                      multiply_i8mm, lengths_all<Neon>, multiply_in_pairs};

}  // namespace mnemos
