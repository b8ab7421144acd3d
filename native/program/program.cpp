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

std::string number(int64_t value) { return std::to_string(value); }

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

void Program::check_inputs(const BatchView &batch, const std::vector<InputView> &inputs) const {
  size_t index = 0;
  for (const Operator &op : graph_.operators) {
    if (op.kind != OperatorKind::input) continue;
    const Value &value = graph_.values[static_cast<size_t>(op.outputs[0])];
    if (index >= inputs.size()) throw config_error("the program has more inputs than were given");
    const InputView &input = inputs[index++];
    if (input.rows != batch.tokens || input.width != value.width || input.type != value.type) {
      throw config_error("an input has shape (" + number(input.rows) + ", " + number(input.width) + "); it must be (" +
                         number(batch.tokens) + ", " + number(value.width) + ") of the recorded type");
    }
  }
  if (index != inputs.size()) throw config_error("the program has fewer inputs than were given");
  for (const Operator &op : graph_.operators) {
    if (op.kind != OperatorKind::experts && op.kind != OperatorKind::memory) continue;
    if (op.inputs.size() < 3) continue;
    const bool memory = op.kind == OperatorKind::memory;
    const int64_t count =
        memory ? op.memory->chapters - op.memory->shared : static_cast<int64_t>(op.experts->gate.size());
    size_t at = 0;
    for (const Operator &source : graph_.operators) {
      if (source.kind != OperatorKind::input) {
        const bool routed = source.kind == OperatorKind::route && source.outputs[0] == op.inputs[1];
        if (routed && source.matrix->rows > count) throw config_error("the router knows more experts than there are");
        const bool chosen = source.kind == OperatorKind::choose && source.outputs[0] == op.inputs[1];
        if (chosen && graph_.values[static_cast<size_t>(source.inputs[0])].width > count)
          throw config_error("the router knows more chapters than there are");
        continue;
      }
      const InputView &input = inputs[at++];
      if (source.outputs[0] != op.inputs[1]) continue;
      const int32_t *ids = static_cast<const int32_t *>(input.data);
      for (int64_t i = 0; i < input.rows * input.width; i++) {
        if (ids[i] < 0 || ids[i] >= count)
          throw request_error((memory ? "chapter " : "expert ") + number(ids[i]) + " is not one of " + number(count));
      }
    }
  }
}

void Program::check_batch(const BatchView &batch) const {
  for (const Operator &op : graph_.operators) {
    if (op.kind != OperatorKind::embed) continue;
    const bool by_token = op.index == Index::token_ids;
    const int32_t *index = by_token ? batch.token_ids : batch.positions;
    for (int64_t t = 0; t < batch.tokens; t++) {
      if (index[t] < 0 || index[t] >= op.matrix->rows) {
        throw request_error(std::string(by_token ? "token id " : "position ") + number(index[t]) +
                            " is out of range: there are " + number(op.matrix->rows));
      }
    }
  }
  for (int64_t t = 0; t < batch.tokens; t++) {
    if (batch.positions[t] < 0) throw request_error("position " + number(batch.positions[t]) + " is negative");
  }
  for (int64_t r = 0; r < batch.chosen; r++) {
    if (batch.logit_rows[r] < 0 || batch.logit_rows[r] >= batch.tokens) {
      throw request_error("row " + number(batch.logit_rows[r]) + " is not one of the batch's " + number(batch.tokens));
    }
  }
  const auto monotonic = [&](const int32_t *starts, int64_t count, int64_t end, const char *name) {
    bool good = starts[0] == 0 && starts[count] == end;
    for (int64_t i = 0; i < count; i++) good = good && starts[i] <= starts[i + 1];
    if (!good) throw request_error(std::string(name) + " must rise from 0 to " + number(end));
  };
  if (batch.adapters) {
    if (batch.adapter_count != batch.sequences)
      throw request_error("the batch has " + number(batch.adapter_count) + " adapters; it needs one for each of its " +
                          number(batch.sequences) + " sequences, or none");
    monotonic(batch.sequence_starts, batch.sequences, batch.tokens, "sequence_starts");
    for (const Operator &op : graph_.operators) {
      if (op.kind != OperatorKind::low_rank) continue;
      const int64_t known = static_cast<int64_t>(op.low_rank->pairs.size());
      for (int64_t s = 0; s < batch.sequences; s++) {
        if (batch.adapters[s] < -1 || batch.adapters[s] >= known)
          throw request_error("adapter " + number(batch.adapters[s]) + " is not one of " + number(known));
      }
    }
  }
  bool pools = false;
  for (const Operator &op : graph_.operators) {
    if (op.kind != OperatorKind::pool) continue;
    pools = true;
    if (!op.pooling.windows) continue;
    if (batch.state_slots != batch.sequences)
      throw request_error("the batch has " + number(batch.state_slots) + " states; it needs one for each of its " +
                          number(batch.sequences) + " sequences");
    for (int64_t s = 0; s < batch.sequences; s++) {
      if (batch.states[s] < 0 || batch.states[s] >= op.pooling.windows->slots())
        throw request_error("state slot " + number(batch.states[s]) + " is not one of " +
                            number(op.pooling.windows->slots()));
    }
  }
  if (schedule_.attentions.empty() && !pools) return;
  if (pools) monotonic(batch.sequence_starts, batch.sequences, batch.tokens, "sequence_starts");
  if (schedule_.attentions.empty()) return;
  const int64_t tables = batch.sequences * static_cast<int64_t>(caches_.size());
  if (batch.tables != tables) {
    throw request_error("page_starts has " + number(batch.tables) + " page tables; " + number(batch.sequences) +
                        " sequences of a model with " + number(static_cast<int64_t>(caches_.size())) +
                        " layer groups have " + number(tables));
  }
  monotonic(batch.sequence_starts, batch.sequences, batch.tokens, "sequence_starts");
  monotonic(batch.page_starts, tables, batch.table_pages, "page_starts");
  if (batch.sights != nullptr) check_sights(batch);
  for (int64_t s = 0; s < batch.sequences; s++) check_sequence(batch, s);
}

