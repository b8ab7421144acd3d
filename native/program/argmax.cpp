// The largest logit of each row without all logits: a product with coarse activations shows, within bounds, what the
// product with fine ones would give, and only candidates are multiplied by those. The result is that of all
// fine logits.
//
// With fine activations x, coarse ones x' and the weights w of an output: |w x - w x'| <= |w| |x - x'|
// (Cauchy-Schwarz).
#include <algorithm>
#include <atomic>
#include <cmath>

#include "program/tasks.h"

namespace mnemos {
namespace {

constexpr int64_t most_rows = 264;  // per item: their coarse results stay in the second-level cache
constexpr int64_t most_panels = 8, outputs = most_panels * panel_rows;

// What a thread knows about a row: the largest fine logit that it has seen, and a lower bound on the row's largest
// logit.
struct Found {
  float value, floor;
  int32_t token;  // none, or the value's; not_a_number once some logit was not a number below infinity
  int32_t unused;
};
constexpr int32_t none = -1, not_a_number = -2;
constexpr int64_t found_floats = sizeof(Found) / sizeof(float);

Found *found_by(const Step &step, int buffer, int thread, int owner, Rows rows) {
  return step.data<Found>(buffer, thread) + owner * step.rows(rows);
}

Input bound(const Step &step, const Matrix &matrix, Form form, int buffer, Rows rows, int thread) {
  return bind_input(matrix.kernels, form, step.rows(rows), matrix.columns, step.data<uint8_t>(buffer, thread));
}

// For each row, a number that, times the length of an output's weights, bounds the change of its logit.
class MarginTask : public Task {
 public:
  MarginTask(const Argmax &argmax, int margins, int found) : argmax_(argmax), margins_(margins), found_(found) {
    reads = {argmax.fine, argmax.coarse};
    writes = {margins, found};
  }
  bool active(const Step &step) const override { return step.batch.argmax; }
  int64_t items(const Step &step) const override { return step.rows(argmax_.rows); }

  void run(const Step &step, int64_t row, int thread) const override {
    const Input fine = bound(step, *argmax_.matrix, Form::int15, argmax_.fine, argmax_.rows, thread);
    const Input coarse = bound(step, *argmax_.matrix, Form::int8, argmax_.coarse, argmax_.rows, thread);
    const int64_t blocks = fine.padded / 32;
    const auto *x = reinterpret_cast<const QuantBlock<2> *>(fine.blocks) + row * blocks;
    const auto *rough = reinterpret_cast<const QuantBlock<1> *>(coarse.blocks) + row * blocks;
    double squares = 0, error = 0;
    for (int64_t b = 0; b < blocks; b++) {
      const float scale = x[b].scale(), rough_scale = rough[b].scale();
      float block_squares = 0, block_error = 0;
      for (int i = 0; i < 32; i++) {
        const float value = scale * static_cast<float>(128 * x[b].parts[0][i] + x[b].parts[1][i]);
        const float lost = value - rough_scale * static_cast<float>(rough[b].parts[0][i]);
        block_squares += value * value, block_error += lost * lost;
      }
      squares += static_cast<double>(block_squares), error += static_cast<double>(block_error);
    }
    // Both products round a few times per block, each time by 2^-24 of at most |w| |x|.
    const double rounding = std::ldexp(static_cast<double>(blocks + 8), -21);
    step.data(margins_, thread)[row] = static_cast<float>((std::sqrt(error) + rounding * std::sqrt(squares)) * 1.001);
    for (int owner = 0; owner < step.threads; owner++) {
      found_by(step, found_, thread, owner, argmax_.rows)[row] = {-INFINITY, -INFINITY, none, 0};
    }
  }

 private:
  const Argmax argmax_;
  const int margins_, found_;
};

class ArgmaxTask : public Task {
 public:
  ArgmaxTask(const Argmax &argmax, int margins, int found)
      : argmax_(argmax), margins_(margins), found_(found), matrix_(*argmax.matrix),
        lengths_(std::make_unique<std::atomic<float>[]>(static_cast<size_t>(matrix_.panels() * panel_rows))) {
    reads = {argmax.fine, argmax.coarse, margins};
    writes = {found};
    for (int64_t i = 0; i < matrix_.panels() * panel_rows; i++)
      lengths_[static_cast<size_t>(i)].store(-1, std::memory_order_relaxed);
  }
  bool active(const Step &step) const override { return step.batch.argmax; }
  int64_t items(const Step &step) const override { return row_tiles(step) * groups(); }
  int64_t scratch_bytes(const BatchView &, int) const override {
    return (most_rows * outputs + panel_rows) * static_cast<int64_t>(sizeof(float));
  }

