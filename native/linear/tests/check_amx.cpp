// The AMX kernels against those of AVX-512, bit by bit. A processor without AMX has its instructions emulated.
// Exit status 77: skipped, as the processor has not even AVX-512.
#include "cpu.h"
#include "linear/amx_tiles.h"
#include "linear/tests/amx_emulator.h"
#include "linear/tests/check_products.h"

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

// One bit of one result is wrong, for many rows only.
void multiply_wrongly(const Matrix &matrix, const Input &input, int64_t row_begin, int64_t row_end, int64_t panel_begin,
                      int64_t panel_end, float *y, int64_t y_stride, const float *starts, int64_t start_stride) {
  avx512_kernels.multiply(matrix, input, row_begin, row_end, panel_begin, panel_end, y, y_stride, starts,
                          start_stride);
  if (row_end - row_begin > 8) reinterpret_cast<uint32_t &>(y[9 * y_stride + 3]) ^= 1;
}

void check_selection() {
  expect(same_products(amx_kernels, avx512_kernels), "the check at start refuses right kernels");
  Kernels wrong = amx_kernels;
  wrong.multiply = multiply_wrongly;
  expect(!same_products(wrong, avx512_kernels), "the check at start lets a wrong bit pass");
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
  check_selection();
  failures += check_products(amx_kernels, avx512_kernels);
  if (emulated) {
    const amx_emulator::State &state = amx_emulator::state;
    expect(state.products > 0, "no tile product ran");
    expect(!state.configured && state.releases > 0, "tiles are not released");
  }
  return failures != 0;
}
