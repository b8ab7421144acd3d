// Matrix products y = x W^T over weights that are repacked once, for every storage type and instruction set.
//
// The caller owns parallelism: panels of 16 output rows are independent of each other, and so are input rows.
// Every function is reentrant. Only `place` allocates or throws (std::bad_alloc).
//
// Batch invariance: y[t, r] has the same bits whatever else is computed by the same call, another call or another
// thread. All kernels of one instruction set take the same floating-point steps in the same order for one output.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace mnemos {

// Storage types that a weight can have, numbered as in GGUF.
enum class WeightType : int32_t {
  f32 = 0,
  f16 = 1,
  q4_0 = 2,
  q4_1 = 3,
  q5_0 = 6,
  q5_1 = 7,
  q8_0 = 8,
  q2_k = 10,
  q3_k = 11,
  q4_k = 12,
  q5_k = 13,
  q6_k = 14,
  iq4_nl = 20,
  iq4_xs = 23,
  bf16 = 30,
};

bool is_weight_type(int32_t type);
// Columns of one block of the file's form: a matrix has a whole number of blocks per row. 1, 32 or 256.
int64_t block_columns(WeightType type);
// Bytes of one row in the file's form.
int64_t row_bytes(WeightType type, int64_t columns);

// The kernels of one instruction set: "scalar", "avx2", "avxvnni", "avx512", "avx512_bf16", "amx",
// "amx_bf16"; "neon", "neon_i8mm".
struct ProductKernels;
const char *name_of(const ProductKernels &kernels);
// Those that this machine can run, slowest first; "scalar" is always included.
std::vector<const ProductKernels *> runnable_kernels();
// Null if the name is unknown or the machine cannot run it.
const ProductKernels *find_kernels(const char *name);

// The input form of a product: float32; bfloat16; int8 in blocks of 32 columns, each with a float32 scale; the same
// with 15 bits, 128 times as fine, as two int8 parts; or bfloat16 with the sums of blocks (`SumsRow`). Kernels multiply
// quantized matrices by the last one, or else by both of those before it.
enum class Form : int32_t { f32, bf16, int8, int15, bf16_sums };

// A row of Form::bf16_sums, in numbers of 16 bits: the columns, times 2^48, in every four of them the second and the
// third one exchanged; then the sums of blocks of 32 of these, then those of 16, each followed by zeros up to a
// multiple of 32.
struct SumsRow {
  int64_t block_sums, half_sums, cells;
};
constexpr SumsRow sums_row(int64_t padded) {
  const int64_t halves = padded + (padded / 32 + 31) / 32 * 32;
  return {padded, halves, halves + (padded / 16 + 31) / 32 * 32};
}

constexpr int64_t panel_rows = 16;

struct Layout;  // the layout of a storage type in a panel

// The blocks, 16 rows (a panel) by 32 columns, that a matrix stores if others are zero: they take neither memory nor
// time. Products have the bits that they have with zeros stored (but for the sign of a zero, and for activations that
// are not finite).
struct KeptBlocks {
  std::vector<int64_t> first;  // the number of each panel's first block among all that are stored, and their count
  std::vector<int32_t> places;  // of each stored block among its panel's, ascending
};

// Whether a matrix can do without some of its blocks: float32, bfloat16, Q8_0, Q4_1 and Q5_1, in whole blocks.
bool can_skip_blocks(WeightType type, int64_t columns);
// The blocks of a matrix in the file's form with weights other than zero. Every panel has at least one. In Q4_1 and
// Q5_1 blocks of an even place and the next one are kept together, as kernels add their minima together.
KeptBlocks find_kept_blocks(WeightType type, int64_t rows, int64_t columns, const uint8_t *raw);

class Matrix {
 public:
  // The bytes are undefined until `pack_panels` has run over all panels. `columns` must be a multiple of
  // block_columns(type). With `as_float32` the weights are expanded and multiplied in float32. A matrix has no bytes
  // before `place`. Without `kept.places` it has all its blocks.
  Matrix(WeightType type, int64_t rows, int64_t columns, bool as_float32, const ProductKernels &kernels,
         KeptBlocks kept = {});
  Matrix(const Matrix &) = delete;
  Matrix &operator=(const Matrix &) = delete;

