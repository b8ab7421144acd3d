#include "program/program.h"

#include <algorithm>
#include <cstring>

#include "system/error.h"

namespace mnemos {
namespace {

// Prefetches what a task reads first, some 32 KB; its own prefetches begin only with its first item.
void fetch_first(Ahead &ahead) {
  for (int i = 0; i < 128; i++) ahead.refill(), ahead.advance();
}

bool overlaps(const std::vector<int> &a, const std::vector<int> &b) {
  return std::any_of(a.begin(), a.end(), [&](int x) { return std::find(b.begin(), b.end(), x) != b.end(); });
}

}  // namespace

void Program::finish(std::vector<int> outputs) {
  if (finished_) throw config_error("the program is already finished");
  for (int value : outputs) checked_value(value);
  graph_.outputs = std::move(outputs);
  std::vector<std::shared_ptr<LowRank>> adapted;
  for (const Operator &op : graph_.operators) {
    if (op.kind == OperatorKind::low_rank) adapted.push_back(op.low_rank);
  }
  pack_factors(adapted);
  schedule_ = make_schedule(graph_, pool_->threads());
  assign_slots();
  place_barriers();
  const size_t count = schedule_.tasks.size();
  fetching_from_.assign(count + 1, count);
  for (size_t t = count; t-- > 0;) fetching_from_[t] = schedule_.tasks[t]->fetches_ahead() ? t : fetching_from_[t + 1];
  for (int thread = 0; thread < pool_->threads(); thread++) ahead_.push_back(make_attention_ahead());
  fetching_now_.resize(static_cast<size_t>(pool_->threads()));
  counters_ = std::make_unique<Counter[]>(schedule_.tasks.size() * static_cast<size_t>(pool_->threads()));
  pieces_.resize(schedule_.buffers.size());
  finished_ = true;
}

// A task waits for the others only if it touches what a task since the last barrier wrote, or writes what one read.
void Program::place_barriers() {
  for (const bool one_row : {false, true}) {
    auto &barriers = barrier_before_[one_row ? 1 : 0];
    barriers.assign(schedule_.tasks.size(), 0);
    std::vector<int> read, written;  // slots, since the last barrier
    for (size_t t = 0; t < schedule_.tasks.size(); t++) {
      const Task &task = *schedule_.tasks[t];
      std::vector<int> reads, writes;
      const auto collect = [&](const std::vector<int> &buffers, std::vector<int> &into) {
        for (int b : buffers) {
          const int slot = slot_of_[static_cast<size_t>(b)];
          if (!(one_row && slots_[static_cast<size_t>(slot)].copies)) into.push_back(slot);
        }
      };
      collect(task.reads, reads);
      collect(task.writes, writes);
      if (overlaps(reads, written) || overlaps(writes, written) || overlaps(writes, read)) {
        barriers[t] = 1;
        read.clear();
        written.clear();
      }
      read.insert(read.end(), reads.begin(), reads.end());
      written.insert(written.end(), writes.begin(), writes.end());
    }
  }
}

int64_t Program::barriers() const { return std::count(barrier_before_[1].begin(), barrier_before_[1].end(), 1); }

std::vector<OutputView> Program::run(const BatchView &batch, const std::vector<InputView> &inputs) {
  if (!finished_) throw config_error("the program is still being recorded");
  if (batch.argmax && !finds_argmax()) throw config_error("the program cannot find the best of its last output alone");
  check_batch(batch);
  check_inputs(batch, inputs);
  std::lock_guard<std::mutex> lock(mutex_);
  const int threads = batch.threads > 0 ? std::min(batch.threads, pool_->threads()) : pool_->threads();
  std::vector<TileSet> tiles;
  const int64_t groups = schedule_.attentions.empty() ? 0 : static_cast<int64_t>(caches_.size());
  for (int64_t g = 0; g < groups; g++)
    resolve_tables(batch, groups, g, caches_[static_cast<size_t>(g)]->cell().slots, tables_[static_cast<size_t>(g)]);
  for (const Attention &attention : schedule_.attentions) {
    tiles.push_back(make_tiles(batch, tables_[static_cast<size_t>(attention.group)], attention, threads));
  }
  for (size_t g = 0; g < static_cast<size_t>(groups); g++) bring_pages(batch, g);
  for (const auto &table : rope_tables_) table->prepare(batch.positions, batch.tokens);
  prepare_far_pages(batch);

  // Where every thread does the small tasks of one row for itself, none can join later.
  const bool one_row = batch.tokens == 1 && batch.chosen <= 1 && !pool_->contended();
  const size_t needed = static_cast<size_t>(layout(batch, tiles, one_row));
  if (!workspace_ || workspace_->bytes < needed) {
    workspace_.reset();
    workspace_ = std::make_shared<Workspace>(needed + needed / 8);
  }
  if (poison_) std::memset(workspace_->data, 0xff, workspace_->bytes);
  for (size_t b = 0; b < pieces_.size(); b++) {
    const Slot &slot = slots_[static_cast<size_t>(slot_of_[b])];
    pieces_[b] = {workspace_->data + slot.offset, one_row && slot.copies ? slot.bytes : 0};
  }
  for (size_t i = 0; i < inputs.size(); i++) {
    std::memcpy(pieces_[static_cast<size_t>(schedule_.input_buffers[i])].data, inputs[i].data,
                static_cast<size_t>(inputs[i].rows * inputs[i].width) * 4);
  }
  const Step step{batch,
                  threads,
                  kernels_,
                  pieces_.data(),
                  tables_.data(),
                  tiles.data(),
                  workspace_->data + scratch_offset_,
                  scratch_bytes_,
                  ahead_.data()};
  execute(step, one_row);
  for (size_t g = 0; g < static_cast<size_t>(groups); g++) put_away_pages(batch, g);
  std::vector<OutputView> outputs;
  for (size_t i = 0; i < graph_.outputs.size(); i++) {
    const Value &value = graph_.values[static_cast<size_t>(graph_.outputs[i])];
    outputs.push_back({pieces_[static_cast<size_t>(schedule_.output_buffers[i])].data, step.rows(value.rows),
                       value.width, value.type, workspace_});
  }
  if (batch.argmax) {
    const uint8_t *best = pieces_[static_cast<size_t>(schedule_.argmax_buffer)].data;
    outputs.back() = {best, outputs.back().rows, 1, ValueType::int32, workspace_};
  }
  return outputs;
}

// Rows are rotated to the positions at which they see pages that are too far back.
void Program::prepare_far_pages(const BatchView &batch) {
  const int64_t last = batch.tokens == 0 ? 0 : *std::max_element(batch.positions, batch.positions + batch.tokens);
  for (const auto &cache : caches_) {
    if (cache->recall() == nullptr || cache->recall()->farthest == 0) continue;
    const int64_t slots = cache->cell().slots;
    if (last / slots <= cache->recall()->farthest) continue;
    for (const auto &table : rope_tables_) table->prepare_multiples(slots, last);
  }
}

// What rows see without recalling it must be in memory: sinks, and windows of heads that do not recall.
void Program::bring_pages(const BatchView &batch, size_t group) {
  Cache &cache = *caches_[group];
  if (cache.spill() == nullptr) return;
  const int64_t slots = cache.cell().slots, step = ++cache.spill()->step;
  for (int64_t s = 0; s < batch.sequences; s++) {
    const Sight sight = sight_of(batch, cache, s);
    const int64_t begin = batch.sequence_starts[s], end = batch.sequence_starts[s + 1];
    if (begin == end) continue;
    const int32_t *pages = batch.pages + tables_[group].new_pages[static_cast<size_t>(s)];
    const int64_t last = batch.positions[end - 1] / slots;
    const int64_t first = batch.positions[begin] / slots - sight.window - sight.recalled + 1;
    const auto see = [&](int64_t n) {
      cache.bring(pages[n]);
      cache.spill()->seen[static_cast<size_t>(pages[n])] = step;
    };
    for (int64_t n = 0; n < std::min(sight.sinks, first); n++) see(n);
    for (int64_t n = std::max<int64_t>(first, 0); n <= last; n++) see(n);
  }
  cache.spill()->check();
}

// Moves pages to the file that a text's next row will not see unless it recalls them. Those that another text saw in
// this step or the one before stay.
void Program::put_away_pages(const BatchView &batch, size_t group) {
  Cache &cache = *caches_[group];
  Spill *spill = cache.spill();
  if (spill == nullptr) return;
  spill->check();
  for (int64_t s = 0; s < batch.sequences; s++) {
    const Sight sight = sight_of(batch, cache, s);
    const int64_t begin = batch.sequence_starts[s], end = batch.sequence_starts[s + 1];
    if (begin == end) continue;
    const int32_t *pages = batch.pages + tables_[group].new_pages[static_cast<size_t>(s)];
    const int64_t left = (batch.positions[end - 1] + 1) / cache.cell().slots - sight.window - sight.recalled;
    for (int64_t n = sight.sinks; n <= left; n++) {
      const int64_t page = pages[n];
      if (!spill->holds(page) && spill->seen[static_cast<size_t>(page)] < spill->step - 1) cache.put_away(page);
    }
  }
}

void Program::execute(const Step &step, bool one_row) {
  const size_t count = schedule_.tasks.size();
  const int threads = step.threads;
  const auto counters_of = [&](size_t task) { return &counters_[task * static_cast<size_t>(threads)]; };
  for (size_t c = 0; c < count * static_cast<size_t>(threads); c++)
    counters_[c].taken.store(0, std::memory_order_relaxed);
  for (const auto &task : schedule_.tasks) task->plan(step);
  plan_phases(step, one_row);
  for (size_t thread = 0; thread < static_cast<size_t>(threads); thread++) {
    ahead_[thread]->stop();
    fetching_now_[thread].task = count;
  }
  const auto team = one_row ? Pool::Team::fixed : Pool::Team::open;
  pool_->share(threads, static_cast<int>(phases_.size()) - 1, team, [&](int thread, int phase) {
    const size_t begin = phases_[static_cast<size_t>(phase)], end = phases_[static_cast<size_t>(phase) + 1];
    for (size_t i = begin; i < end; i++) {
      const size_t t = active_[i];
      const Task &task = *schedule_.tasks[t];
      if (i > begin || phase == 0) approach(step, t, thread);
      const int64_t items = task.items(step);
      if (one_row && task.cheap_for_one_row) {
        for (int64_t item = 0; item < items; item++) task.run(step, item, thread);
        continue;
      }
      // Every thread has a run of neighbouring items, whose weights it fetches ahead; one that is done early helps the
      // others.
      Counter *counters = counters_of(t);
      for (int helped = 0; helped < threads; helped++) {
        const int owner = (thread + helped) % threads;
        const int64_t first = items * owner / threads, own = items * (owner + 1) / threads - first;
        std::atomic<int64_t> &taken = counters[owner].taken;
        while (taken.load(std::memory_order_relaxed) < own) {
          const int64_t item = taken.fetch_add(1, std::memory_order_relaxed);
          if (item < own) task.run(step, first + item, thread);
        }
      }
    }
    if (end < active_.size()) approach(step, active_[end], thread);
  });
}

// A phase is the tasks from one barrier to the next. One that this batch does not need leaves its barrier to the next.
void Program::plan_phases(const Step &step, bool one_row) {
  const auto &barriers = barrier_before_[one_row ? 1 : 0];
  phases_.clear(), active_.clear();
  bool wait = true;
  for (size_t t = 0; t < schedule_.tasks.size(); t++) {
    wait = wait || barriers[t];
    if (!schedule_.tasks[t]->active(step)) continue;
    if (wait) phases_.push_back(active_.size());
    active_.push_back(t);
    wait = false;
  }
  phases_.push_back(active_.size());
}

// Before a task, and before a thread waits to begin it: says what the products until the next task that fetches ahead
// may fetch for it. Products of few rows have fetched nothing, and while threads wait, memory has nothing to do.
void Program::approach(const Step &step, size_t task, int thread) {
  size_t &fetching = fetching_now_[static_cast<size_t>(thread)].task;
  const size_t next = fetching_from_[task];
  Ahead &ahead = *ahead_[static_cast<size_t>(thread)];
  if (next == schedule_.tasks.size()) return ahead.stop();
  if (fetching != next) fetching = next, schedule_.tasks[next]->fetch_ahead(step, thread);
  if (next == task) fetch_first(ahead);
}

}  // namespace mnemos
