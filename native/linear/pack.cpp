// From the file's form into panels.
#include <cstring>

#include "linear/layout.h"

namespace mnemos {
namespace {

// One row's part of a record: codes, and scales as they will be stored.
struct RecordRow {
  uint8_t codes[256];
  int8_t subscales[16];
  uint8_t minima[16];
  uint16_t scale, minimum;  // float16 bits
};

uint16_t read_half(const uint8_t *p) { return uint16_t(p[0] | p[1] << 8); }

uint32_t read_word(const uint8_t *p) {
  uint32_t word;
  memcpy(&word, p, 4);
  return word;
}

// 32 codes whose low nibbles are columns 0..15 and high ones 16..31.
void split_nibbles(const uint8_t *nibbles, uint8_t *codes) {
  for (int i = 0; i < 16; i++) {
    codes[i] = nibbles[i] & 15;
    codes[16 + i] = nibbles[i] >> 4;
  }
}

void add_high_bits(const uint8_t *bits, uint8_t *codes) {
  for (int i = 0; i < 4; i++) {
    uint64_t word;
    memcpy(&word, codes + i * 8, 8);
    const uint64_t isolated = (bits[i] * uint64_t{0x0101010101010101}) & 0x8040201008040201;  // bit k alone in byte k
    word |= ((isolated + 0x7f7f7f7f7f7f7f7f) & 0x8080808080808080) >> 3;
    memcpy(codes + i * 8, &word, 8);
  }
}

// Eight pairs of 6-bit scales and minima in 12 bytes, as in Q4_K and Q5_K.
void split_six_bits(const uint8_t *packed, RecordRow &row) {
  for (int j = 0; j < 4; j++) {
    row.subscales[j] = int8_t(packed[j] & 63);
    row.minima[j] = packed[j + 4] & 63;
    row.subscales[j + 4] = int8_t((packed[j + 8] & 15) | (packed[j] >> 6) << 4);
    row.minima[j + 4] = uint8_t((packed[j + 8] >> 4) | (packed[j + 4] >> 6) << 4);
  }
}

void read_q2_k(const uint8_t *p, RecordRow &row) {
  const uint8_t *scales = p, *codes = p + 16;
  for (int i = 0; i < 16; i++) {
    row.subscales[i] = int8_t(scales[i] & 15);
    row.minima[i] = scales[i] >> 4;
  }
  for (int block = 0; block < 8; block++)
    for (int i = 0; i < 32; i++) row.codes[block * 32 + i] = codes[block / 4 * 32 + i] >> (block % 4 * 2) & 3;
  row.scale = read_half(p + 80);
  row.minimum = read_half(p + 82);
}

void read_q3_k(const uint8_t *p, RecordRow &row) {
  const uint8_t *high = p, *codes = p + 32, *scales = p + 96;
  for (int block = 0; block < 8; block++)
    for (int i = 0; i < 32; i++) {
      const int low = codes[block / 4 * 32 + i] >> (block % 4 * 2) & 3;
      row.codes[block * 32 + i] = uint8_t(low | (high[i] >> block & 1) << 2);
    }
  for (int i = 0; i < 16; i++) {
    const int low = scales[i % 8] >> (i / 8 * 4) & 15, top = scales[8 + i % 4] >> (i / 4 * 2) & 3;
    row.subscales[i] = int8_t((low | top << 4) - 32);
  }
  row.scale = read_half(p + 108);
}

void read_q4_k(const uint8_t *p, RecordRow &row, const uint8_t *codes) {
  row.scale = read_half(p);
  row.minimum = read_half(p + 2);
  split_six_bits(p + 4, row);
  for (int chunk = 0; chunk < 4; chunk++)
    for (int i = 0; i < 32; i++) {
      row.codes[chunk * 64 + i] = codes[chunk * 32 + i] & 15;
      row.codes[chunk * 64 + 32 + i] = codes[chunk * 32 + i] >> 4;
    }
}

void read_q5_k(const uint8_t *p, RecordRow &row) {
  read_q4_k(p, row, p + 48);
  const uint8_t *high = p + 16;
  for (int block = 0; block < 8; block++)
    for (int i = 0; i < 32; i++) row.codes[block * 32 + i] |= uint8_t((high[i] >> block & 1) << 4);
}

void read_q6_k(const uint8_t *p, RecordRow &row) {
  const uint8_t *low = p, *high = p + 128;
  for (int part = 0; part < 2; part++)
    for (int quarter = 0; quarter < 4; quarter++)
      for (int i = 0; i < 32; i++) {
        const int nibble = low[part * 64 + quarter % 2 * 32 + i] >> (quarter / 2 * 4) & 15;
        const int top = high[part * 32 + i] >> (quarter * 2) & 3;
        row.codes[part * 128 + quarter * 32 + i] = uint8_t(nibble | top << 4);
      }
  memcpy(row.subscales, p + 192, 16);
  row.scale = read_half(p + 208);
}

void read_iq4_xs(const uint8_t *p, RecordRow &row) {
  row.scale = read_half(p);
  const int high = read_half(p + 2);
  for (int block = 0; block < 8; block++) {
    const int low = p[4 + block / 2] >> (block % 2 * 4) & 15;
    row.subscales[block] = int8_t((low | (high >> (2 * block) & 3) << 4) - 32);
    split_nibbles(p + 8 + block * 16, row.codes + block * 32);
  }
}

void read_record(WeightType type, const uint8_t *p, RecordRow &row) {
  switch (type) {
    case WeightType::q4_0:
    case WeightType::iq4_nl: row.scale = read_half(p); return split_nibbles(p + 2, row.codes);
    case WeightType::q4_1:
      row.scale = read_half(p);
      row.minimum = read_half(p + 2);
      return split_nibbles(p + 4, row.codes);
    case WeightType::q5_0:
      row.scale = read_half(p);
      split_nibbles(p + 6, row.codes);
      return add_high_bits(p + 2, row.codes);
    case WeightType::q5_1:
      row.scale = read_half(p);
      row.minimum = read_half(p + 2);
      split_nibbles(p + 8, row.codes);
      return add_high_bits(p + 4, row.codes);
    case WeightType::q8_0:
      row.scale = read_half(p);
      for (int i = 0; i < 32; i++) row.codes[i] = p[2 + i] ^ 0x80;
      return;
    case WeightType::q2_k: return read_q2_k(p, row);
    case WeightType::q3_k: return read_q3_k(p, row);
    case WeightType::q4_k: return read_q4_k(p, row, p + 16);
    case WeightType::q5_k: return read_q5_k(p, row);
    case WeightType::q6_k: return read_q6_k(p, row);
    case WeightType::iq4_xs: return read_iq4_xs(p, row);
    default: return;  // float types have no records
  }
}

// Writes the codes of one block (32 columns) of one row: vector v's bytes 4r..4r+3 are codes 4v..4v+3.
void store_codes(const Layout &layout, const uint8_t *codes, int r, uint8_t *block) {
  uint32_t words[8];
  memcpy(words, codes, 32);
  auto put = [&](int vector, uint32_t word) { memcpy(block + vector * 64 + r * 4, &word, 4); };
  const uint32_t ones = 0x01010101;
  if (layout.base == 8)
    for (int v = 0; v < 8; v++) put(v, words[v]);
  if (layout.base == 4)
    for (int j = 0; j < 4; j++) put(j, (words[j] & ones * 15) | (words[4 + j] & ones * 15) << 4);
  if (layout.base == 2)
    for (int k = 0; k < 2; k++) {
      uint32_t word = 0;
      for (int i = 0; i < 4; i++) word |= (words[2 * i + k] & ones * 3) << (2 * i);
      put(k, word);
    }
  const uint32_t high_bits = ones * ((1u << layout.high) - 1);
  const int vectors = layout.high, per_vector = layout.high == 0 ? 0 : 8 / layout.high;
  for (int k = 0; k < vectors; k++) {
    uint32_t word = 0;
    for (int i = 0; i < per_vector; i++)
      word |= (words[layout.high * i + k] >> layout.base & high_bits) << (layout.high * i);
    put(layout.base + k, word);
  }
}

void store_record(const Layout &layout, const RecordRow &row, int r, uint8_t *record) {
  for (int block = 0; block < layout.group; block++)
    store_codes(layout, row.codes + block * 32, r, record + block * layout.code_bytes());
  uint8_t *p = record + layout.group * layout.code_bytes();
  const int subscales = layout.subscales();
  for (int i = 0; i < subscales; i++) p[i * 16 + r] = uint8_t(row.subscales[i]);
  p += subscales * 16;
  if (layout.minimum()) {
    for (int i = 0; i < subscales; i++) p[i * 16 + r] = row.minima[i];
    p += subscales * 16;
  }
  memcpy(p + r * 2, &row.scale, 2);
  if (layout.minimum()) memcpy(p + 32 + r * 2, &row.minimum, 2);
}

// The inverse of store_codes.
void load_codes(const Layout &layout, const uint8_t *block, int r, uint8_t *codes) {
  auto get = [&](int vector) { return read_word(block + vector * 64 + r * 4); };
  const uint32_t ones = 0x01010101;
  const uint32_t base_bits = ones * ((1u << layout.base) - 1), high_bits = ones * ((1u << layout.high) - 1);
  const int per_vector = 8 / layout.base, per_high = layout.high == 0 ? 1 : 8 / layout.high;
  const int vectors = 8 / per_vector, high_vectors = 8 / per_high;
  uint32_t words[8];
  for (int v = 0; v < 8; v++) {
    words[v] = get(v % vectors) >> (v / vectors * layout.base) & base_bits;
    if (layout.high > 0)
      words[v] |= (get(layout.base + v % high_vectors) >> (v / high_vectors * layout.high) & high_bits) << layout.base;
  }
  memcpy(codes, words, 32);
  if (layout.table)
    for (int i = 0; i < 32; i++) codes[i] = iq4_values[codes[i]];
}

// The values of row r of a record, 32 * group floats.
void expand_record(const Layout &layout, const uint8_t *record, int r, float *out) {
  const int subscales = layout.subscales(), width = layout.halves() ? 16 : 32;
  const uint8_t *scales = record + layout.group * layout.code_bytes(), *minima = scales + subscales * 16;
  const uint8_t *supers = layout.minimum() ? minima + subscales * 16 : minima;
  const float scale = half_to_float(read_half(supers + r * 2));
  const float minimum = layout.minimum() ? half_to_float(read_half(supers + 32 + r * 2)) : 0;
  for (int block = 0; block < layout.group; block++) {
    uint8_t codes[32];
    load_codes(layout, record + block * layout.code_bytes(), r, codes);
    for (int i = 0; i < 32; i += width) {
      const int sub = (block * 32 + i) / width;
      const float factor = subscales ? scale * float(int8_t(scales[sub * 16 + r])) : scale;
      const float added = subscales && layout.minimum() ? -(minimum * float(minima[sub * 16 + r])) : minimum;
      for (int j = i; j < i + width; j++) out[block * 32 + j] = factor * float(codes[j] - layout.offset);
      if (layout.minimum())
        for (int j = i; j < i + width; j++) out[block * 32 + j] += added;
    }
  }
}

float read_float(WeightType type, const uint8_t *row, int64_t column) {
  if (type == WeightType::f32) return from_bits(read_word(row + column * 4));
  if (type == WeightType::f16) return half_to_float(read_half(row + column * 2));
  return bfloat_to_float(read_half(row + column * 2));
}

size_t float_offset(WeightType layout, int r, int64_t column) {
  if (layout == WeightType::f32) return size_t(column * 64 + r * 4);
  if (layout == WeightType::f16) return size_t(column * 32 + r * 2);
  return size_t(column / 2 * 64 + r * 4 + column % 2 * 2);
}

// Columns begin to end of a row.
void pack_floats(const Layout &layout, WeightType type, const uint8_t *raw, int64_t begin, int64_t end, int r,
                 uint8_t *panel) {
  const int size = type == WeightType::f32 ? 4 : 2;
  if (layout.type == WeightType::bf16) {
    for (int64_t c = begin; c < end; c += 2)
      memcpy(panel + float_offset(type, r, c), raw + c * 2, size_t(end - c > 1 ? 4 : 2));
  } else if (layout.type == type) {
    for (int64_t c = begin; c < end; c++) memcpy(panel + float_offset(type, r, c), raw + c * size, size_t(size));
  } else {
    for (int64_t c = begin; c < end; c++) {
      const float value = read_float(type, raw, c);
      memcpy(panel + float_offset(WeightType::f32, r, c), &value, 4);
    }
  }
}

// One record of a quantized row as float32, through its packed form.
void expand_floats(WeightType type, const uint8_t *raw, int64_t begin, int r, uint8_t *panel) {
  const Layout &stored = layout_of(type);
  uint8_t record[256 * 16 + 1024];
  float values[256];
  RecordRow row;
  read_record(type, raw, row);
  store_record(stored, row, 0, record);
  expand_record(stored, record, 0, values);
  for (int i = 0; i < stored.group * 32; i++)
    memcpy(panel + float_offset(WeightType::f32, r, begin + i), values + i, 4);
}

// Whether the file's blocks hold their codes like a record, except for the order of words: nibbles of columns i and 16
// + i side by side, or whole bytes.
bool packs_by_words(const Layout &layout) { return layout.quantized() && layout.group == 1 && layout.high == 0; }

// All blocks of up to 16 rows; a block's codes follow its scale and minimum.
template <int Words, int Halves>
void pack_words(const uint8_t *const *sources, int64_t blocks, int64_t rows, uint8_t *record) {
  constexpr int scales = Halves * 2, block_bytes = scales + Words * 4, record_bytes = Words * 64 + Halves * 32;
  constexpr uint32_t flipped = Words == 8 ? 0x80808080 : 0;  // int8 to codes that start from 0
  for (int64_t b = 0; b < blocks; b++, record += record_bytes) {
    for (int64_t r = 0; r < rows; r++) {
      const uint8_t *block = sources[r] + b * block_bytes;
      uint32_t words[Words];
      memcpy(words, block + scales, sizeof words);
      for (int j = 0; j < Words; j++) {
        const uint32_t word = words[j] ^ flipped;
        memcpy(record + j * 64 + r * 4, &word, 4);
      }
      for (int half = 0; half < Halves; half++) memcpy(record + Words * 64 + half * 32 + r * 2, block + half * 2, 2);
    }
  }
}

// The first columns of the rows of one panel, a run at a time, so that data written together stays in the cache.
void pack_panel(const Matrix &matrix, const uint8_t *const *sources, int64_t rows, int64_t columns, uint8_t *panel) {
  const Layout &layout = matrix.layout;
  const int64_t block = block_columns(matrix.type), width = block == 1 ? 32 : block;
  if (packs_by_words(layout)) {
    const auto pack = layout.base == 8 ? pack_words<8, 1> : layout.minimum() ? pack_words<4, 2> : pack_words<4, 1>;
    return pack(sources, columns / width, rows, panel);
  }
  for (int64_t begin = 0; begin < columns; begin += width) {
    const int64_t end = begin + width < columns ? begin + width : columns;
    for (int r = 0; r < rows; r++) {
      if (block == 1) {
        pack_floats(layout, matrix.type, sources[r], begin, end, r, panel);
        continue;
      }
      const uint8_t *record = sources[r] + row_bytes(matrix.type, begin);
      if (layout.quantized()) {
        RecordRow row;
        read_record(matrix.type, record, row);
        store_record(layout, row, r, panel + begin / width * layout.record_bytes());
      } else {
        expand_floats(matrix.type, record, begin, r, panel);
      }
    }
  }
}

}  // namespace

void pack_panels(Matrix &matrix, const uint8_t *raw, int64_t panel_begin, int64_t panel_end, const int64_t *order) {
  const int64_t stride = row_bytes(matrix.type, matrix.columns);
  for (int64_t index = panel_begin; index < panel_end; index++) {
    const int64_t first = index * panel_rows;
    const int64_t filled = matrix.rows - first < panel_rows ? matrix.rows - first : panel_rows;
    const bool padded = matrix.layout.type == WeightType::bf16 && matrix.columns % 2 != 0;
    uint8_t *panel = matrix.panel(index);
    if (filled < panel_rows || padded) memset(panel, 0, matrix.panel_bytes(index));
    const uint8_t *sources[panel_rows];
    for (int64_t r = 0; r < filled; r++) sources[r] = raw + (order ? order[first + r] : first + r) * stride;
    if (!matrix.skips_blocks()) {
      pack_panel(matrix, sources, filled, matrix.columns, panel);
      matrix.find_raises(index, index + 1);
      continue;
    }
    const size_t block_bytes = panel_bytes_of(matrix.layout, 32);
    for (int64_t b = 0; b < matrix.stored_blocks(index); b++, panel += block_bytes) {
      const uint8_t *blocks[panel_rows];
      for (int64_t r = 0; r < filled; r++)
        blocks[r] = sources[r] + row_bytes(matrix.type, matrix.places(index)[b] * int64_t{32});
      pack_panel(matrix, blocks, filled, 32, panel);
    }
    matrix.find_raises(index, index + 1);
  }
}

namespace {

// The first columns of row r of a panel.
void expand_row(const Layout &layout, const uint8_t *panel, int r, int64_t columns, float *out) {
  if (layout.quantized()) {
    for (int64_t begin = 0; begin < columns; begin += layout.group * 32, panel += layout.record_bytes())
      expand_record(layout, panel, r, out + begin);
    return;
  }
  for (int64_t c = 0; c < columns; c++) {
    const uint8_t *p = panel + float_offset(layout.type, r, c);
    if (layout.type == WeightType::f32) memcpy(out + c, p, 4);
    if (layout.type == WeightType::f16) out[c] = half_to_float(read_half(p));
    if (layout.type == WeightType::bf16) out[c] = bfloat_to_float(read_half(p));
  }
}

}  // namespace

void dequantize_row(const Matrix &matrix, int64_t row, float *out) {
  const int64_t index = row / panel_rows;
  const uint8_t *panel = matrix.panel(index);
  const int r = int(row % panel_rows);
  if (!matrix.skips_blocks()) return expand_row(matrix.layout, panel, r, matrix.columns, out);
  memset(out, 0, size_t(matrix.columns) * sizeof(float));
  for (int64_t b = 0; b < matrix.stored_blocks(index); b++, panel += panel_bytes_of(matrix.layout, 32))
    expand_row(matrix.layout, panel, r, 32, out + matrix.places(index)[b] * 32);
}

}  // namespace mnemos
