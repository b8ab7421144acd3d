// Mixture of experts: rows are sorted by expert, so that each expert's weights are read once for all rows that chose
// it.
#include <algorithm>
#include <cstring>
#include <numeric>
#include <utility>

#include "program/tasks.h"

namespace mnemos {
namespace {

constexpr int64_t few_rows = 4;

int64_t tiles_of(int64_t count, int64_t size) { return (count + size - 1) / size; }

class RouteTask : public Task {
 public:
  RouteTask(int logits, int64_t experts, int64_t top_k, bool normalise, int ids, int weights, Rows rows)
      : logits_(logits), ids_(ids), weights_(weights), experts_(experts), top_k_(top_k), normalise_(normalise),
        rows_(rows) {
    reads = {logits};
    writes = {ids, weights};
  }
  int64_t items(const Step &step) const override { return tiles_of(step.rows(rows_), few_rows); }
  int64_t scratch_bytes(const BatchView &, int) const override { return experts_ * 4; }
  void run(const Step &step, int64_t item, int thread) const override {
    const int64_t end = std::min((item + 1) * few_rows, step.rows(rows_));
    for (int64_t t = item * few_rows; t < end; t++) choose(step, t, thread);
  }

 private:
  void choose(const Step &step, int64_t t, int thread) const {
    float *p = step.thread_scratch(thread);
    std::memcpy(p, step.data(logits_, thread) + t * experts_, static_cast<size_t>(experts_) * sizeof(float));
    step.kernels->softmax(p, experts_);
    int32_t *ids = step.data<int32_t>(ids_, thread) + t * top_k_;
    float *weights = step.data(weights_, thread) + t * top_k_;
    float sum = 0;
    for (int64_t k = 0; k < top_k_; k++) {
      const int64_t best = std::max_element(p, p + experts_) - p;  // the first one on ties
      ids[k] = static_cast<int32_t>(best);
      weights[k] = p[best];
      sum += p[best];
      p[best] = -1;
    }
    for (int64_t k = 0; normalise_ && k < top_k_; k++) weights[k] /= sum;
  }

  const int logits_, ids_, weights_;
  const int64_t experts_, top_k_;
  const bool normalise_;
  const Rows rows_;
};

class ExpertTask : public Task {
 public:
  ExpertTask(std::shared_ptr<const Experts> experts, Rows rows) : experts_(std::move(experts)), rows_(rows) {}

 protected:
  int64_t count() const { return static_cast<int64_t>(experts_->gate.size()); }
  int64_t pairs(const Step &step) const { return step.rows(rows_) * experts_->top_k; }
  const std::shared_ptr<const Experts> experts_;
  const Rows rows_;
};

class SortTask : public ExpertTask {
 public:
  SortTask(std::shared_ptr<const Experts> experts, int ids, int order, Rows rows)
      : ExpertTask(std::move(experts), rows), ids_(ids), order_(order) {
    reads = {ids};
    writes = {order};
  }
  int64_t items(const Step &) const override { return 1; }
  void run(const Step &step, int64_t, int thread) const override {
    const int32_t *ids = step.data<int32_t>(ids_, thread);
    int32_t *starts = step.data<int32_t>(order_, thread), *sorted = starts + count() + 1;
    std::fill(starts, sorted, 0);
    for (int64_t i = 0; i < pairs(step); i++) starts[ids[i] + 1]++;
    std::partial_sum(starts, sorted, starts);
    for (int64_t i = 0; i < pairs(step); i++) sorted[starts[ids[i]]++] = static_cast<int32_t>(i);
    for (int64_t e = count(); e > 0; e--) starts[e] = starts[e - 1];  // the loop above moved each start to its end
    starts[0] = 0;
  }

 private:
  const int ids_, order_;
};

class GatherTask : public ExpertTask {
 public:
  GatherTask(std::shared_ptr<const Experts> experts, int x, int order, int input, Rows rows)
      : ExpertTask(std::move(experts), rows), x_(x), order_(order), input_(input),
        form_(prepared_form(*experts_->gate[0])) {
    reads = {x, order};
    writes = {input};
  }
  int64_t items(const Step &step) const override { return tiles_of(pairs(step), few_rows); }
  void run(const Step &step, int64_t item, int thread) const override {
    const Input input =
        bind_input(*form_.kernels, form_.form, pairs(step), form_.columns, step.data<uint8_t>(input_, thread));
    const int32_t *sorted = step.data<int32_t>(order_, thread) + count() + 1;
    const int64_t end = std::min((item + 1) * few_rows, pairs(step));
    for (int64_t i = item * few_rows; i < end; i++) {
      prepare_rows(input, step.data(x_, thread) + sorted[i] / experts_->top_k * form_.columns, 0, i, i + 1);
    }
  }

 private:
  const int x_, order_, input_;
  const PreparedForm form_;
};

// Items are (expert, run of panels); an item does the rows of its expert in tiles. Gated ones are prepared for `down`.
class ExpertProductTask : public ExpertTask {
 public:
  ExpertProductTask(std::shared_ptr<const Experts> experts, bool down, int input, int order, int y, Rows rows)
      : ExpertTask(std::move(experts), rows), down_(down), input_(input), order_(order), y_(y) {
    reads = {input, order};
    writes = {y};
  }
  int64_t items(const Step &) const override { return count() * panel_tiles(); }
  int64_t scratch_bytes(const BatchView &, int) const override {
    return 2 * tile_rows * tile_panels * panel_rows * static_cast<int64_t>(sizeof(float));
  }
  void run(const Step &step, int64_t item, int thread) const override {
    const size_t expert = static_cast<size_t>(item / panel_tiles());
    const int32_t *starts = step.data<int32_t>(order_, thread);
    const Matrix &matrix = down_ ? *experts_->down[expert] : *experts_->gate[expert];
    const PreparedForm form = prepared_form(matrix);
    const Input input =
        bind_input(*form.kernels, form.form, pairs(step), form.columns, step.data<uint8_t>(input_, thread));
    const int64_t panel_begin = item % panel_tiles() * tile_panels;
    const int64_t panel_end = std::min(panel_begin + tile_panels, matrix.panels());
    for (int64_t row = starts[expert]; row < starts[expert + 1]; row += tile_rows) {
      const int64_t row_end = std::min<int64_t>(row + tile_rows, starts[expert + 1]);
      if (down_) {
        multiply(matrix, input, row, row_end, panel_begin, panel_end, step.data(y_, thread), matrix.rows, nullptr, 0);
      } else {
        gated(step, expert, input, row, row_end, panel_begin, panel_end, thread);
      }
    }
  }

