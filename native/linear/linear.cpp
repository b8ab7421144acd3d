#include "linear/linear.h"

#include <new>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "linear/product_kernels.h"

namespace mnemos {
namespace {

struct TypeInfo {
  int columns, bytes;
  const Layout &layout;
};

const TypeInfo *info_of(WeightType type) {
  static const TypeInfo f32{1, 4, layouts::f32}, f16{1, 2, layouts::f16}, bf16{1, 2, layouts::bf16};
  static const TypeInfo q4_0{32, 18, layouts::q4_0}, q4_1{32, 20, layouts::q4_1}, q5_0{32, 22, layouts::q5_0};
  static const TypeInfo q5_1{32, 24, layouts::q5_1}, q8_0{32, 34, layouts::q8_0}, iq4_nl{32, 18, layouts::iq4_nl};
  static const TypeInfo q2_k{256, 84, layouts::q2_k}, q3_k{256, 110, layouts::q3_k}, q4_k{256, 144, layouts::q4_k};
  static const TypeInfo q5_k{256, 176, layouts::q5_k}, q6_k{256, 210, layouts::q6_k}, iq4_xs{256, 136, layouts::iq4_xs};
  switch (type) {
    case WeightType::f32: return &f32;
    case WeightType::f16: return &f16;
    case WeightType::bf16: return &bf16;
    case WeightType::q4_0: return &q4_0;
    case WeightType::q4_1: return &q4_1;
    case WeightType::q5_0: return &q5_0;
    case WeightType::q5_1: return &q5_1;
    case WeightType::q8_0: return &q8_0;
    case WeightType::q2_k: return &q2_k;
    case WeightType::q3_k: return &q3_k;
    case WeightType::q4_k: return &q4_k;
    case WeightType::q5_k: return &q5_k;
    case WeightType::q6_k: return &q6_k;
    case WeightType::iq4_nl: return &iq4_nl;
    case WeightType::iq4_xs: return &iq4_xs;
  }
  return nullptr;
}

constexpr size_t cache_line = 64, huge_page = size_t(1) << 21;
size_t rounded(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

std::shared_ptr<uint8_t> allocate(size_t bytes) {
  const auto alignment = std::align_val_t(bytes < huge_page ? cache_line : huge_page);
  auto *data = static_cast<uint8_t *>(::operator new(bytes, alignment));
#if defined(MADV_HUGEPAGE)
  if (bytes >= huge_page) madvise(data, bytes, MADV_HUGEPAGE);  // only advice: fewer page faults and TLB misses
#endif
  return {data, [alignment](uint8_t *p) { ::operator delete(p, alignment); }};
}

// Rows of bfloat16 whose distance is a multiple of 1 KB would meet in a few sets of the level-1 cache when a tile is
// loaded.
int64_t padded_columns(Form form, int64_t rows, int64_t columns) {
  const int64_t padded = (columns + 31) / 32 * 32;
  return form == Form::bf16 && rows > panel_rows && padded % 512 == 0 ? padded + 32 : padded;
}

Form form_of(const Layout &layout, const ProductKernels &kernels) {
  if (layout.quantized()) return kernels.quantized_form;
  return layout.type == WeightType::bf16 ? kernels.bf16_form : Form::f32;
}

}  // namespace

bool is_weight_type(int32_t type) { return info_of(WeightType(type)) != nullptr; }
int64_t block_columns(WeightType type) { return info_of(type)->columns; }
int64_t row_bytes(WeightType type, int64_t columns) { return columns / info_of(type)->columns * info_of(type)->bytes; }
const Layout &layout_of(WeightType type) { return info_of(type)->layout; }

size_t panel_bytes_of(const Layout &layout, int64_t columns) {
  if (layout.quantized()) return size_t(columns / (layout.group * 32) * layout.record_bytes());
  if (layout.type == WeightType::f32) return size_t(columns) * 64;
  if (layout.type == WeightType::f16) return size_t(columns) * 32;
  return size_t((columns + 1) / 2) * 64;
}

Matrix::Matrix(WeightType type, int64_t rows, int64_t columns, bool as_float32, const ProductKernels &kernels,
               KeptBlocks kept)
    : type(type), rows(rows), columns(columns), kernels(kernels), layout(as_float32 ? layouts::f32 : layout_of(type)),
      form(form_of(layout, kernels)), kept_(std::move(kept)),
      unit_bytes_(panel_bytes_of(layout, skips_blocks() ? 32 : columns)),
      raises_(form == Form::bf16_sums ? size_t(panels() * panel_rows) : 0),
      turns_(form == Form::bf16_sums ? size_t(panels()) : 0) {}

void place(const std::vector<Matrix *> &matrices) {
  size_t total = 0;
  for (const Matrix *matrix : matrices) total += rounded(matrix->bytes(), cache_line);
  const std::shared_ptr<uint8_t> storage = allocate(total);
  uint8_t *data = storage.get();
  for (Matrix *matrix : matrices) {
    matrix->storage_ = storage;
    matrix->data_ = data;
    data += rounded(matrix->bytes(), cache_line);
  }
}

size_t input_bytes(Form form, int64_t rows, int64_t columns) {
  const int64_t padded = padded_columns(form, rows, columns);
  const size_t cells = size_t(rows * padded);
  if (form == Form::f32) return cells * 4;
  if (form == Form::bf16) return cells * 2;
  if (form == Form::bf16_sums) return size_t(rows * sums_row(padded).cells) * 2;
  return cells / 32 * (form == Form::int15 ? sizeof(QuantBlock<2>) : sizeof(QuantBlock<1>));
}

Input bind_input(const ProductKernels &kernels, Form form, int64_t rows, int64_t columns, void *workspace) {
  Input input{};
  input.form = form;
  input.rows = rows;
  input.columns = columns;
  input.padded = padded_columns(form, rows, columns);
  input.kernels = &kernels;
  auto *bytes = static_cast<uint8_t *>(workspace);
  if (form == Form::f32) {
    input.values = reinterpret_cast<float *>(bytes);
  } else if (form == Form::bf16 || form == Form::bf16_sums) {
    input.halves = reinterpret_cast<uint16_t *>(bytes);
  } else {
    input.blocks = bytes;
  }
  return input;
}

void prepare_rows(const Input &input, const float *x, int64_t x_stride, int64_t row_begin, int64_t row_end) {
  input.kernels->prepare(input, x, x_stride, row_begin, row_end, 0, input.columns);
}

void prepare_columns(const Input &input, const float *x, int64_t x_stride, int64_t row_begin, int64_t row_end,
                     int64_t column_begin, int64_t column_end) {
  input.kernels->prepare(input, x, x_stride, row_begin, row_end, column_begin, column_end);
}

void fetch_columns(const Input &input, int64_t row_begin, int64_t row_end, int64_t column_begin, int64_t column_end) {
  const Form form = input.form, cells_form = form == Form::bf16_sums ? Form::bf16 : form;
  const auto bytes = [&](int64_t columns) { return input_bytes(cells_form, 1, columns); };
  const auto *begin = cells_form == Form::f32    ? reinterpret_cast<const uint8_t *>(input.values)
                      : cells_form == Form::bf16 ? reinterpret_cast<const uint8_t *>(input.halves)
                                                 : input.blocks;
  const size_t stride = input_bytes(form, 1, input.padded), first = bytes(column_begin), last = bytes(column_end);
  for (int64_t row = row_begin; row < row_end; row++) {
    const uint8_t *cells = begin + size_t(row) * stride;
    for (size_t at = first / 64 * 64; at < last; at += 64) __builtin_prefetch(cells + at, 1);
  }
}

void multiply(const Matrix &matrix, const Input &input, int64_t row_begin, int64_t row_end, int64_t panel_begin,
              int64_t panel_end, float *y, int64_t y_stride, const float *starts, int64_t start_stride) {
  matrix.kernels.multiply(matrix, input, row_begin, row_end, panel_begin, panel_end, y, y_stride, starts, start_stride);
}

bool has_weight_lengths(const Matrix &matrix) { return matrix.layout.quantized() && !matrix.layout.minimum(); }

void weight_lengths(const Matrix &matrix, int64_t panel_begin, int64_t panel_end, float *lengths) {
  matrix.kernels.weight_lengths(matrix, panel_begin, panel_end, lengths);
}

int64_t multiply_registers(const ProductKernels &kernels, Form form, int64_t rounds) {
  return kernels.multiply_registers(form, rounds);
}

}  // namespace mnemos
