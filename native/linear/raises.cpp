// The powers of two by which bfloat16 tiles raise the scales of quantized rows; see amx_expand.h.
#include <cstring>

#include "linear/layout.h"

namespace mnemos {
namespace {

uint16_t half_at(const uint8_t *p) {
  uint16_t half;
  memcpy(&half, p, 2);
  return half;
}

}  // namespace

void Matrix::find_raises(int64_t panel_begin, int64_t panel_end) {
  if (form != Form::bf16_sums) return;
  const int record_bytes = layout.record_bytes(), supers = record_bytes - (layout.minimum() ? 64 : 32);
  for (int64_t index = panel_begin; index < panel_end; index++) {
    // Magnitudes are ordered like their bits.
    int16_t largest[panel_rows] = {}, largest_minimum[panel_rows] = {}, signs[panel_rows] = {};
    const uint8_t *record = panel(index);
    for (const uint8_t *end = record + panel_bytes(index); record < end; record += record_bytes)
      for (int r = 0; r < panel_rows; r++) {
        const auto scale = int16_t(half_at(record + supers + r * 2)), magnitude = int16_t(scale & 0x7fff);
        signs[r] = int16_t(signs[r] | scale);
        largest[r] = largest[r] < magnitude ? magnitude : largest[r];
        if (!layout.minimum()) continue;
        const auto minimum = int16_t(half_at(record + supers + 32 + r * 2) & 0x7fff);
        largest_minimum[r] = largest_minimum[r] < minimum ? minimum : largest_minimum[r];
      }
    turns_[size_t(index)] = 0;
    for (int r = 0; r < panel_rows; r++) {
      turns_[size_t(index)] |= signs[r] < 0;
      const bool finite = largest[r] < 0x7c00 && largest_minimum[r] < 0x7c00;
      const float scale = half_to_float(uint16_t(largest[r])) * (layout.subscales() > 0 ? 128.0f : 1.0f);
      const float minimum = half_to_float(uint16_t(largest_minimum[r])) * (layout.subscales() > 0 ? 64.0f : 1.0f);
      const float most = scale > minimum / 1024 ? scale : minimum / 1024;
      const int raise = most > 0 ? 131 - int(to_bits(most) >> 23) : 0;
      raises_[size_t(index * panel_rows + r)] = finite ? int8_t(raise < 15 ? raise : 15) : not_finite;
    }
  }
}

}  // namespace mnemos
