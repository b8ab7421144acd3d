#include "program/tasks.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

namespace mnemos {
namespace {

// A task whose items are small runs of rows.
class RowTask : public Task {
 public:
  RowTask(Rows rows, int64_t rows_per_item) : rows_(rows), rows_per_item_(rows_per_item) { cheap_for_one_row = true; }
  int64_t items(const Step &step) const override { return (step.rows(rows_) + rows_per_item_ - 1) / rows_per_item_; }
  void run(const Step &step, int64_t item, int thread) const override {
    const int64_t begin = item * rows_per_item_;
    run_rows(step, begin, std::min(begin + rows_per_item_, step.rows(rows_)), thread);
  }
  virtual void run_rows(const Step &step, int64_t begin, int64_t end, int thread) const = 0;

 protected:
  const Rows rows_;
  const int64_t rows_per_item_;
};

constexpr int64_t few_rows = 4;

class EmbedTask : public RowTask {
 public:
  EmbedTask(MatrixPointer matrix, Index index, int y)
      : RowTask(Rows::tokens, few_rows), matrix_(std::move(matrix)), index_(index), y_(y) {
    writes = {y};
  }
  void run_rows(const Step &step, int64_t begin, int64_t end, int thread) const override {
    float *y = step.data(y_, thread);
    const int32_t *index = index_ == Index::token_ids ? step.batch.token_ids : step.batch.positions;
    for (int64_t t = begin; t < end; t++) dequantize_row(*matrix_, index[t], y + t * matrix_->columns);
  }

 private:
  const MatrixPointer matrix_;
  const Index index_;
  const int y_;
};

class ChooseRowsTask : public RowTask {
 public:
  ChooseRowsTask(int x, int64_t width, int y) : RowTask(Rows::chosen, 16), x_(x), y_(y), width_(width) {
    reads = {x};
    writes = {y};
  }
  void run_rows(const Step &step, int64_t begin, int64_t end, int thread) const override {
    const float *x = step.data(x_, thread);
    float *y = step.data(y_, thread);
    for (int64_t r = begin; r < end; r++) {
      std::memcpy(y + r * width_, x + step.batch.logit_rows[r] * width_, static_cast<size_t>(width_) * sizeof(float));
    }
  }

 private:
  const int x_, y_;
  const int64_t width_;
};

class RopeTask : public RowTask {
 public:
  RopeTask(int x, int y, int64_t width, int64_t head_dim, std::shared_ptr<const RopeTable> table, Rows rows)
      : RowTask(rows, few_rows), x_(x), y_(y), width_(width), head_dim_(head_dim), table_(std::move(table)) {
    reads = {x};
    writes = {y};
  }
  void run_rows(const Step &step, int64_t begin, int64_t end, int thread) const override {
    const float *x = step.data(x_, thread);
    float *y = step.data(y_, thread);
    std::memcpy(y + begin * width_, x + begin * width_, static_cast<size_t>((end - begin) * width_) * sizeof(float));
    for (int64_t t = begin; t < end; t++) {
      const int64_t position = step.batch.positions[t];
      for (int64_t i = t * width_; i < (t + 1) * width_; i += head_dim_) {
        step.kernels->rope(x + i, table_->cosines(position), table_->sines(position), 1.0f, y + i, table_->half());
      }
    }
  }

 private:
  const int x_, y_;
  const int64_t width_, head_dim_;
  const std::shared_ptr<const RopeTable> table_;
};

class ElementwiseTask : public RowTask {
 public:
  ElementwiseTask(Elementwise operation, int x, int second, int y, int64_t width, Rows rows)
      : RowTask(rows, std::max<int64_t>(1, 8192 / width)), operation_(operation), x_(x), second_(second), y_(y),
        width_(width) {
    reads = {x};
    if (second >= 0) reads.push_back(second);
    writes = {y};
  }
  void run_rows(const Step &step, int64_t begin, int64_t end, int thread) const override {
    const float *x = step.data(x_, thread) + begin * width_;
    const float *second = second_ < 0 ? nullptr : step.data(second_, thread) + begin * width_;
    float *y = step.data(y_, thread) + begin * width_;
    const int64_t n = (end - begin) * width_;
    const VectorKernels &kernels = *step.kernels;
    switch (operation_.kind) {
      case ElementwiseKind::add: return kernels.add(x, second, y, n);
      case ElementwiseKind::scale: return kernels.scale(x, operation_.number, y, n);
      case ElementwiseKind::softcap: return kernels.softcap(x, operation_.number, y, n);
      case ElementwiseKind::activation: return kernels.activation(operation_.activation, x, y, n);
      case ElementwiseKind::gated_activation: return kernels.gated_activation(operation_.activation, x, second, y, n);
    }
  }

 private:
  const Elementwise operation_;
  const int x_, second_, y_;
  const int64_t width_;
};

void apply_norm(const VectorKernels &kernels, const Norm &norm, const float *x, float *y, int64_t width) {
  const int64_t n = static_cast<int64_t>(norm.weight->size());
  const float *bias = norm.bias ? norm.bias->data() : nullptr;
  if (norm.kind == Norm::rms) return kernels.rms_norm(x, norm.weight->data(), norm.epsilon, y, width / n, n);
  kernels.layer_norm(x, norm.weight->data(), bias, norm.epsilon, y, n);
}

class NormTask : public RowTask {
 public:
  NormTask(Norm norm, int x, int y, int64_t width, Rows rows)
      : RowTask(rows, few_rows), norm_(std::move(norm)), x_(x), y_(y), width_(width) {
    reads = {x};
    writes = {y};
  }
  void run_rows(const Step &step, int64_t begin, int64_t end, int thread) const override {
    const float *x = step.data(x_, thread);
    float *y = step.data(y_, thread);
    for (int64_t t = begin; t < end; t++) apply_norm(*step.kernels, norm_, x + t * width_, y + t * width_, width_);
  }

