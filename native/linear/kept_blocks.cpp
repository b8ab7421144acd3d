// Which blocks of a matrix in the file's form have weights other than zero.
#include "linear/layout.h"

namespace mnemos {
namespace {

// Whether a float16 number is not zero.
bool is_set(const uint8_t *half) { return half[0] != 0 || (half[1] & 0x7f) != 0; }

// Whether a row's block of 32 columns, which begins at `block`, has weights other than zero.
bool has_weights(WeightType type, const uint8_t *block) {
  if (type == WeightType::q8_0 || type == WeightType::q4_1 || type == WeightType::q5_1)  // by scale and minimum
    return is_set(block) || (type != WeightType::q8_0 && is_set(block + 2));
  const int size = type == WeightType::f32 ? 4 : 2;
  for (int i = 0; i < 32 * size; i++)
    if ((block[i] & (i % size == size - 1 ? 0x7f : 0xff)) != 0) return true;  // -0 is none
  return false;
}

}  // namespace

bool can_skip_blocks(WeightType type, int64_t columns) {
  const bool known = type == WeightType::f32 || type == WeightType::bf16 || type == WeightType::q8_0 ||
                     type == WeightType::q4_1 || type == WeightType::q5_1;
  return known && columns % 32 == 0;
}

KeptBlocks find_kept_blocks(WeightType type, int64_t rows, int64_t columns, const uint8_t *raw) {
  const int64_t stride = row_bytes(type, columns), block_bytes = row_bytes(type, 32), blocks = columns / 32;
  const int64_t together = layout_of(type).minimum() ? 2 : 1;
  KeptBlocks kept;
  for (int64_t first = 0; first < rows; first += panel_rows) {
    kept.first.push_back(int64_t(kept.places.size()));
    const int64_t end = rows - first < panel_rows ? rows : first + panel_rows;
    for (int64_t b = 0; b < blocks; b += together) {
      const int64_t count = blocks - b < together ? blocks - b : together;
      bool has = b + together >= blocks && kept.first.back() == int64_t(kept.places.size());  // the only one
      for (int64_t row = first; row < end && !has; row++)
        for (int64_t i = 0; i < count; i++) has |= has_weights(type, raw + row * stride + (b + i) * block_bytes);
      for (int64_t i = 0; i < count && has; i++) kept.places.push_back(int32_t(b + i));
    }
  }
  // The end, and twice more for kernels of two panels, which prefetch those after the last ones.
  for (int end = 0; end < 3; end++) kept.first.push_back(int64_t(kept.places.size()));
  return kept;
}

}  // namespace mnemos
