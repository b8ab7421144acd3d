#include <algorithm>
#include <cstring>

#include "program/tasks.h"

namespace mnemos {
namespace {

// Of an item: enough rows to pay for reading the factors, few enough that what is made of them stays in the cache.
constexpr int64_t most_rows = 66, panels_of_item = 8;

int64_t parts_of(int64_t count, int64_t size) { return (count + size - 1) / size; }

// Weights that read the same rows, whose adapters are therefore applied together.
class Group {
 public:
  struct Member {
    std::shared_ptr<const LowRank> weight;
    int y;  // buffer
    int64_t inner;  // where its part of a row of inner values begins
  };
  // Neighbouring rows with the same adapter.
  struct Run {
    int64_t begin, end;
    size_t adapter;
  };

  Group(const std::vector<Adapted> &adapted, Rows rows) : rows_(rows) {
    for (const Adapted &one : adapted) {
      members_.push_back({one.factors, one.y, width_});
      width_ += one.factors->pieces() * one.factors->largest_rank();
    }
  }

  const std::vector<Member> &members() const { return members_; }
  const std::vector<Run> &runs() const { return runs_; }
  // Floats of a row of inner values: of each member, the products with each piece of its columns.
  int64_t width() const { return width_; }

  void plan(const Step &step) {
    runs_.clear();
    const BatchView &batch = step.batch;
    if (batch.adapters == nullptr) return;
    if (rows_ == Rows::tokens) {
      for (int64_t s = 0; s < batch.sequences; s++)
        extend(batch.sequence_starts[s], batch.sequence_starts[s + 1], batch.adapters[s]);
      return;
    }
    const int32_t *starts = batch.sequence_starts;
    for (int64_t row = 0; row < batch.chosen; row++) {
      const int32_t *next = std::upper_bound(starts, starts + batch.sequences, batch.logit_rows[row]);
      extend(row, row + 1, batch.adapters[next - starts - 1]);
    }
  }

 private:
  void extend(int64_t begin, int64_t end, int32_t adapter) {
    if (adapter < 0 || begin == end) return;
    const auto own = static_cast<size_t>(adapter);
    const auto has_factors = [&](const Member &member) { return member.weight->pairs[own].rank > 0; };
    if (std::none_of(members_.begin(), members_.end(), has_factors)) return;
    while (begin < end) {
      const bool goes_on = !runs_.empty() && runs_.back().adapter == own && runs_.back().end == begin &&
                           begin - runs_.back().begin < most_rows;
      if (!goes_on) runs_.push_back({begin, begin, own});
      begin = runs_.back().end = std::min(end, runs_.back().begin + most_rows);
    }
  }

  const Rows rows_;
  std::vector<Member> members_;
  std::vector<Run> runs_;
  int64_t width_ = 0;
};

// inner = a x, of every piece of x's columns by itself.
class DownTask : public Task {
 public:
  DownTask(std::shared_ptr<Group> group, int x, int inner) : group_(std::move(group)), x_(x), inner_(inner) {
    for (const Group::Member &member : group_->members()) pieces_ += member.weight->pieces();
    reads = {x};
    writes = {inner};
  }
  void plan(const Step &step) override { group_->plan(step); }
  bool active(const Step &) const override { return !group_->runs().empty(); }
  int64_t items(const Step &) const override { return static_cast<int64_t>(group_->runs().size()) * pieces_; }
  void run(const Step &step, int64_t item, int thread) const override {
    const Group::Run &run = group_->runs()[static_cast<size_t>(item / pieces_)];
    int64_t piece = item % pieces_;
    const Group::Member *member = group_->members().data();
    for (; piece >= member->weight->pieces(); member++) piece -= member->weight->pieces();
    const LowRank &weight = *member->weight;
    const LowRank::Pair &pair = weight.pairs[run.adapter];
    if (pair.rank == 0) return;
    const Matrix &down = *pair.down[static_cast<size_t>(piece)];
    float *x = step.data(x_, thread) + piece * weight.piece_columns();
    Input input = bind_input(weight.kernels, Form::f32, run.end, down.columns, x);
    input.padded = weight.columns;
    float *inner = step.data(inner_, thread) + member->inner + piece * pair.rank;
    multiply(down, input, run.begin, run.end, 0, down.panels(), inner, group_->width(), nullptr, 0);
  }

