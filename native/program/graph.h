// An architecture's forward pass as it was recorded: operators on values, in order.
#pragma once

#include <memory>
#include <vector>

#include "program/tasks.h"

namespace mnemos {

enum class ValueType { float32, int32 };

// The result of an operator or an input: (rows, width).
struct Value {
  int64_t width;
  Rows rows;
  ValueType type;
};

enum class OperatorKind {
  input,
  embed,
  choose_rows,
  linear,
  norm,
  rope,
  attention,
  elementwise,
  route,
  experts,
  choose,
  pool,
  memory,
  low_rank
};

// Which fields are used depends on the kind.
struct Operator {
  OperatorKind kind;
  std::vector<int> inputs, outputs;  // values
  Index index = Index::token_ids;
  MatrixPointer matrix;
  VectorPointer bias;
  Norm norm;
  Elementwise elementwise{ElementwiseKind::add, 0, ActivationKind::silu};
  std::shared_ptr<RopeTable> rope;
  int64_t head_dim = 0;  // for rope
  Attention attention{};
  std::shared_ptr<const Experts> experts;
  Pooling pooling{};
  std::shared_ptr<const MemoryAttention> memory;
  std::shared_ptr<LowRank> low_rank;
  int64_t top_k = 0;
  bool normalise = false;
};

struct Graph {
  std::vector<Value> values;
  std::vector<Operator> operators;
  std::vector<int> outputs;
};

// What a buffer contains, which determines its size.
struct BufferSpec {
  enum Kind { floats, input, partials } kind = floats;
  Rows rows = Rows::tokens;
  int64_t row_floats = 0;  // floats: 4-byte values per row
  int64_t extra_floats = 0;  // floats: after the rows
  int64_t row_multiple = 1;  // input: rows of the input for each row
  PreparedForm form{};  // input
};

// The tasks that a graph becomes. Buffers are numbered by a task's view of them, before any is shared.
struct Schedule {
  std::vector<std::unique_ptr<Task>> tasks;
  std::vector<BufferSpec> buffers;
  std::vector<int> input_buffers;  // those of the graph's input operators, in order
  std::vector<int> output_buffers;  // those of the graph's outputs
  int argmax_buffer = -1;  // the indices of the rows' largest values in the last output, if there are tasks for them
  std::vector<Attention> attentions;  // one for each tile set
};

// Fuses operators where that changes no result, and orders the tasks.
Schedule make_schedule(const Graph &graph, int threads);

}  // namespace mnemos
