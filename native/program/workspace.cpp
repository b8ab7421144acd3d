// Where the buffers of a step are stored: slots that buffers share one after the other, then each thread's scratch.
#include <algorithm>

#include "program/program.h"
#include "system/mapping.h"

namespace mnemos {
namespace {

int64_t round_up(int64_t value) { return (value + 63) / 64 * 64; }

// The first and the last task that uses a buffer: -1 for an input's first, the number of tasks for an output's last.
struct Life {
  int first, last = -1;
  bool copied = false;  // each thread has its own when there is one row
};

std::vector<Life> lives_of(const Schedule &schedule) {
  const int count = static_cast<int>(schedule.tasks.size());
  std::vector<Life> lives(schedule.buffers.size(), Life{count});
  const auto of = [&](int buffer) -> Life & { return lives[static_cast<size_t>(buffer)]; };
  for (int t = 0; t < count; t++) {
    const Task &task = *schedule.tasks[static_cast<size_t>(t)];
    for (const auto *list : {&task.reads, &task.writes}) {
      for (int b : *list) {
        of(b).first = std::min(of(b).first, t);
        of(b).last = t;
      }
    }
    for (int b : task.writes) of(b).copied = task.cheap_for_one_row;
  }
  for (int b : schedule.input_buffers) of(b).first = -1;
  for (int b : schedule.output_buffers) of(b).last = count;
  if (schedule.argmax_buffer >= 0) of(schedule.argmax_buffer).last = count;
  return lives;
}

bool same_size(const BufferSpec &a, const BufferSpec &b) {
  return a.kind == b.kind && a.rows == b.rows && a.row_floats == b.row_floats && a.row_multiple == b.row_multiple &&
         a.form.columns == b.form.columns;
}

// True if the task works in place from one buffer, which it reads once, to the other.
bool works_in_place(const Task &task, int from, int to) {
  return std::count(task.reads.begin(), task.reads.end(), from) == 1 &&
         std::count(task.in_place.begin(), task.in_place.end(), std::make_pair(from, to)) == 1;
}

}  // namespace

Workspace::Workspace(size_t size) : data(map_memory(size, "the workspace of a step")), bytes(size) {}
Workspace::~Workspace() { unmap_memory(data, bytes); }

// Buffers whose lives do not overlap share a slot. Inputs and outputs have separate ones.
void Program::assign_slots() {
  const auto &buffers = schedule_.buffers;
  const std::vector<Life> lives = lives_of(schedule_);
  std::vector<int> order(buffers.size());
  for (size_t b = 0; b < buffers.size(); b++) order[b] = static_cast<int>(b);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) {
    return lives[static_cast<size_t>(a)].first < lives[static_cast<size_t>(b)].first;
  });
  std::vector<int> free_after;  // by slot: the last task that uses it
  slot_of_.assign(buffers.size(), -1);
  for (int b : order) {
    const size_t i = static_cast<size_t>(b);
    const Life &life = lives[i];
    // The slot of what the buffer's first task reads for the last time, if that task works in place; or any free one.
    const auto in_place = [&](const Slot &slot) {
      const int from = slot.buffers.back();
      return life.first >= 0 && life.first < static_cast<int>(schedule_.tasks.size()) &&
             lives[static_cast<size_t>(from)].last == life.first &&
             works_in_place(*schedule_.tasks[static_cast<size_t>(life.first)], from, b);
    };
    size_t chosen = slots_.size();
    for (size_t s = 0; s < slots_.size(); s++) {
      const Slot &slot = slots_[s];
      if (slot.copies != life.copied || !same_size(buffers[i], buffers[static_cast<size_t>(slot.buffers.front())]))
        continue;
      if (free_after[s] < life.first) chosen = s;
      if (in_place(slot)) {
        chosen = s;
        break;
      }
    }
    if (chosen == slots_.size()) {
      slots_.emplace_back();
      slots_.back().copies = life.copied;
      free_after.push_back(-2);
    }
    slots_[chosen].buffers.push_back(b);
    free_after[chosen] = std::max(life.last, life.first);
    slot_of_[i] = static_cast<int>(chosen);
  }
}

int64_t Program::buffer_bytes(const BufferSpec &spec, const BatchView &batch, const std::vector<TileSet> &tiles) const {
  const int64_t rows = spec.rows == Rows::tokens ? batch.tokens : batch.chosen;
  switch (spec.kind) {
    case BufferSpec::floats: return round_up((rows * spec.row_floats + spec.extra_floats) * 4);
    case BufferSpec::input:
      return round_up(static_cast<int64_t>(input_bytes(spec.form.form, rows * spec.row_multiple, spec.form.columns)));
    case BufferSpec::partials: {
      int64_t most = 0;
      for (size_t i = 0; i < tiles.size(); i++)
        most = std::max(most, partials_bytes(tiles[i], schedule_.attentions[i]));
      return round_up(most);
    }
  }
  return 0;
}

// Places the slots one after the other, then each thread's scratch; returns the bytes needed.
int64_t Program::layout(const BatchView &batch, const std::vector<TileSet> &tiles, bool one_row) {
  int64_t offset = 0;
  for (Slot &slot : slots_) {
    slot.offset = offset;
    slot.bytes = 0;
    const BufferSpec *previous = nullptr;
    for (int b : slot.buffers) {
      const BufferSpec &spec = schedule_.buffers[static_cast<size_t>(b)];
      // Forms of the same columns and kernels are the only ones that can differ in size within a slot.
      if (previous && previous->form == spec.form && previous->extra_floats == spec.extra_floats) continue;
      slot.bytes = std::max(slot.bytes, buffer_bytes(spec, batch, tiles));
      previous = &spec;
    }
    offset += slot.bytes * (one_row && slot.copies ? pool_->threads() : 1);
  }
  scratch_offset_ = offset;
  scratch_bytes_ = 0;
  for (const auto &task : schedule_.tasks) {
    scratch_bytes_ = std::max(scratch_bytes_, round_up(task->scratch_bytes(batch, pool_->threads())));
  }
  // Vectors are loaded whole and may reach a little beyond the last value.
  return offset + scratch_bytes_ * pool_->threads() + 128;
}

int64_t Program::workspace_bytes(int64_t tokens, int64_t chosen) const {
  BatchView batch;
  batch.tokens = tokens;
  batch.chosen = chosen;
  int64_t bytes = 0;
  for (const Slot &slot : slots_) {
    int64_t most = 0;
    for (int b : slot.buffers) {
      const BufferSpec &spec = schedule_.buffers[static_cast<size_t>(b)];
      if (spec.kind != BufferSpec::partials) most = std::max(most, buffer_bytes(spec, batch, {}));
    }
    bytes += most;
  }
  return bytes;
}

}  // namespace mnemos