  const WeightType type;
  const int64_t rows, columns;
  const ProductKernels &kernels;
  const Layout &layout;
  const Form form;  // the coarsest form that its products take
  // With `precise`, the finest form that its products can take.
  Form input_form(bool precise) const { return precise && form == Form::int8 ? Form::int15 : form; }

  // The unit of parallel work. The last panel may be partly empty. A range of panels that begins at a multiple of 4
  // and has a length that is a multiple of 4 is multiplied fastest.
  int64_t panels() const { return (rows + panel_rows - 1) / panel_rows; }
  size_t panel_bytes(int64_t index) const { return offset(index + 1) - offset(index); }
  size_t bytes() const { return offset(panels()); }
  const uint8_t *panel(int64_t index) const { return data_ + offset(index); }
  uint8_t *panel(int64_t index) { return data_ + offset(index); }

  bool skips_blocks() const { return !kept_.places.empty(); }
  // The blocks of 32 columns that a panel stores, and their places; null if none are skipped.
  int64_t stored_blocks(int64_t index) const {
    return skips_blocks() ? kept_.first[size_t(index) + 1] - kept_.first[size_t(index)] : columns / 32;
  }
  const int32_t *places(int64_t index) const {
    return skips_blocks() ? kept_.places.data() + kept_.first[size_t(index)] : nullptr;
  }

  // With Form::bf16_sums, for each row of a panel: the power of two that brings its largest scale, or a 1024th of its
  // largest minimum, to between 2^4 and 2^5; or `not_finite`. `find_raises` finds them in the packed bytes; pack_panels
  // calls it.
  static constexpr int8_t not_finite = -128;
  const int8_t *raises(int64_t index) const { return raises_.data() + index * panel_rows; }
  // Whether a panel of a type with minima has scales below zero.
  bool turns(int64_t index) const { return turns_[size_t(index)] != 0; }
  void find_raises(int64_t panel_begin, int64_t panel_end);

 private:
  friend void place(const std::vector<Matrix *> &matrices);

  size_t offset(int64_t index) const {
    return (skips_blocks() ? size_t(kept_.first[size_t(index)]) : size_t(index)) * unit_bytes_;
  }

  const KeptBlocks kept_;
  const size_t unit_bytes_;  // of a panel or, if some are skipped, of a block
  std::vector<int8_t> raises_;
  std::vector<uint8_t> turns_;
  uint8_t *data_ = nullptr;
  std::shared_ptr<uint8_t> storage_;
};

// Gives matrices their bytes, one after the other in one piece of memory that lives as long as any of them: together
// they fill large pages, which small matrices alone would not. Throws std::bad_alloc.
void place(const std::vector<Matrix *> &matrices);

// Repacks rows from the file's form. `raw` is the first byte of row 0, `order` gives the file's row for each of
// the matrix's, null if they are the same. May run in parallel over disjoint ranges.
void pack_panels(Matrix &matrix, const uint8_t *raw, int64_t panel_begin, int64_t panel_end,
                 const int64_t *order = nullptr);

// The exact values that the format defines: `columns` floats. Zeros for blocks that are skipped.
void dequantize_row(const Matrix &matrix, int64_t row, float *out);

// The Euclidean lengths of these panels' rows, 16 per panel, rounded up. Only for matrices with them: quantized ones
// without minima, whose products with the same activations in different forms differ only by what the
// activations do, and by roundings of sums.
bool has_weight_lengths(const Matrix &matrix);
void weight_lengths(const Matrix &matrix, int64_t panel_begin, int64_t panel_end, float *lengths);

// 32 activations, each about scale * quant. A quant is its part, or 128 * (first part) + (second part).
template <int Parts>
struct QuantBlock {
  int8_t parts[Parts][32];  // -127 to 127
  // Two terms of the scale. Kernels with bfloat16 dot products have two powers of two here, the second of either sign:
  // so a weight's scale can be multiplied by it with integer additions to its exponent, for which some processors have
  // units that the dot products don't need. Others have the scale itself and 0.
  float terms[2];
  int32_t first_count;  // sum of the first half's quants
  int32_t start;  // -8 * (sum of all quants): what a dot product with codes that stand for code - 8 starts from
  union {
    float sum;  // scale * (sum of all quants)
    uint16_t sums[2];  // for bfloat16 dot products, in a block of even number: its own and the next one's (0 if there
                       // is none)
  };

