// All kernels of one vector policy; see tiles.h.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstring>
#include <limits>

#include "linear/peak.h"
#include "linear/product_float.h"
#include "linear/product_quantized.h"

namespace mnemos {
namespace {

constexpr float infinity = std::numeric_limits<float>::infinity(),
                not_a_number = std::numeric_limits<float>::quiet_NaN();

template <class S>
void multiply_all(const Matrix &matrix, const Input &input, int64_t row_begin, int64_t row_end, int64_t panel_begin,
                  int64_t panel_end, float *y, int64_t y_stride, const float *starts, int64_t start_stride) {
  const Results results{y, y_stride, starts, start_stride};
  const auto floats = [&](auto multiply) {
    multiply(matrix, input, row_begin, row_end, panel_begin, panel_end, results);
  };
  switch (matrix.layout.type) {
    case WeightType::f32: return floats(multiply_floats<S, WeightType::f32>);
    case WeightType::f16: return floats(multiply_floats<S, WeightType::f16>);
    case WeightType::bf16: return floats(multiply_floats<S, WeightType::bf16>);
    default: break;
  }
  const bool fine = input.form == Form::int15;
  if (matrix.skips_blocks())
    return with_kept_layout(matrix.layout.type, [&](auto q) {
      constexpr const Layout &layout = decltype(q)::layout;
      const auto multiply =
          fine ? multiply_quantized<S, layout, 2, 1, true> : multiply_quantized<S, layout, 1, 1, true>;
      for (int64_t panel = panel_begin; panel < panel_end; panel++)
        multiply(matrix, input, row_begin, row_end, panel, 1, results);
    });
  with_layout(matrix.layout.type, [&](auto q) {
    constexpr const Layout &layout = decltype(q)::layout;
    constexpr int P = S::tile_panels;
    const auto multiply =
        fine ? multiply_quantized<S, layout, 2, P, false> : multiply_quantized<S, layout, 1, P, false>;
    for (int64_t panel = panel_begin; panel < panel_end; panel += P)
      multiply(matrix, input, row_begin, row_end, panel, smaller(P, panel_end - panel), results);
  });
}

// Each block of 32 activations has the scale of its largest magnitude, and rounds to the nearest. The scale is rounded
// up to a sum or difference of two powers of two, by a fifth at most. A block of only tiny values is zero, and
// one with a huge value or a NaN is NaN, so that no exponent overflows.
constexpr float smallest_magnitude = 1e-20f, largest_magnitude = 1e25f;
constexpr float finest_step = 0x1p-8f;  // for the two powers
template <int Parts>
constexpr float largest_quant = Parts == 1 ? 127 : 127 * 128;

inline float power_below(float x) { return from_bits(to_bits(x) & 0x7f800000); }
inline float power_above(float x) { return from_bits((to_bits(x) + 0x007fffff) & 0x7f800000); }

// The smallest sum of such powers that is at least `scale`.
inline void split_scale(float scale, float *powers) {
  const float first = power_below(scale), least = first * finest_step, lack = 2 * first - scale;
  const float rest = scale - first > least ? scale - first : least, up = power_above(rest);
  const float down = lack < least ? 0 : power_below(lack);
  const bool above = 2 * first - down < first + up;
  powers[0] = above ? 2 * first : first;
  powers[1] = above ? -down : up;
}

template <class S, int Parts>
inline void quantize_block(const float *x, QuantBlock<Parts> &block) {
  static_assert(!S::adds_exponents && !S::bfloat_minima, "the scale, and no sums in bfloat16");
  const float largest = S::largest_magnitude(x);
  const bool tiny = largest <= smallest_magnitude, immense = !(largest <= largest_magnitude);
  float powers[2] = {1, 1};
  if (!tiny) split_scale(largest / largest_quant<Parts>, powers);
  const float scale = powers[0] + powers[1];
  int32_t counts[2];
  S::template quantize<Parts>(x, tiny || immense ? 0 : 1 / scale, block.parts[0], counts);
  if (immense) counts[0] = counts[1] = 0;  // a NaN may have become any number
  const int32_t count = counts[0] + counts[1];
  block.terms[0] = immense ? not_a_number : scale;
  block.terms[1] = 0;
  block.sum = block.terms[0] * float(count);
  block.first_count = counts[0];
  block.start = -8 * count;
}

// The same for a policy that takes many blocks at once: in pairs of an even and an odd one, four of which have steps
// in common.
template <class S, int Parts>
class Quantizer {
 public:
  void add_pair(const float *x, QuantBlock<Parts> *even, QuantBlock<Parts> *odd) {
    Group &group = groups_[at_];
    group.sources[group.count] = x, group.sources[group.count + 1] = x + 32;
    group.blocks[group.count] = even, group.blocks[group.count + 1] = odd;
    if ((group.count += 2) == S::blocks_together) advance();
  }
  void finish() {
    Group &group = groups_[at_];
    if (group.count % 4 != 0) {  // the last pair again
      for (int i = 0; i < 2; i++, group.count++) {
        group.sources[group.count] = group.sources[group.count - 2],
        group.blocks[group.count] = group.blocks[group.count - 2];
      }
    }
    advance();
    advance();
  }

 private:
  struct Group {
    const float *sources[S::blocks_together];
    QuantBlock<Parts> *blocks[S::blocks_together];
    int count = 0;
    typename S::Scales scales;
  };
  void advance() {
    Group &group = groups_[at_], &before = groups_[1 - at_];
    if (group.count > 0) S::template find_scales<Parts>(group.sources, group.count, group.scales);
    if (before.count > 0)
      S::template quantize_together<Parts, S::adds_exponents>(before.sources, before.scales, before.blocks,
                                                              before.count);
    before.count = 0;
    at_ = 1 - at_;
  }

