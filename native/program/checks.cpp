// What a batch must fulfil before a step runs.
#include <algorithm>

#include "program/program.h"
#include "system/error.h"

namespace mnemos {
namespace {

std::string number(int64_t value) { return std::to_string(value); }

}  // namespace

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
  for (const Attention &attention : schedule_.attentions) {
    if (attention.recall() != nullptr)
      attention.cache->check_naming(attention.layer, attention.heads / attention.kv_heads);
  }
  for (int64_t s = 0; s < batch.sequences; s++) check_sequence(batch, s);
}

void Program::check_sights(const BatchView &batch) const {
  if (batch.sight_values != 3 * batch.sequences) {
    throw request_error("the batch has " + number(batch.sight_values) +
                        " sizes of memories; it needs three for each of its " + number(batch.sequences) +
                        " sequences, or none");
  }
  const bool recalls =
      std::any_of(caches_.begin(), caches_.end(), [](const auto &cache) { return cache->recall() != nullptr; });
  if (!recalls) throw request_error("the batch has memories, and the cache does not recall");
  for (int64_t s = 0; s < batch.sequences; s++) {
    const int32_t *own = batch.sights + 3 * s;
    if (own[0] >= (own[1] + own[2] > 0 ? 1 : 0) && own[1] >= 0 && own[2] >= 0) continue;
    throw request_error("the memory of sequence " + number(s) + " is a window of " + number(own[0]) + " pages, " +
                        number(own[1]) + " recalled ones and " + number(own[2]) +
                        " sinks; it needs a window of a page");
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