  float scale() const { return terms[0] + terms[1]; }
  int32_t count() const { return -(start >> 3); }  // sum of all quants
  int32_t second_count() const { return count() - first_count; }
};

// Memory that will be needed after a product of many rows, which is bound by arithmetic and leaves memory idle: the
// kernels prefetch some of it with each block that they multiply.
class Ahead {
 public:
  virtual ~Ahead() = default;
  // Nothing more is needed.
  void stop() { go_to(nullptr, 0, false); }
  // Makes sure that there is something to prefetch, if there is more; each tile of a product begins with this.
  void refill() {
    if (left_ <= 0 && more_) next();
  }
  // Prefetches a few lines. It calls no function: all vector registers are in use.
  void advance() {
    if (left_ <= 0) return;
    for (int64_t at = 0; at < step; at += 64) __builtin_prefetch(data_ + at, 0, 2);
    data_ += step, left_ -= step;
  }

 protected:
  // Calls `go_to` with the next piece.
  virtual void next() = 0;
  // `more`: other pieces follow this one.
  void go_to(const uint8_t *data, int64_t bytes, bool more) { data_ = data, left_ = bytes, more_ = more; }

 private:
  static constexpr int64_t step = 256;
  const uint8_t *data_ = nullptr;
  int64_t left_ = 0;
  bool more_ = false;
};

// Rows of activations in the form that a matrix needs, in the caller's workspace.
struct Input {
  Form form;
  int64_t rows, columns;
  int64_t padded;  // columns, rounded up to what the form stores (a multiple of 32)
  const ProductKernels *kernels;
  float *values;  // f32: (rows, padded), zeros past `columns`
  uint16_t *halves;  // bf16: (rows, padded), zeros past `columns`; bf16_sums: (rows, sums_row(padded).cells)
  uint8_t *blocks;  // int8, int15: (rows, padded / 32) of QuantBlock<1>, QuantBlock<2>
  Ahead *ahead;  // or null; bind_input gives none
  bool passing;  // f32: for few rows, weights are read bypassing the caches; set by the caller, false otherwise
};

// Bytes of workspace for `rows` rows; alignment 64.
size_t input_bytes(Form form, int64_t rows, int64_t columns);
Input bind_input(const ProductKernels &kernels, Form form, int64_t rows, int64_t columns, void *workspace);
// Fills rows row_begin to row_end from x (row t at x + t * x_stride). Rows are independent of each other.
void prepare_rows(const Input &input, const float *x, int64_t x_stride, int64_t row_begin, int64_t row_end);
// The same for some columns of these rows, which begin and end at multiples of 32; or end with the last column.
void prepare_columns(const Input &input, const float *x, int64_t x_stride, int64_t row_begin, int64_t row_end,
                     int64_t column_begin, int64_t column_end);

// Prefetches the memory that `prepare_columns` is going to fill.
void fetch_columns(const Input &input, int64_t row_begin, int64_t row_end, int64_t column_begin, int64_t column_end);

// y[t * y_stride + r] = starts[t * start_stride + r] + sum over c of x[t, c] W[r, c], for rows row_begin <= t < row_end
// of the input and the output rows r of the panels. `starts` may be null for zeros, a bias of matrix.rows floats with
// stride 0, or the values to add the product to, even y itself. The input has a form that the matrix takes, and its
// columns.
void multiply(const Matrix &matrix, const Input &input, int64_t row_begin, int64_t row_end, int64_t panel_begin,
              int64_t panel_end, float *y, int64_t y_stride, const float *starts, int64_t start_stride);

// Multiplies data in registers and in the level-1 cache, as products with inputs of this form do (int15: as int8),
// `rounds` times a tile. Returns the number of multiply-adds.
int64_t multiply_registers(const ProductKernels &kernels, Form form, int64_t rounds);

}  // namespace mnemos
