#include <algorithm>
#include <cstdint>
#include <utility>

#include "program/tasks.h"

namespace mnemos {
namespace {

// The most rows that one item multiplies: enough to pay for expanding a panel's weights, few enough that input and
// result stay in the second-level cache. The kernels take rows by six, or by a divisor of it.
constexpr int64_t most_rows = 264, row_unit = 6;
// From this many rows per thread on, each thread has its own rows: what is done to a row then finds it in its
// cache.
constexpr int64_t own_rows = 128;
// The most panels per item: the more, the fewer runs of weights begin, but with many rows the results of all
// should stay in the cache. With many rows the kernels take panels by two.
constexpr int64_t many_rows = 8, most_panels_of_many = 8, most_panels = 16;
constexpr int64_t most_panels_for(int64_t rows) { return rows > many_rows ? most_panels_of_many : most_panels; }

int64_t tiles_of(int64_t count, int64_t size) { return (count + size - 1) / size; }

class ProductTask : public Task {
 public:
  ProductTask(std::vector<Product> products, int input, PreparedForm form, Rows rows, bool unless_argmax)
      : products_(std::move(products)), input_(input), form_(form), rows_(rows), unless_argmax_(unless_argmax) {
    reads = {input};
    for (const Product &product : products_) {
      if (product.residual >= 0) {
        reads.push_back(product.residual);
        in_place.emplace_back(product.residual, product.y.buffer);
      }
      writes.push_back(product.y.buffer);
      if (product.y.form) pairs_only_ = true;
      for (int64_t panels = 1; panels <= most_panels; panels++) {
        panel_tiles_[panels] += tiles_of(product.matrix->panels(), panels);
      }
    }
  }

  bool active(const Step &step) const override { return !(unless_argmax_ && step.batch.argmax); }
  void plan(const Step &step) override {
    if (step.rows(rows_) == planned_rows_ && step.threads == planned_threads_) return;
    cut_ = cut_for(step), planned_rows_ = step.rows(rows_), planned_threads_ = step.threads;
  }
  int64_t items(const Step &) const override { return panel_tiles_[cut_.panels] * cut_.row_tiles; }

  int64_t scratch_bytes(const BatchView &, int) const override {
    return 2 * scratch_floats * static_cast<int64_t>(sizeof(float));
  }

  void run(const Step &step, int64_t item, int thread) const override {
    int64_t tile = item % panel_tiles_[cut_.panels];
    size_t index = 0;
    for (; tile >= tiles_of(products_[index].matrix->panels(), cut_.panels); index++) {
      tile -= tiles_of(products_[index].matrix->panels(), cut_.panels);
    }
    const Product &product = products_[index];
    Range range;
    range.row_begin = item / panel_tiles_[cut_.panels] * cut_.rows;
    range.row_end = std::min(range.row_begin + cut_.rows, step.rows(rows_));
    range.panel_begin = tile * cut_.panels;
    range.panel_end = std::min(range.panel_begin + cut_.panels, product.matrix->panels());
    Input input =
        bind_input(*form_.kernels, form_.form, step.rows(rows_), form_.columns, step.data<uint8_t>(input_, thread));
    input.ahead = step.ahead[thread].get();
    if (!product.activated && !product.y.form) return multiply_into(product, input, range, step, thread);
    multiply_and_finish(product, input, range, step, thread);
  }

 private:
  // Of one matrix's results in scratch.
  static constexpr int64_t scratch_floats =
      panel_rows * std::max(most_rows * most_panels_of_many, many_rows *most_panels);

  struct Range {
    int64_t row_begin, row_end, panel_begin, panel_end;
  };

  // How the work is cut into items.
  struct Cut {
    int64_t rows, row_tiles, panels;
  };

  // Rows in tiles of the same size; as many panels per item as let all threads end together, preferably many.
  Cut cut_for(const Step &step) const {
    const int64_t rows = step.rows(rows_), threads = step.threads;
    int64_t least_tiles = std::max<int64_t>(1, tiles_of(rows, most_rows));
    if (rows >= threads * own_rows) least_tiles = tiles_of(least_tiles, threads) * threads;
    Cut cut{tiles_of(tiles_of(rows, least_tiles), row_unit) * row_unit, 0, most_panels};
    cut.row_tiles = rows > 0 ? tiles_of(rows, cut.rows) : 0;
    int64_t least = INT64_MAX;
    for (int64_t panels = most_panels_for(rows); panels >= 2; panels -= rows > many_rows || pairs_only_ ? 2 : 1) {
      const int64_t longest = tiles_of(panel_tiles_[panels] * cut.row_tiles, threads) * panels;
      if (longest < least) least = longest, cut.panels = panels;
    }
    return cut;
  }