  void run(const Step &step, int64_t item, int thread) const override {
    const int64_t rows = step.rows(argmax_.rows), tiles = row_tiles(step), tile = item / groups();
    const int64_t begin = rows * tile / tiles, end = rows * (tile + 1) / tiles;
    const int64_t panel = item % groups() * most_panels, panel_end = std::min(panel + most_panels, matrix_.panels());
    const int64_t first = panel * panel_rows, count = std::min(panel_end * panel_rows, matrix_.rows) - first;
    float *rough = step.thread_scratch(thread), *fine = rough + most_rows * outputs;
    const Input coarse_input = bound(step, matrix_, Form::int8, argmax_.coarse, argmax_.rows, thread);
    const Input fine_input = bound(step, matrix_, Form::int15, argmax_.fine, argmax_.rows, thread);
    multiply(matrix_, coarse_input, begin, end, panel, panel_end, rough - begin * outputs - first, outputs, nullptr, 0);
    float lengths[outputs];
    find_lengths(panel, panel_end, lengths);
    const float longest = *std::max_element(lengths, lengths + count);
    const float *margins = step.data(margins_, thread);
    Found *found = found_by(step, found_, thread, thread, argmax_.rows);
    for (int64_t r = begin; r < end; r++) {
      const float *row = rough + (r - begin) * outputs, margin = margins[r];
      const float most = step.kernels->largest(row, count);
      if (most + longest * margin < found[r].floor) continue;  // unless something is not a number
      for (int64_t p = panel; p < panel_end; p++) {
        const int64_t offset = (p - panel) * panel_rows, filled = std::min(panel_rows, count - offset);
        if (!raise_floor(row + offset, lengths + offset, filled, margin, &found[r].floor)) continue;
        multiply(matrix_, fine_input, r, r + 1, p, p + 1, fine - r * panel_rows - p * panel_rows, panel_rows, nullptr,
                 0);
        take(fine, p * panel_rows, filled, &found[r]);
      }
    }
  }

 private:
  int64_t groups() const { return (matrix_.panels() + most_panels - 1) / most_panels; }
  int64_t row_tiles(const Step &step) const { return (step.rows(argmax_.rows) + most_rows - 1) / most_rows; }

  // The lengths of these panels' rows of weights; computed by the thread that needs them first, perhaps by several.
  void find_lengths(int64_t panel, int64_t panel_end, float *lengths) const {
    std::atomic<float> *known = &lengths_[static_cast<size_t>(panel * panel_rows)];
    const int64_t count = (panel_end - panel) * panel_rows;
    for (int64_t i = 0; i < count; i++) lengths[i] = known[i].load(std::memory_order_relaxed);
    if (std::none_of(lengths, lengths + count, [](float length) { return length < 0; })) return;
    weight_lengths(matrix_, panel, panel_end, lengths);
    for (int64_t i = 0; i < count; i++) known[i].store(lengths[i], std::memory_order_relaxed);
  }

  // Whether one of these outputs may be the row's largest.
  static bool raise_floor(const float *rough, const float *lengths, int64_t count, float margin, float *floor) {
    bool possible = false;
    for (int64_t i = 0; i < count; i++) {
      const float reach = lengths[i] * margin;
      possible |= !(rough[i] + reach < *floor);
      if (rough[i] - reach > *floor) *floor = rough[i] - reach;
    }
    return possible;
  }

  static void take(const float *fine, int64_t first, int64_t count, Found *found) {
    for (int64_t i = 0; i < count; i++) {
      const int32_t token = static_cast<int32_t>(first + i);
      if (!(fine[i] < INFINITY)) found->token = not_a_number;
      if (found->token == not_a_number) return;
      if (fine[i] > found->value || (fine[i] == found->value && token < found->token))
        found->value = fine[i], found->token = token;
    }
    found->floor = std::max(found->floor, found->value);
  }

  const Argmax argmax_;
  const int margins_, found_;
  const Matrix &matrix_;
  const std::unique_ptr<std::atomic<float>[]> lengths_;
};

// The best that any thread found; none if no logit is above minus infinity, or one is not a number below infinity.
class PickTask : public Task {
 public:
  PickTask(Rows rows, int found, int tokens) : rows_(rows), found_(found), tokens_(tokens) {
    reads = {found};
    writes = {tokens};
  }
  bool active(const Step &step) const override { return step.batch.argmax; }
  int64_t items(const Step &step) const override { return step.rows(rows_) > 0 ? 1 : 0; }

  void run(const Step &step, int64_t, int thread) const override {
    for (int64_t row = 0; row < step.rows(rows_); row++) {
      Found best{-INFINITY, 0, none, 0};
      for (int owner = 0; owner < step.threads; owner++) {
        const Found &other = found_by(step, found_, thread, owner, rows_)[row];
        if (best.token == not_a_number || other.token == none) continue;
        const bool before = other.value > best.value || (other.value == best.value && other.token < best.token);
        if (other.token == not_a_number || before) best = other;
      }
      step.data<int32_t>(tokens_, thread)[row] = std::max(best.token, none);
    }
  }

 private:
  const Rows rows_;
  const int found_, tokens_;
};

}  // namespace

int64_t argmax_state_floats(int threads) { return threads * found_floats; }

std::vector<std::unique_ptr<Task>> make_argmax(const Argmax &argmax, int margins, int found, int tokens) {
  std::vector<std::unique_ptr<Task>> tasks;
  tasks.push_back(std::make_unique<MarginTask>(argmax, margins, found));
  tasks.push_back(std::make_unique<ArgmaxTask>(argmax, margins, found));
  tasks.push_back(std::make_unique<PickTask>(argmax.rows, found, tokens));
  return tasks;
}

}  // namespace mnemos