 private:
  const Norm norm_;
  const int x_, y_;
  const int64_t width_;
};

class PrepareTask : public RowTask {
 public:
  PrepareTask(Norm norm, int x, int64_t width, std::vector<Target> targets, Rows rows)
      : RowTask(rows, few_rows), norm_(std::move(norm)), x_(x), width_(width), targets_(std::move(targets)) {
    reads = {x};
    for (const Target &target : targets_) writes.push_back(target.buffer);
  }
  int64_t scratch_bytes(const BatchView &, int) const override {
    return norm_.kind == Norm::none ? 0 : rows_per_item_ * width_ * static_cast<int64_t>(sizeof(float));
  }
  void run_rows(const Step &step, int64_t begin, int64_t end, int thread) const override {
    const float *x = step.data(x_, thread);
    if (norm_.kind != Norm::none) {
      float *normed = step.thread_scratch(thread);
      for (int64_t t = begin; t < end; t++) {
        apply_norm(*step.kernels, norm_, x + t * width_, normed + (t - begin) * width_, width_);
      }
      x = normed - begin * width_;
    }
    for (const Target &target : targets_) {
      const PreparedForm &form = *target.form;
      prepare_rows(
          bind_input(*form.kernels, form.form, step.rows(rows_), width_, step.data<uint8_t>(target.buffer, thread)), x,
          width_, begin, end);
    }
  }

 private:
  const Norm norm_;
  const int x_;
  const int64_t width_;
  const std::vector<Target> targets_;
};

}  // namespace

std::unique_ptr<Task> make_embed(MatrixPointer matrix, Index index, int y) {
  return std::make_unique<EmbedTask>(std::move(matrix), index, y);
}

std::unique_ptr<Task> make_choose_rows(int x, int64_t width, int y) {
  return std::make_unique<ChooseRowsTask>(x, width, y);
}

std::unique_ptr<Task> make_rope(int x, int y, int64_t width, int64_t head_dim, std::shared_ptr<const RopeTable> table,
                                Rows rows) {
  return std::make_unique<RopeTask>(x, y, width, head_dim, std::move(table), rows);
}

std::unique_ptr<Task> make_elementwise(Elementwise operation, int x, int second, int y, int64_t width, Rows rows) {
  return std::make_unique<ElementwiseTask>(operation, x, second, y, width, rows);
}

std::unique_ptr<Task> make_norm(Norm norm, int x, int y, int64_t width, Rows rows) {
  return std::make_unique<NormTask>(std::move(norm), x, y, width, rows);
}

std::unique_ptr<Task> make_prepare(Norm norm, int x, int64_t width, std::vector<Target> targets, Rows rows) {
  return std::make_unique<PrepareTask>(std::move(norm), x, width, std::move(targets), rows);
}

RopeTable::RopeTable(std::vector<float> frequencies, float magnitude)
    : frequencies_(std::move(frequencies)), magnitude_(magnitude) {}

void RopeTable::prepare(const int32_t *positions, int64_t count) {
  for (int64_t t = 0; t < count; t++) {
    const auto number = static_cast<size_t>(positions[t] / block);
    if (number >= blocks_.size()) blocks_.resize(number + 1);
    if (blocks_[number]) continue;
    if (made_ >= most_blocks) drop_unused(positions, count);
    blocks_[number] = std::make_unique<float[]>(static_cast<size_t>(block * 2 * half()));
    made_++;
    for (int64_t slot = 0; slot < block; slot++)
      fill(static_cast<int64_t>(number) * block + slot, blocks_[number].get() + slot * 2 * half());
  }
}

void RopeTable::prepare_multiples(int64_t step, int64_t last) {
  const int64_t made = static_cast<int64_t>(multiples_.size()) / (2 * half()), count = last / step + 1;
  if (count <= made) return;
  multiples_.resize(static_cast<size_t>(count * 2 * half()));
  for (int64_t number = made; number < count; number++) fill(number * step, multiples_.data() + number * 2 * half());
}

void RopeTable::fill(int64_t position, float *row) const {
  for (int64_t i = 0; i < half(); i++) {
    const double angle = static_cast<double>(static_cast<float>(position) * frequencies_[static_cast<size_t>(i)]);
    row[i] = static_cast<float>(std::cos(angle) * static_cast<double>(magnitude_));
    row[half() + i] = static_cast<float>(std::sin(angle) * static_cast<double>(magnitude_));
  }
}

void RopeTable::drop_unused(const int32_t *positions, int64_t count) {
  std::vector<char> used(blocks_.size());
  for (int64_t t = 0; t < count; t++) {
    const auto number = static_cast<size_t>(positions[t] / block);
    if (number < used.size()) used[number] = 1;
  }
  for (size_t i = 0; i < blocks_.size(); i++) {
    if (used[i] || !blocks_[i]) continue;
    blocks_[i].reset();
    made_--;
  }
}

}  // namespace mnemos
