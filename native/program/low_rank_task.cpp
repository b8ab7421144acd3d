#include <algorithm>

#include "program/tasks.h"

namespace mnemos {
namespace {

// Each row by itself, in the same order of additions, whichever rows and adapters are beside it.
class LowRankTask : public Task {
 public:
  LowRankTask(std::shared_ptr<const LowRank> factors, int x, int y, Rows rows)
      : factors_(std::move(factors)), x_(x), y_(y), rows_(rows) {
    for (const LowRank::Pair &pair : factors_->pairs) largest_ = std::max(largest_, pair.rank);
    reads = {x, y};
    writes = {y};
  }
  int64_t items(const Step &step) const override { return step.rows(rows_); }
  int64_t scratch_bytes(const BatchView &, int) const override {
    return largest_ * static_cast<int64_t>(sizeof(float));
  }
  bool active(const Step &step) const override {
    const BatchView &batch = step.batch;
    return batch.adapters && std::any_of(batch.adapters, batch.adapters + batch.sequences, [&](int32_t adapter) {
             return adapter >= 0 && factors_->pairs[static_cast<size_t>(adapter)].rank > 0;
           });
  }
  void run(const Step &step, int64_t row, int thread) const override {
    const BatchView &batch = step.batch;
    const int64_t token = rows_ == Rows::tokens ? row : batch.logit_rows[row];
    const int32_t *starts = batch.sequence_starts;
    const int64_t sequence = std::upper_bound(starts, starts + batch.sequences, token) - starts - 1;
    const int32_t adapter = batch.adapters[sequence];
    if (adapter < 0) return;
    const LowRank::Pair &pair = factors_->pairs[static_cast<size_t>(adapter)];
    const float *x = step.data(x_, thread) + row * factors_->columns;
    float *y = step.data(y_, thread) + row * factors_->rows;
    float *inner = step.thread_scratch(thread);
    for (int64_t r = 0; r < pair.rank; r++)
      inner[r] = step.kernels->dot(pair.a.data() + r * factors_->columns, x, factors_->columns);
    for (int64_t r = 0; r < pair.rank; r++)
      step.kernels->accumulate(pair.b.data() + r * factors_->rows, inner[r], y, factors_->rows);
  }

 private:
  const std::shared_ptr<const LowRank> factors_;
  const int x_, y_;
  const Rows rows_;
  int64_t largest_ = 0;
};

}  // namespace

std::unique_ptr<Task> make_low_rank(std::shared_ptr<const LowRank> factors, int x, int y, Rows rows) {
  return std::make_unique<LowRankTask>(std::move(factors), x, y, rows);
}

}  // namespace mnemos
