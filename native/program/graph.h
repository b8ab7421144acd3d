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

enum class OperatorKind { input, embed, choose_rows, linear, norm, rope, attention, elementwise, route, experts };

// Which fields have a meaning depends on the kind.
struct Operator {
  OperatorKind kind;
  std::vector<int> inputs, outputs;  // values
  Index index = Index::token_ids;
  MatrixPointer matrix;
  VectorPointer bias;
  Norm norm;
  Elementwise elementwise{ElementwiseKind::add, 0, ActivationKind::silu};
  std::shared_ptr<RopeTable> rope;
  int64_t head_dim = 0;  // of rope
  Attention attention{};
  std::shared_ptr<const Experts> experts;
  int64_t top_k = 0;
  bool normalise = false;
};

struct Graph {
  std::vector<Value> values;
  std::vector<Operator> operators;
  std::vector<int> outputs;
};

// What a buffer holds, from which its size follows.
struct BufferSpec {
  enum Kind { floats, input, partials } kind = floats;
  Rows rows = Rows::tokens;
  int64_t row_floats = 0;  // floats: 4-byte values a row
  int64_t extra_floats = 0;  // floats: behind the rows
  int64_t row_multiple = 1;  // input: rows of the input for each row
  PreparedForm form{};  // input
};

// The tasks that a graph becomes. Buffers are numbered by a task's view of them, before any is shared.
struct Schedule {
  std::vector<std::unique_ptr<Task>> tasks;
  std::vector<BufferSpec> buffers;
  std::vector<int> input_buffers;  // of the graph's input operators, in order
  std::vector<int> output_buffers;  // of the graph's outputs
  int argmax_buffer = -1;  // of the numbers of the rows' largest values of the last output, if tasks for that are there
  std::vector<Attention> attentions;  // one for each tile set
};

// Fuses what can be fused without changing any result and orders the rest.
Schedule make_schedule(const Graph &graph, int threads);

}  // namespace mnemos
