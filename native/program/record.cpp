// The recording half of Program: shapes are checked here, once, so that tasks can rely on them.
#include <algorithm>
#include <utility>

#include "program/program.h"
#include "system/error.h"

namespace mnemos {
namespace {

void require(bool condition, const std::string &message) {
  if (!condition) throw config_error(message);
}

std::string number(int64_t value) { return std::to_string(value); }

}  // namespace

Program::Program(std::shared_ptr<Pool> pool, std::vector<std::shared_ptr<Cache>> caches)
    : pool_(std::move(pool)), caches_(std::move(caches)),
      kernels_(&vector_kernels(current_isa(OperatorClass::attention))), tables_(caches_.size()) {
  for (const auto &cache : caches_) {
    require(cache->kv_heads == caches_[0]->kv_heads && cache->cell().slots == caches_[0]->cell().slots &&
                cache->cell().head_dim == caches_[0]->cell().head_dim && cache->cell().type == caches_[0]->cell().type,
            "the caches of a program's layer groups differ in more than layers and pages");
  }
}

const Value &Program::checked_value(int value) const {
  require(value >= 0 && value < static_cast<int>(graph_.values.size()),
          "value " + number(value) + " was never recorded");
  return graph_.values[static_cast<size_t>(value)];
}

int64_t Program::width(int value) const { return checked_value(value).width; }

int Program::add_operator(Operator op, std::vector<Value> outputs) {
  require(!finished_, "a program cannot be changed once it is finished");
  for (int value : op.inputs) {
    checked_value(value);
    require(std::count(changed_.begin(), changed_.end(), value) == 0, "a value was used after adapters changed it");
  }
  const int first = static_cast<int>(graph_.values.size());
  for (const Value &value : outputs) {
    require(value.width > 0, "a value needs at least one column");
    op.outputs.push_back(static_cast<int>(graph_.values.size()));
    graph_.values.push_back(value);
  }
  graph_.operators.push_back(std::move(op));
  return first;
}

int Program::input(int64_t width, ValueType type) {
  Operator op{};
  op.kind = OperatorKind::input;
  return add_operator(std::move(op), {{width, Rows::tokens, type}});
}

int Program::embed(MatrixPointer matrix, Index index) {
  Operator op{};
  op.kind = OperatorKind::embed;
  op.index = index;
  const int64_t columns = matrix->columns;
  op.matrix = std::move(matrix);
  return add_operator(std::move(op), {{columns, Rows::tokens, ValueType::float32}});
}

int Program::choose_rows(int x) {
  Operator op{};
  op.kind = OperatorKind::choose_rows;
  const Value value = checked_value(x);
  require(value.rows == Rows::tokens, "rows of a value can only be chosen once");
  op.inputs = {x};
  return add_operator(std::move(op), {{value.width, Rows::chosen, value.type}});
}

int Program::linear(int x, MatrixPointer matrix, VectorPointer bias) {
  const Value value = checked_value(x);
  require(value.width == matrix->columns,
          "a product's input has " + number(value.width) + " columns, its matrix " + number(matrix->columns));
  require(!bias || static_cast<int64_t>(bias->size()) == matrix->rows,
          "a bias has " + number(bias ? static_cast<int64_t>(bias->size()) : 0) + " values, its matrix " +
              number(matrix->rows) + " rows");
  Operator op{};
  op.kind = OperatorKind::linear;
  op.inputs = {x};
  op.bias = std::move(bias);
  const int64_t rows = matrix->rows;
  op.matrix = std::move(matrix);
  return add_operator(std::move(op), {{rows, value.rows, ValueType::float32}});
}

int Program::norm(int x, Norm norm) {
  const Value value = checked_value(x);
  const int64_t n = static_cast<int64_t>(norm.weight->size());
  const bool fits = n > 0 && (norm.kind == Norm::rms ? value.width % n == 0 : value.width == n);
  require(fits, "a norm's weight has " + number(n) + " values, its input " + number(value.width) + " columns");
  require(!norm.bias || norm.bias->size() == norm.weight->size(), "a norm's bias and weight differ in length");
  Operator op{};
  op.kind = OperatorKind::norm;
  op.inputs = {x};
  op.norm = std::move(norm);
  return add_operator(std::move(op), {value});
}

int Program::low_rank(int y, int x, std::shared_ptr<LowRank> factors) {
  const Value value = checked_value(y), input = checked_value(x);
  require(value.width == factors->rows && input.width == factors->columns && value.rows == input.rows,
          "adapters change a product of " + number(factors->columns) + " to " + number(factors->rows) +
              " columns; this one has " + number(input.width) + " and " + number(value.width));
  for (const Operator &op : graph_.operators)
    require(std::count(op.inputs.begin(), op.inputs.end(), y) == 0, "what adapters change has been used already");
  Operator op{};
  op.kind = OperatorKind::low_rank;
  op.inputs = {y, x};
  op.low_rank = std::move(factors);
  const int result = add_operator(std::move(op), {value});
  changed_.push_back(y);
  return result;
}

int Program::rope(int x, std::vector<float> frequencies, int64_t head_dim, float magnitude) {
  const Value value = checked_value(x);
  const int64_t half = static_cast<int64_t>(frequencies.size());
  require(value.rows == Rows::tokens, "rope needs a value with a row for each token");
  require(head_dim > 0 && value.width % head_dim == 0,
          "rope's head_dim is " + number(head_dim) + ", which does not divide " + number(value.width) + " columns");
  require(half > 0 && 2 * half <= head_dim,
          "rope rotates " + number(2 * half) + " elements of a head that has " + number(head_dim));
  Operator op{};
  op.kind = OperatorKind::rope;
  op.inputs = {x};
  op.head_dim = head_dim;
  for (const auto &table : rope_tables_) {
    if (table->same_as(frequencies, magnitude)) op.rope = table;
  }
  if (!op.rope) rope_tables_.push_back(op.rope = std::make_shared<RopeTable>(std::move(frequencies), magnitude));
  return add_operator(std::move(op), {value});
}

int Program::attention(int q, int k, int v, Attention attention) {
  require(!caches_.empty(), "attention needs a cache");
  require(attention.group >= 0 && attention.group < static_cast<int64_t>(caches_.size()),
          "layer group " + number(attention.group) + " is not one of " + number(static_cast<int64_t>(caches_.size())));
  const auto &cache = caches_[static_cast<size_t>(attention.group)];
  const CellLayout &cell = cache->cell();
  require(attention.heads > 0 && attention.kv_heads > 0 && attention.heads % attention.kv_heads == 0,
          "attention has " + number(attention.heads) + " heads, which is not a multiple of its " +
              number(attention.kv_heads) + " kv_heads");
  require(attention.heads / attention.kv_heads <= max_tile_rows,
          "attention has " + number(attention.heads / attention.kv_heads) + " heads for one of keys; at most " +
              number(max_tile_rows) + " are possible");
  require(attention.kv_heads == cache->kv_heads && attention.head_dim == cell.head_dim,
          "attention has " + number(attention.kv_heads) + " kv_heads of " + number(attention.head_dim) +
              ", its cache " + number(cache->kv_heads) + " of " + number(cell.head_dim));
  require(attention.layer >= 0 && attention.layer < cache->layers,
          "layer " + number(attention.layer) + " is not in a cache of " + number(cache->layers) + " layers");
  require(attention.window >= 0, "the window is " + number(attention.window) + "; it must not be negative");
  const int64_t width = attention.heads * attention.head_dim, kv_width = attention.kv_heads * attention.head_dim;
  require(checked_value(q).width == width && checked_value(k).width == kv_width && checked_value(v).width == kv_width,
          "attention's queries, keys and values have " + number(checked_value(q).width) + ", " +
              number(checked_value(k).width) + " and " + number(checked_value(v).width) +
              " columns; heads and head_dim need " + number(width) + ", " + number(kv_width) + " and " +
              number(kv_width));
  for (int value : {q, k, v})
    require(checked_value(value).rows == Rows::tokens, "attention needs a row for each token");
  Operator op{};
  op.kind = OperatorKind::attention;
  op.inputs = {q, k, v};
  op.attention = attention;
  op.attention.cache = cache;
  return add_operator(std::move(op), {checked_value(q)});
}

int Program::elementwise(Elementwise operation, int x, int second) {
  const Value value = checked_value(x);
  Operator op{};
  op.kind = OperatorKind::elementwise;
  op.elementwise = operation;
  op.inputs = {x};
  if (second >= 0) {
    const Value other = checked_value(second);
    require(other.width == value.width && other.rows == value.rows,
            "two values of " + number(value.width) + " and " + number(other.width) + " columns cannot be combined");
    op.inputs.push_back(second);
  }
  return add_operator(std::move(op), {value});
}

std::pair<int, int> Program::route(int x, MatrixPointer matrix, int64_t top_k, bool normalise) {
  const Value value = checked_value(x);
  require(value.width == matrix->columns,
          "the router has " + number(matrix->columns) + " columns, its input " + number(value.width));
  require(top_k >= 1 && top_k <= matrix->rows,
          "top_k is " + number(top_k) + "; it must be 1 to " + number(matrix->rows) + ", the number of experts");
  Operator op{};
  op.kind = OperatorKind::route;
  op.inputs = {x};
  op.matrix = std::move(matrix);
  op.top_k = top_k;
  op.normalise = normalise;
  const int first =
      add_operator(std::move(op), {{top_k, value.rows, ValueType::int32}, {top_k, value.rows, ValueType::float32}});
  return {first, first + 1};
}

std::pair<int, int> Program::choose(int logits, int64_t top_k) {
  const Value value = checked_value(logits);
  require(top_k >= 1 && top_k <= value.width,
          "top_k is " + number(top_k) + "; it must be 1 to " + number(value.width) + ", the number of logits");
  Operator op{};
  op.kind = OperatorKind::choose;
  op.inputs = {logits};
  op.top_k = top_k;
  const int first =
      add_operator(std::move(op), {{top_k, value.rows, ValueType::int32}, {top_k, value.rows, ValueType::float32}});
  return {first, first + 1};
}

int Program::pool(int x, Pooling pooling) {
  const Value value = checked_value(x);
  require(value.rows == Rows::tokens, "a router pools over all rows of a batch");
  require(pooling.window >= 1, "the window is " + number(pooling.window) + "; it must be at least 1");
  const bool remembers = pooling.kind == PoolKind::rolling || pooling.kind == PoolKind::hybrid;
  require(remembers == static_cast<bool>(pooling.windows), "windows are needed by rolling and hybrid pooling alone");
  if (pooling.windows) {
    const Windows &windows = *pooling.windows;
    require(windows.width == value.width && windows.length >= pooling.window && pooling.layer >= 0 &&
                pooling.layer < windows.layers,
            "the windows do not fit layer " + number(pooling.layer) + " with " + number(value.width) + " columns and " +
                number(pooling.window) + " positions");
  }
  Operator op{};
  op.kind = OperatorKind::pool;
  op.inputs = {x};
  op.pooling = std::move(pooling);
  return add_operator(std::move(op), {value});
}

int Program::memory(int q, int ids, int weights, MemoryAttention memory) {
  const Value value = checked_value(q);
  const Cache &bank = memory.bank->cache();
  require(memory.head_dim >= 1 && memory.kv_heads >= 1 && memory.heads >= 1 && memory.heads % memory.kv_heads == 0 &&
              memory.heads / memory.kv_heads <= max_tile_rows && value.width == memory.heads * memory.head_dim,
          "memory attention with " + number(memory.heads) + " heads, " + number(memory.kv_heads) +
              " of keys, of width " + number(memory.head_dim) + " does not fit queries of " + number(value.width));
  require(
      bank.kv_heads == memory.kv_heads && bank.cell().head_dim == memory.head_dim && memory.rows == memory.bank->rows,
      "the bank does not hold " + number(memory.rows) + " rows of those heads");
  Operator op{};
  op.kind = OperatorKind::memory;
  op.inputs = {q};
  require((ids >= 0) == (memory.chapters > 0) && (ids >= 0) == (weights >= 0),
          "a bank with chapters needs the ids and weights of those chosen, and any other has none");
  if (ids >= 0) {
    const Value chosen = checked_value(ids), shares = checked_value(weights);
    memory.chosen = chosen.width;
    require(chosen.type == ValueType::int32 && chosen.width == shares.width && chosen.rows == value.rows &&
                shares.rows == value.rows,
            "memory attention needs ids and weights of the same shape, with as many rows as its queries");
    require(memory.shared >= 0 && memory.shared < memory.chapters,
            number(memory.shared) + " chapters of " + number(memory.chapters) + " cannot be shared");
    op.inputs = {q, ids, weights};
  }
  require(memory.span_rows() == memory.bank->span, "the bank has chapters of " + number(memory.bank->span) +
                                                       " rows; those of the operator have " +
                                                       number(memory.span_rows()));
  op.memory = std::make_shared<const MemoryAttention>(std::move(memory));
  return add_operator(std::move(op), {value});
}

int Program::experts(int x, int ids, int weights, Experts experts) {
  const Value value = checked_value(x), chosen = checked_value(ids), shares = checked_value(weights);
  const size_t count = experts.gate.size();
  require(count > 0 && experts.up.size() == count && experts.down.size() == count,
          "the experts have " + number(static_cast<int64_t>(count)) + " gate, " +
              number(static_cast<int64_t>(experts.up.size())) + " up and " +
              number(static_cast<int64_t>(experts.down.size())) + " down matrices; there must be equally many");
  for (size_t e = 0; e < count; e++) {
    const bool same = prepared_form(*experts.gate[e]) == prepared_form(*experts.gate[0]) &&
                      prepared_form(*experts.up[e]) == prepared_form(*experts.gate[0]) &&
                      prepared_form(*experts.down[e]) == prepared_form(*experts.down[0]) &&
                      experts.gate[e]->rows == experts.gate[0]->rows && experts.up[e]->rows == experts.gate[0]->rows &&
                      experts.down[e]->rows == experts.down[0]->rows;
    require(same, "the experts' matrices differ in shape or kind: expert " + number(static_cast<int64_t>(e)) +
                      " and expert 0");
  }
  require(experts.gate[0]->columns == value.width && experts.down[0]->columns == experts.gate[0]->rows,
          "the experts' matrices do not fit an input of " + number(value.width) + " columns");
  require(chosen.type == ValueType::int32 && chosen.width == shares.width && chosen.rows == value.rows &&
              shares.rows == value.rows,
          "experts need ids and weights of the same shape, with as many rows as their input");
  experts.top_k = chosen.width;
  Operator op{};
  op.kind = OperatorKind::experts;
  op.inputs = {x, ids, weights};
  const int64_t rows = experts.down[0]->rows;
  op.experts = std::make_shared<const Experts>(std::move(experts));
  return add_operator(std::move(op), {{rows, value.rows, ValueType::float32}});
}

}  // namespace mnemos