void Program::check_sights(const BatchView &batch) const {
  if (batch.sight_values != 3 * batch.sequences) {
    throw request_error("the batch has " + number(batch.sight_values) + " sizes of memories; it needs three for each of its " +
                        number(batch.sequences) + " sequences, or none");
  }
  const bool recalls = std::any_of(caches_.begin(), caches_.end(), [](const auto &cache) { return cache->recall() != nullptr; });
  if (!recalls) throw request_error("the batch has memories, and the cache does not recall");
  for (int64_t s = 0; s < batch.sequences; s++) {
    const int32_t *own = batch.sights + 3 * s;
    if (own[0] >= (own[1] + own[2] > 0 ? 1 : 0) && own[1] >= 0 && own[2] >= 0) continue;
    throw request_error("the memory of sequence " + number(s) + " is a window of " + number(own[0]) + " pages, " +
                        number(own[1]) + " recalled ones and " + number(own[2]) + " sinks; it needs a window of a page");
  }
}

void Program::check_sequence(const BatchView &batch, int64_t s) const {
  const int64_t begin = batch.sequence_starts[s], end = batch.sequence_starts[s + 1];
  if (begin == end) return;
  for (int64_t t = begin + 1; t < end; t++) {
    if (batch.positions[t] != batch.positions[t - 1] + 1) {
      throw request_error("positions of sequence " + number(s) + " are not consecutive: " +
                          number(batch.positions[t - 1]) + " is followed by " + number(batch.positions[t]));
    }
  }
  for (size_t g = 0; g < caches_.size(); g++) check_table(batch, s, static_cast<int64_t>(g));
}

void Program::check_table(const BatchView &batch, int64_t s, int64_t group) const {
  const int64_t begin = batch.sequence_starts[s], end = batch.sequence_starts[s + 1];
  const Cache &cache = *caches_[static_cast<size_t>(group)];
  const int64_t slots = cache.cell().slots, table = s * static_cast<int64_t>(caches_.size()) + group;
  const int32_t *first = batch.page_positions + batch.page_starts[table],
                *table_end = batch.page_positions + batch.page_starts[table + 1];
  bool whole = false;  // it must hold all pages from position 0 on
  if (cache.recall() != nullptr) {
    whole = cache.spill() != nullptr || batch.positions[end - 1] >= sight_of(batch, cache, s).pages() * slots;
  }
  for (const int32_t *position = first; position < table_end; position++) {
    const int64_t page = batch.pages[position - batch.page_positions];
    if (page < 0 || page >= cache.pages) {
      throw request_error("page " + number(page) + " of sequence " + number(s) + " is not in the cache, which has " +
                          number(cache.pages));
    }
    if (*position < 0 || *position % slots != 0) {
      throw request_error("a page of sequence " + number(s) + " begins at position " + number(*position) +
                          "; pages begin at multiples of " + number(slots));
    }
    if (position > first && *position <= position[-1]) {
      throw request_error("page_positions of sequence " + number(s) + " do not ascend: " + number(position[-1]) +
                          " is followed by " + number(*position));
    }
    if (whole && *position != (position - first) * slots) {
      throw request_error("the pages of sequence " + number(s) + " have a gap before position " + number(*position) +
                          "; recall chooses among all pages from position 0 on");
    }
  }
  const int32_t *page = std::upper_bound(first, table_end, batch.positions[begin]) - 1;
  for (int64_t wanted = batch.positions[begin] / slots * slots; wanted <= batch.positions[end - 1];
       wanted += slots, page++) {
    if (page < first || page >= table_end || *page != wanted) {
      throw request_error("sequence " + number(s) + " has no page for position " +
                          number(std::max<int64_t>(wanted, batch.positions[begin])));
    }
  }
}

}  // namespace mnemos
