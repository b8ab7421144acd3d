// The AMX kernels against those of AVX-512, bit by bit, their bfloat16 products against the steps that Intel's Software
// Developer's Manual gives for TDPBF16PS, and attention, of both, against float64. A processor without AMX has its
// instructions emulated. Exit status 77: skipped, as the processor has not even AVX-512.
#include <algorithm>
#include <cmath>
#include <memory>
#include <new>
#include <vector>

#include "linear/amx_tiles.h"
#include "system/cpu.h"
#include "tests/amx_emulator.h"
#include "tests/check_attention.h"
#include "tests/check_products.h"

using namespace mnemos;

namespace {

int failures = 0;

void expect(bool holds, const char *what) {
  if (!holds) printf("wrong: %s\n", what), failures++;
}

// One tile product of small numbers whose result is known: which operand is which, signs, strides, zeroed rows.
void check_instructions() {
  TileShapes shapes;
  const uint8_t rows[3] = {3, 3, 2};
  const uint16_t row_bytes[3] = {8, 8, 8};
  for (int i = 0; i < 3; i++) shapes.rows[i] = rows[i], shapes.row_bytes[i] = row_bytes[i];
  int8_t a[3][16], b[2][8];
  for (int m = 0; m < 3; m++)
    for (int k = 0; k < 8; k++) a[m][k] = int8_t(17 * m - 128 + 13 * k);
  for (int k = 0; k < 2; k++)
    for (int n = 0; n < 8; n++) b[k][n] = int8_t(127 - 29 * n - 3 * k);
  int32_t sums[4][4];
  for (auto &row : sums)
    for (int32_t &value : row) value = 1000;
  AmxTiles::configure(shapes);
  AmxTiles::load<0>(sums, 16);
  AmxTiles::load<1>(a, 16);
  AmxTiles::load<2>(b, 8);
  AmxTiles::dot<0, 1, 2>();
  AmxTiles::store<0>(sums, 16);
  AmxTiles::zero<0>();
  int32_t zeros[4][4] = {{1, 1}, {1, 1}, {1, 1}, {1, 1}};
  AmxTiles::store<0>(zeros, 16);
  AmxTiles::release();
  for (int m = 0; m < 4; m++)
    for (int n = 0; n < 4; n++) {
      int32_t expected = 1000;
      for (int k = 0; k < 8 && m < 3 && n < 2; k++) expected += a[m][k] * b[k / 4][4 * n + k % 4];
      expect(sums[m][n] == expected, "a tile product");
      expect(zeros[m][n] == (m == 3 && n < 2 ? 1 : 0), "a zeroed tile");
    }
}

struct BfloatCase {
  float start;
  std::vector<float> x, weights;
  float sum;
};

// Sums that tell one order and one way of rounding from another: float32 has no 2^24 + 1, and none below 2^-126 here.
void check_bfloat_sums() {
  const float big = 0x1p24f, tiny = 0x1p-130f;
  const BfloatCase cases[] = {
      {0.5f, {3, -5, 7, 2}, {2, 4, 0.25f, -1}, 0.5f + 6 - 20 + 1.75f - 2},
      {big, {1, 1}, {1, 1}, big + 2},  // even and odd meet before the total does
      {big, {1, 0, 1, 0}, {1, 1, 1, 1}, big + 2},  // so do those of different pairs
      {0, {1, 1, -1, 0}, {big, 1, big, 0}, 1},  // odd columns do not see the even ones
      {0, {1, 0, 1, 0, -1, 0}, {big, 0, 1, 0, big, 0}, 0},  // the even ones round in turn: 2^24 + 1 is even 2^24
      {0, {0x1.02p0f, 0x1.02p0f}, {0x1.02p0f, -0x1.04p0f}, 0x1.02p0f * 0x1.02p0f - 0x1.02p0f * 0x1.04p0f},
      {0, {tiny, 0}, {0x1p20f, 0}, 0},  // a denormal operand is zero
      {0, {0x1p-70f, 0}, {0x1p-60f, 0}, 0},  // so is a denormal result
      {0x1p-126f, {-0x1p-63f, 0}, {0x1.8p-64f, 0}, 0x1p-126f},  // even on its way to the total
      {tiny, {0, 0}, {0, 0}, 0},
      {0, {INFINITY, 1}, {1, 1}, INFINITY},
  };
  for (const BfloatCase &one : cases) {
    const int columns = int(one.x.size());
    uint16_t x[32] = {}, weights[32] = {};
    for (int c = 0; c < columns; c++) x[c] = float_to_bfloat(one.x[c]), weights[c] = float_to_bfloat(one.weights[c]);
    float sum[2] = {one.start, 99};
    TileShapes shapes;
    shapes.rows[0] = 1, shapes.row_bytes[0] = 4;
    shapes.rows[1] = 1, shapes.row_bytes[1] = uint16_t(columns * 2);
    shapes.rows[2] = uint8_t(columns / 2), shapes.row_bytes[2] = 4;
    AmxTiles::configure(shapes);
    AmxTiles::load<0>(sum, 64);
    AmxTiles::load<1>(x, 64);
    AmxTiles::load<2>(weights, 4);
    AmxTiles::dot_bfloats<0, 1, 2>();
    AmxTiles::store<0>(sum, 64);
    AmxTiles::release();
    if (to_bits(sum[0]) != to_bits(one.sum) || sum[1] != 99) {
      printf("case %d: %a, not %a\n", int(&one - cases), double(sum[0]), double(one.sum));
      expect(false, "a bfloat16 tile product");
    }
  }
}

struct AlignedDelete {
  void operator()(void *p) const { ::operator delete(p, std::align_val_t(64)); }
};

// Products of numbers that need all their bits, with no denormals among them: written out after the manual, in float32
// for the bits and in float64 for the size of the error.
void check_bfloat_products(int64_t rows, int64_t columns, int64_t tokens, bool in_place, uint32_t seed) {
  uint32_t state = seed;
  const auto number = [&] {
    return float(int32_t((state = state * 1664525 + 1013904223) >> 8) - (1 << 23)) / float(1 << 22);
  };
  std::vector<uint16_t> raw(size_t(rows * columns));
  for (uint16_t &weight : raw) weight = float_to_bfloat(number());
  std::vector<float> x(size_t(tokens * columns)), starts(size_t(tokens * rows)), y(starts.size() + 1, 99.0f);
  for (float &value : x) value = number();
  for (float &value : starts) value = number();
  Matrix matrix(WeightType::bf16, rows, columns, false, amx_kernels);
  place({&matrix});
  pack_panels(matrix, reinterpret_cast<const uint8_t *>(raw.data()), 0, matrix.panels());
  const std::unique_ptr<void, AlignedDelete> workspace(
      ::operator new(input_bytes(matrix.form, tokens, columns), std::align_val_t(64)));
  const Input input = bind_input(amx_kernels, matrix.form, tokens, columns, workspace.get());
  prepare_rows(input, x.data(), columns, 0, tokens);
  if (in_place) std::copy(starts.begin(), starts.end(), y.begin());
  multiply(matrix, input, 0, tokens, 0, matrix.panels(), y.data(), rows, in_place ? y.data() : starts.data(), rows);
  expect(y.back() == 99.0f, "nothing after the results is written");
  bool same = true, near = true;
  for (int64_t t = 0; t < tokens; t++)
    for (int64_t r = 0; r < rows; r++) {
      const float start = starts[size_t(t * rows + r)], found = y[size_t(t * rows + r)];
      float total = start;
      double exact = start, size = std::fabs(start);
      for (int64_t first = 0; first < columns; first += 32) {
        float parts[2] = {0, 0};
        for (int64_t c = first; c < columns && c < first + 32; c++) {
          const float a = bfloat_to_float(float_to_bfloat(x[size_t(t * columns + c)]));
          const float b = bfloat_to_float(raw[size_t(r * columns + c)]);
          parts[c % 2] = fmaf(a, b, parts[c % 2]);
          exact += double(a) * b, size += std::fabs(double(a) * b);
        }
        total += parts[0] + parts[1];
      }
      same = same && to_bits(found) == to_bits(total);
      near = near && std::fabs(found - exact) <= 1e-6 * size;
    }
  if (same && near) return;
  printf("bfloat16, %lld x %lld, %lld tokens:\n", (long long)rows, (long long)columns, (long long)tokens);
  expect(same, "the bits of a bfloat16 product");
  expect(near, "the sums of a bfloat16 product");
}

void check_bfloats() {
  check_bfloat_sums();
  int count = 0;
  for (int64_t tokens = 1; tokens <= 70; tokens++, count++) {
    const int64_t rows = tokens % 4 == 0 ? 32 : tokens % 4 == 1 ? 41 : tokens % 4 == 2 ? 20 : 16;
    const int64_t columns = tokens % 5 == 0   ? 64
                            : tokens % 5 == 1 ? 333
                            : tokens % 5 == 2 ? 1
                            : tokens % 5 == 3 ? 31
                                              : 608;
    check_bfloat_products(rows, columns, tokens, tokens % 2 == 0, uint32_t(tokens));
    expect(
        same_products(amx_kernels, avx512_kernels, {WeightType::bf16, false, rows, columns, tokens, tokens % 3 == 0}),
        "whole numbers in bfloat16");
    expect(same_alone(amx_kernels, {WeightType::bf16, false, rows, columns, tokens, false}), "bits of a row alone");
  }
  printf("bfloat16: %d shapes\n", count);
}

// One bit of one result is wrong, for many rows only.
void multiply_wrongly(const Matrix &matrix, const Input &input, int64_t row_begin, int64_t row_end, int64_t panel_begin,
                      int64_t panel_end, float *y, int64_t y_stride, const float *starts, int64_t start_stride) {
  amx_kernels.multiply(matrix, input, row_begin, row_end, panel_begin, panel_end, y, y_stride, starts, start_stride);
  if (row_end - row_begin > 8) reinterpret_cast<uint32_t &>(y[9 * y_stride + 3]) ^= 1;
}

// Few rows of bfloat16 weights have another order of sums than many.
void multiply_rows_otherwise(const Matrix &matrix, const Input &input, int64_t row_begin, int64_t row_end,
                             int64_t panel_begin, int64_t panel_end, float *y, int64_t y_stride, const float *starts,
                             int64_t start_stride) {
  const ProductKernels &kernels = row_end - row_begin < 8 ? avx512bf16_kernels : amx_kernels;
  kernels.multiply(matrix, input, row_begin, row_end, panel_begin, panel_end, y, y_stride, starts, start_stride);
}

void check_selection() {
  expect(same_products(amx_kernels, avx512_kernels), "the check at start refuses right kernels");
  ProductKernels wrong = amx_kernels;
  wrong.multiply = multiply_wrongly;
  expect(!same_products(wrong, avx512_kernels), "the check at start lets a wrong bit pass");
  wrong.multiply = multiply_rows_otherwise;
  expect(!same_products(wrong, avx512_kernels), "the check at start lets rows differ by their neighbours");
}

void multiply_in_bfloat_wrongly(const Matrix &matrix, const Input &input, int64_t row_begin, int64_t row_end,
                                int64_t panel_begin, int64_t panel_end, float *y, int64_t y_stride, const float *starts,
                                int64_t start_stride) {
  amxbf16_kernels.multiply(matrix, input, row_begin, row_end, panel_begin, panel_end, y, y_stride, starts,
                           start_stride);
  if (row_end - row_begin > 8) reinterpret_cast<uint32_t &>(y[9 * y_stride + 3]) ^= 1;
}

// Quantized weights in bfloat16: near the AVX-512 kernels with fine activations, and the bits of each row alone.
void check_quantized_bfloats() {
  ProductKernels wrong = amxbf16_kernels;
  wrong.multiply = multiply_in_bfloat_wrongly;
  expect(right_products(amxbf16_kernels, avx512_kernels), "the check at start refuses right bfloat16 kernels");
  expect(!right_products(wrong, avx512_kernels), "the check at start lets a wrong bit of bfloat16 kernels pass");
  int count = 0;
  for (int32_t number = 0; number < 64; number++) {
    const auto type = WeightType(number);
    if (!is_weight_type(number) || !layout_of(type).quantized()) continue;
    for (int64_t tokens : {1, 2, 15, 16, 17, 31, 32, 33, 47, 48, 70, 272, 275, 289}) {
      // Whole and partly empty panels, odd and even numbers of them, of blocks and of chunks.
      const bool wide = tokens % 3 == 0;
      const int64_t columns = block_columns(type) == 32 ? (wide ? 2144 : 96) : (wide ? 1536 : 256);
      const int64_t rows = tokens % 4 == 0 ? 32 : tokens % 4 == 1 ? 41 : 20;
      const ProductShape shape{type, true, rows, columns, tokens, tokens % 2 == 0};
      const bool near = near_products(amxbf16_kernels, avx512_kernels, shape);
      const bool alone = same_alone(amxbf16_kernels, shape);
      if (!near || !alone)
        printf("type %d, %lld x %lld, %lld tokens: near %d, alone %d\n", number, (long long)rows, (long long)columns,
               (long long)tokens, int(near), int(alone));
      expect(near, "a quantized product in bfloat16");
      expect(alone, "bits of a row alone");
      count++;
    }
  }
  printf("quantized weights in bfloat16: %d shapes\n", count);
}

}  // namespace

int main() {
  if (!cpu_features().avx512_bf16) {
    printf("skipped: this processor has no AVX-512 with bfloat16 dot products\n");
    return 77;
  }
  const bool emulated = !cpu_features().amx;
  if (emulated) amx_emulator::install();
  check_instructions();
  check_bfloats();
  check_selection();
  if (cpu_features().amx_bf16) check_quantized_bfloats();
  failures += check_attention(vector_kernels(Isa::avx512_bf16));
  const int64_t before = amx_emulator::state.bfloat_products;
  failures += check_attention(vector_kernels(Isa::amx));
  if (emulated) expect(amx_emulator::state.bfloat_products > before, "no tile product ran in attention");
  failures += check_products(amx_kernels, avx512_kernels);
  if (emulated) {
    const amx_emulator::State &state = amx_emulator::state;
    expect(state.products > 0 && state.bfloat_products > 0, "no tile product ran");
    expect(!state.configured && state.releases > 0, "tiles are not released");
  }
  return failures != 0;
}