  Group groups_[2];
  int at_ = 0;
};

template <class S, int Parts>
void quantize_rows(const Input &input, const float *x, int64_t x_stride, int64_t row_begin, int64_t row_end,
                   int64_t block_begin, int64_t block_end) {
  const int64_t row_blocks = input.padded / 32;
  QuantBlock<Parts> *row = blocks_of<Parts>(input, row_begin);
  if constexpr (S::blocks_together == 1) {
    for (int64_t r = row_begin; r < row_end; r++, row += row_blocks) {
      const float *source = x + r * x_stride;
      for (int64_t b = block_begin; b < block_end; b++) quantize_block<S, Parts>(source + b * 32, row[b]);
    }
  } else {
    Quantizer<S, Parts> quantizer;
    const bool ends_alone = block_end == row_blocks && row_blocks % 2 != 0;
    auto alone = [&](const float *source, int64_t b) {
      alignas(64) float pair[64];
      memcpy(pair, source + b * 32, 32 * sizeof(float));
      memcpy(pair + 32, pair, 32 * sizeof(float));
      QuantBlock<Parts> twins[2];
      Quantizer<S, Parts> once;
      once.add_pair(pair, twins, twins + 1);
      once.finish();
      memcpy(static_cast<void *>(row + b), twins, offsetof(QuantBlock<Parts>, sums));
      if constexpr (S::bfloat_minima)
        row[b / 2 * 2].sums[b % 2] = twins->sums[0];
      else
        row[b].sum = twins->sum;
    };
    for (int64_t r = row_begin; r < row_end; r++, row += row_blocks) {
      const float *source = x + r * x_stride;
      int64_t b = block_begin;
      if (b % 2 != 0) alone(source, b++);
      for (; b + 1 < block_end; b += 2) quantizer.add_pair(source + b * 32, row + b, row + b + 1);
      if (b < block_end) alone(source, b);
      if (S::bfloat_minima && ends_alone) row[row_blocks - 1].sums[1] = 0;
    }
    quantizer.finish();
  }
}

template <class S>
void prepare_all(const Input &input, const float *x, int64_t x_stride, int64_t row_begin, int64_t row_end,
                 int64_t column_begin, int64_t column_end) {
  if (input.form == Form::int8) {
    return quantize_rows<S, 1>(input, x, x_stride, row_begin, row_end, column_begin / 32, column_end / 32);
  }
  if (input.form == Form::int15) {
    return quantize_rows<S, 2>(input, x, x_stride, row_begin, row_end, column_begin / 32, column_end / 32);
  }
  const int64_t count = column_end - column_begin, zeros = column_end == input.columns ? input.padded - column_end : 0;
  for (int64_t row = row_begin; row < row_end; row++) {
    const float *source = x + row * x_stride + column_begin;
    const int64_t first = row * input.padded + column_begin;
    if (input.form == Form::f32) {
      memcpy(input.values + first, source, size_t(count) * sizeof(float));
      memset(input.values + first + count, 0, size_t(zeros) * sizeof(float));
    } else {
      uint16_t *halves = input.halves + first;
      for (int64_t c = 0; c < count; c++) halves[c] = float_to_bfloat(source[c]);
      memset(halves + count, 0, size_t(zeros) * sizeof(uint16_t));
    }
  }
}

template <class S, const Layout &L>
void panel_lengths(const uint8_t *panel, int64_t blocks, float *lengths) {
  using Code = std::conditional_t<S::signed_bytes && L.bits() == 8, int8_t, uint8_t>;
  constexpr int halves = L.halves() ? 2 : 1, half_bytes = 512 / halves;
  Expanded weights;
  float squares[panel_rows] = {};
  for (int64_t first = 0; first < blocks; first += chunk_blocks) {
    const int64_t count = smaller(chunk_blocks, blocks - first);
    expand<S, L, 1>(panel, first, count, 0, weights);
    for (int64_t part = 0; part < count * halves; part++) {
      const uint8_t *codes = weights.codes[0] + part * half_bytes;
      const float *scales = weights.scales[0] + scales_at<S, L>(part / halves) + part % halves * 16;
      int32_t sums[64] = {};
      for (int v = 0; v < half_bytes; v += 64)
        for (int i = 0; i < 64; i++) {
          const int32_t code = Code(codes[v + i]) - offset_of<S, L>;
          sums[i] += code * code;
        }
      for (int r = 0; r < panel_rows; r++) {
        const int32_t sum = sums[4 * r] + sums[4 * r + 1] + sums[4 * r + 2] + sums[4 * r + 3];
        squares[r] += scales[r] * scales[r] * float(sum);
      }
    }
  }
  for (int r = 0; r < panel_rows; r++) lengths[r] = std::sqrt(squares[r]) * 1.0001f;
}

template <class S>
void lengths_all(const Matrix &matrix, int64_t panel_begin, int64_t panel_end, float *lengths) {
  with_layout(matrix.layout.type, [&](auto q) {
    constexpr const Layout &layout = decltype(q)::layout;
    if constexpr (!layout.minimum())
      for (int64_t p = panel_begin; p < panel_end; p++, lengths += panel_rows)
        panel_lengths<S, layout>(matrix.panel(p), matrix.stored_blocks(p), lengths);
  });
}

template <class S>
constexpr ProductKernels kernels_of(const char *name) {
  return {name, S::bf16_form, Form::int8, prepare_all<S>, multiply_all<S>, lengths_all<S>, multiply_registers<S>};
}

}  // namespace
}  // namespace mnemos