  static const float *bias_of(const VectorPointer &bias) { return bias ? bias->data() : nullptr; }

  // Starts from the bias or the residual, or both.
  void multiply_into(const Product &product, const Input &input, const Range &range, const Step &step,
                     int thread) const {
    const int64_t width = product.matrix->rows, first = range.panel_begin * panel_rows;
    const int64_t count = std::min(range.panel_end * panel_rows, width) - first;
    const float *bias = bias_of(product.bias), *starts = bias;
    float *y = step.data(product.y.buffer, thread);
    if (product.residual >= 0) starts = step.data(product.residual, thread);
    if (product.residual >= 0 && bias != nullptr) {
      for (int64_t at = range.row_begin * width + first; at < range.row_end * width; at += width) {
        step.kernels->add(starts + at, bias + first, y + at, count);
      }
      starts = y;
    }
    multiply(*product.matrix, input, range.row_begin, range.row_end, range.panel_begin, range.panel_end, y, width,
             starts, product.residual >= 0 ? width : 0);
  }

  // Goes through scratch that holds this tile alone.
  void multiply_and_finish(const Product &product, const Input &input, const Range &range, const Step &step,
                           int thread) const {
    const int64_t width = product.matrix->rows, first = range.panel_begin * panel_rows;
    const int64_t count = std::min(range.panel_end * panel_rows, width) - first;
    const int64_t stride = most_panels_for(step.rows(rows_)) * panel_rows;
    float *result = step.thread_scratch(thread), *second = result + scratch_floats;
    const auto tile_of = [&](const Matrix &matrix, const VectorPointer &bias, float *into) {
      multiply(matrix, input, range.row_begin, range.row_end, range.panel_begin, range.panel_end,
               into - range.row_begin * stride - first, stride, bias_of(bias), 0);
    };
    Input prepared{};
    if (product.y.form) {
      prepared = bind_input(*product.y.form->kernels, product.y.form->form, step.rows(rows_), width,
                            step.data<uint8_t>(product.y.buffer, thread));
      fetch_columns(prepared, range.row_begin, range.row_end, first, first + count);
    }
    tile_of(*product.matrix, product.bias, result);
    if (product.second) tile_of(*product.second, product.second_bias, second);
    const VectorKernels &kernels = *step.kernels;
    float *y = result;
    int64_t y_stride = stride, rows = range.row_end - range.row_begin, n = count;
    if (!product.y.form) {
      y = step.data(product.y.buffer, thread) + range.row_begin * width + first, y_stride = width;
    } else if (count == stride) {
      n = rows * stride, rows = 1;
    }
    for (int64_t r = 0; r < rows; r++) {
      if (product.second) {
        kernels.gated_activation(product.activation, result + r * stride, second + r * stride, y + r * y_stride, n);
      } else if (product.activated) {
        kernels.activation(product.activation, result + r * stride, y + r * y_stride, n);
      }
    }
    if (!product.y.form) return;
    prepare_columns(prepared, result - range.row_begin * stride - first, stride, range.row_begin, range.row_end, first,
                    first + count);
  }

  const std::vector<Product> products_;
  const int input_;
  const PreparedForm form_;
  const Rows rows_;
  const bool unless_argmax_;
  bool pairs_only_ = false;  // pairs of panels are whole blocks of a form
  int64_t panel_tiles_[most_panels + 1] = {};  // of all products, by panels of an item
  int64_t planned_rows_ = -1;  // the step's rows and threads for which the work is cut
  int planned_threads_ = 0;
  Cut cut_{0, 0, most_panels};
};

}  // namespace

std::unique_ptr<Task> make_products(std::vector<Product> products, int input, PreparedForm form, Rows rows,
                                    bool unless_argmax) {
  return std::make_unique<ProductTask>(std::move(products), input, form, rows, unless_argmax);
}

}  // namespace mnemos