 private:
  static constexpr int64_t tile_rows = 64, tile_panels = 4;

  int64_t panel_tiles() const { return tiles_of((down_ ? experts_->down : experts_->gate)[0]->panels(), tile_panels); }

  void gated(const Step &step, size_t expert, const Input &input, int64_t row, int64_t row_end, int64_t panel_begin,
             int64_t panel_end, int thread) const {
    const Matrix &gate = *experts_->gate[expert];
    const int64_t first = panel_begin * panel_rows, n = std::min(panel_end * panel_rows, gate.rows) - first;
    constexpr int64_t stride = tile_panels * panel_rows;
    float *result = step.thread_scratch(thread), *second = result + tile_rows * stride;
    multiply(gate, input, row, row_end, panel_begin, panel_end, result - row * stride - first, stride, nullptr, 0);
    multiply(*experts_->up[expert], input, row, row_end, panel_begin, panel_end, second - row * stride - first, stride,
             nullptr, 0);
    for (int64_t at = 0; at < (row_end - row) * stride; at += stride) {
      step.kernels->gated_activation(experts_->activation, result + at, second + at, result + at, n);
    }
    const PreparedForm form = prepared_form(*experts_->down[0]);
    const Input inner = bind_input(*form.kernels, form.form, pairs(step), form.columns, step.data<uint8_t>(y_, thread));
    prepare_columns(inner, result - row * stride - first, stride, row, row_end, first, first + n);
  }

  const bool down_;
  const int input_, order_, y_;
};

class CombineTask : public ExpertTask {
 public:
  CombineTask(std::shared_ptr<const Experts> experts, int outer, int order, int weights, int y, Rows rows)
      : ExpertTask(std::move(experts), rows), outer_(outer), order_(order), weights_(weights), y_(y) {
    reads = {outer, order, weights};
    writes = {y};
  }
  // Every item first inverts the places of its own rows.
  int64_t items(const Step &step) const override { return tiles_of(step.rows(rows_), rows_per_item); }
  int64_t scratch_bytes(const BatchView &, int) const override { return rows_per_item * experts_->top_k * 4; }
  void run(const Step &step, int64_t item, int thread) const override {
    const int64_t top_k = experts_->top_k, width = experts_->down[0]->rows;
    const int64_t begin = item * rows_per_item, end = std::min(begin + rows_per_item, step.rows(rows_));
    const int32_t *sorted = step.data<int32_t>(order_, thread) + count() + 1;
    int32_t *places = step.thread_scratch<int32_t>(thread);
    for (int64_t i = 0; i < pairs(step); i++) {
      if (sorted[i] >= begin * top_k && sorted[i] < end * top_k)
        places[sorted[i] - begin * top_k] = static_cast<int32_t>(i);
    }
    for (int64_t t = begin; t < end; t++) {
      float *y = step.data(y_, thread) + t * width;
      std::memset(y, 0, static_cast<size_t>(width) * sizeof(float));
      for (int64_t k = 0; k < top_k; k++) {
        step.kernels->accumulate(step.data(outer_, thread) + places[(t - begin) * top_k + k] * width,
                                 step.data(weights_, thread)[t * top_k + k], y, width);
      }
    }
  }

 private:
  static constexpr int64_t rows_per_item = 32;
  const int outer_, order_, weights_, y_;
};

}  // namespace

std::unique_ptr<Task> make_route(int logits, int64_t experts, int64_t top_k, bool normalise, int ids, int weights,
                                 Rows rows) {
  return std::make_unique<RouteTask>(logits, experts, top_k, normalise, ids, weights, rows);
}

std::unique_ptr<Task> make_sort_rows(std::shared_ptr<const Experts> experts, int ids, int order, Rows rows) {
  return std::make_unique<SortTask>(std::move(experts), ids, order, rows);
}

std::unique_ptr<Task> make_gather(std::shared_ptr<const Experts> experts, int x, int order, int input, Rows rows) {
  return std::make_unique<GatherTask>(std::move(experts), x, order, input, rows);
}

std::unique_ptr<Task> make_gated_experts(std::shared_ptr<const Experts> experts, int input, int order, int inner,
                                         Rows rows) {
  return std::make_unique<ExpertProductTask>(std::move(experts), false, input, order, inner, rows);
}

std::unique_ptr<Task> make_down_experts(std::shared_ptr<const Experts> experts, int input, int order, int outer,
                                        Rows rows) {
  return std::make_unique<ExpertProductTask>(std::move(experts), true, input, order, outer, rows);
}

std::unique_ptr<Task> make_combine(std::shared_ptr<const Experts> experts, int outer, int order, int weights, int y,
                                   Rows rows) {
  return std::make_unique<CombineTask>(std::move(experts), outer, order, weights, y, rows);
}

}  // namespace mnemos