 private:
  const std::shared_ptr<Group> group_;
  const int x_, inner_;
  int64_t pieces_ = 0;
};

// y += scale * b inner.
class UpTask : public Task {
 public:
  UpTask(std::shared_ptr<Group> group, int inner) : group_(std::move(group)), inner_(inner) {
    reads = {inner};
    for (const Group::Member &member : group_->members()) {
      items_ += items_of(member);
      largest_ = std::max(largest_, member.weight->largest_rank());
      reads.push_back(member.y);
      writes.push_back(member.y);
    }
  }
  bool active(const Step &) const override { return !group_->runs().empty(); }
  int64_t items(const Step &) const override { return static_cast<int64_t>(group_->runs().size()) * items_; }
  int64_t scratch_bytes(const BatchView &, int) const override {
    return most_rows * largest_ * static_cast<int64_t>(sizeof(float));
  }
  void run(const Step &step, int64_t item, int thread) const override {
    const Group::Run &run = group_->runs()[static_cast<size_t>(item / items_)];
    int64_t part = item % items_;
    const Group::Member *member = group_->members().data();
    for (; part >= items_of(*member); member++) part -= items_of(*member);
    const LowRank &weight = *member->weight;
    const LowRank::Pair &pair = weight.pairs[run.adapter];
    if (pair.rank == 0) return;
    float *sums = step.thread_scratch(thread);
    const int64_t rank = pair.rank, rows = run.end - run.begin;
    for (int64_t row = 0; row < rows; row++) {
      const float *inner = step.data(inner_, thread) + (run.begin + row) * group_->width() + member->inner;
      float *sum = sums + row * rank;
      memcpy(sum, inner, static_cast<size_t>(rank) * sizeof(float));
      for (int64_t piece = 1; piece < weight.pieces(); piece++) step.kernels->add(sum, inner + piece * rank, sum, rank);
      for (int64_t i = 0; i < rank; i++) sum[i] *= pair.scale;
    }
    Input input = bind_input(weight.kernels, Form::f32, rows, rank, sums);
    input.padded = rank;
    float *y = step.data(member->y, thread) + run.begin * weight.rows;
    const int64_t begin = part * panels_of_item, end = std::min(begin + panels_of_item, pair.up->panels());
    multiply(*pair.up, input, 0, rows, begin, end, y, weight.rows, y, weight.rows);
  }

 private:
  static int64_t items_of(const Group::Member &member) {
    return parts_of(parts_of(member.weight->rows, panel_rows), panels_of_item);
  }

  const std::shared_ptr<Group> group_;
  const int inner_;
  int64_t items_ = 0, largest_ = 0;
};

}  // namespace

int64_t inner_floats(const std::vector<Adapted> &adapted, Rows rows) { return Group(adapted, rows).width(); }

std::vector<std::unique_ptr<Task>> make_low_rank(const std::vector<Adapted> &adapted, int x, int inner, Rows rows) {
  const auto group = std::make_shared<Group>(adapted, rows);
  std::vector<std::unique_ptr<Task>> tasks;
  tasks.push_back(std::make_unique<DownTask>(group, x, inner));
  tasks.push_back(std::make_unique<UpTask>(group, inner));
  return tasks;
}

void pack_factors(const std::vector<std::shared_ptr<LowRank>> &weights) {
  std::vector<Matrix *> matrices;
  std::vector<LowRank::Pair *> pairs;
  const auto make = [&](const LowRank &weight, int64_t rows, int64_t columns) {
    auto matrix = std::make_unique<Matrix>(weight.type, rows, columns, false, weight.kernels);
    matrices.push_back(matrix.get());
    return matrix;
  };
  size_t adapters = 0;
  for (const auto &weight : weights) adapters = std::max(adapters, weight->pairs.size());
  // An adapter's factors are side by side, in the order of the weights: what is read ahead is what comes next.
  for (size_t adapter = 0; adapter < adapters; adapter++) {
    for (const auto &weight : weights) {
      if (adapter >= weight->pairs.size()) continue;
      LowRank::Pair &pair = weight->pairs[adapter];
      if (pair.rank == 0 || pair.up) continue;
      for (int64_t begin = 0; begin < weight->columns; begin += weight->piece_columns())
        pair.down.push_back(make(*weight, pair.rank, std::min(weight->piece_columns(), weight->columns - begin)));
      pair.up = make(*weight, weight->rows, pair.rank);
      pairs.push_back(&pair);
    }
  }
  if (matrices.empty()) return;
  place(matrices);
  std::vector<uint8_t> piece;
  for (LowRank::Pair *pair : pairs) {
    const uint8_t *from = pair->a.data();
    const int64_t row = static_cast<int64_t>(pair->a.size()) / pair->rank;
    for (const auto &down : pair->down) {
      const int64_t bytes = row_bytes(down->type, down->columns);
      piece.resize(static_cast<size_t>(pair->rank * bytes));
      for (int64_t r = 0; r < pair->rank; r++) std::copy_n(from + r * row, bytes, piece.data() + r * bytes);
      pack_panels(*down, piece.data(), 0, down->panels());
      from += bytes;
    }
    pack_panels(*pair->up, pair->b.data(), 0, pair->up->panels());
    pair->a = pair->b = {};
  }
}

}  // namespace mnemos
