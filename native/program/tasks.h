// The tasks of a program: each operator, alone or fused with its neighbours, becomes one or a few of these.
#pragma once

#include <memory>
#include <optional>
#include <vector>

#include "linear/linear.h"
#include "program/low_rank.h"
#include "program/memory.h"
#include "program/step.h"

namespace mnemos {

using MatrixPointer = std::shared_ptr<const Matrix>;
using VectorPointer = std::shared_ptr<const std::vector<float>>;

enum class Index { token_ids, positions };
// y = rows of a matrix, by token id or position.
std::unique_ptr<Task> make_embed(MatrixPointer matrix, Index index, int y);
// y = the rows of x at the batch's logit_rows.
std::unique_ptr<Task> make_choose_rows(int x, int64_t width, int y);
std::unique_ptr<Task> make_rope(int x, int y, int64_t width, int64_t head_dim,
                                std::shared_ptr<const class RopeTable> table, Rows rows);

enum class ElementwiseKind { add, scale, softcap, activation, gated_activation };
struct Elementwise {
  ElementwiseKind kind;
  float number = 0;  // factor or cap
  ActivationKind activation = ActivationKind::silu;
};
// y = operation(x[, second]); `second` is -1 if there is none.
std::unique_ptr<Task> make_elementwise(Elementwise operation, int x, int second, int y, int64_t width, Rows rows);

// A norm before something else.
struct Norm {
  enum Kind { none, rms, layer } kind = none;
  VectorPointer weight, bias;
  float epsilon = 0;
};
std::unique_ptr<Task> make_norm(Norm norm, int x, int y, int64_t width, Rows rows);

// The form in which one or several products want the same rows.
struct PreparedForm {
  Form form;
  const ProductKernels *kernels;
  int64_t columns;
  bool operator==(const PreparedForm &o) const {
    return form == o.form && kernels == o.kernels && columns == o.columns;
  }
};
inline PreparedForm prepared_form(const Matrix &matrix, bool precise = false) {
  return {matrix.input_form(precise), &matrix.kernels, matrix.columns};
}

// Where rows go: to a buffer of floats, or to one in the form that the following products want.
struct Target {
  int buffer = -1;
  std::optional<PreparedForm> form;
};

// Prepares norm(x), with that width, in each target's form.
std::unique_ptr<Task> make_prepare(Norm norm, int x, int64_t width, std::vector<Target> targets, Rows rows);

// One or several products of the same input, with the following operators applied while the result is in the cache.
struct Product {
  MatrixPointer matrix, second;  // second: the `up` of a gated activation, whose gate is `matrix`
  VectorPointer bias, second_bias;
  bool activated = false;  // activation(product), or activation(gate) * up with a second matrix
  ActivationKind activation = ActivationKind::silu;
  int residual = -1;  // buffer to add to; not with a form of y
  Target y;
};
// unless_argmax: not if only the best results are wanted.
std::unique_ptr<Task> make_products(std::vector<Product> products, int input, PreparedForm form, Rows rows,
                                    bool unless_argmax = false);

// Finds the largest of a matrix's products with each row, without computing all of them.
struct Argmax {
  MatrixPointer matrix;  // one that has weight lengths
  int fine, coarse;  // buffers with the rows as int15 and as int8
  Rows rows;
};
// margins: one float per row; found: argmax_state_floats per row; tokens: the index of each row's largest product, on
// ties the lowest, or -1 if none is above minus infinity, or one is not a number below infinity.
std::vector<std::unique_ptr<Task>> make_argmax(const Argmax &argmax, int margins, int found, int tokens);
int64_t argmax_state_floats(int threads);

// Cosines and sines by position, in blocks that are computed when a batch first has a position in them (between steps,
// by one thread). Of a long text, those that no batch has used for a while are dropped.
class RopeTable {
 public:
  RopeTable(std::vector<float> frequencies, float magnitude);
  // Makes what these positions need.
  void prepare(const int32_t *positions, int64_t count);
  int64_t half() const { return static_cast<int64_t>(frequencies_.size()); }
  const float *cosines(int64_t position) const {
    return blocks_[static_cast<size_t>(position / block)].get() + position % block * 2 * half();
  }
  const float *sines(int64_t position) const { return cosines(position) + half(); }
  // Makes those of the multiples of `step` up to `last` and keeps them: `cosines` of position number * step, then
  // sines.
  void prepare_multiples(int64_t step, int64_t last);
  const float *multiple(int64_t number) const { return multiples_.data() + number * 2 * half(); }
  bool same_as(const std::vector<float> &frequencies, float magnitude) const {
    return frequencies == frequencies_ && magnitude == magnitude_;
  }

 private:
  static constexpr int64_t block = 256, most_blocks = 128;  // positions of a block, and blocks that are kept
  void drop_unused(const int32_t *positions, int64_t count);
  void fill(int64_t position, float *row) const;

  std::vector<float> frequencies_;
  std::vector<std::unique_ptr<float[]>> blocks_;
  std::vector<float> multiples_;
  int64_t made_ = 0;
  float magnitude_;
};

struct Attention {
  int64_t heads, kv_heads, head_dim;
  float scale;
  int64_t window;
  float softcap;
  int64_t layer;  // in the cache of its group
  int64_t group;  // which of the program's caches, and of a sequence's page tables
  int tile_set = 0;
  std::shared_ptr<Cache> cache;
  // Fused in front of it: norms of each head and rotation of queries and keys; empty if there is none.
  Norm query_norm, key_norm;
  std::shared_ptr<const RopeTable> query_rope, key_rope;

  // How its rows see long texts, null: whole, or within its window. A cache may begin to recall between two steps.
  const Recall *recall() const { return window == 0 ? cache->recall() : nullptr; }
};
// Norms and rotates keys and stores them and values in the cache, for batches in which a sequence has several tokens;
// `stored` represents the cache's content then. In other batches make_attend's task does it.
std::unique_ptr<Task> make_store(const Attention &attention, int k, int v, int stored);
std::unique_ptr<Task> make_attend(const Attention &attention, int q, int k, int v, int stored, int partials,
                                  const Target &y);
// Where rows of long texts recall, their queries name pages before make_attend's task chooses among those.
std::unique_ptr<Task> make_naming(const Attention &attention, int q, int stored, int partials);
// Keys and values of the sequences of make_attend's task, for one thread.
std::unique_ptr<Ahead> make_attention_ahead();
// Merges the partial results of long contexts that were split among threads.
std::unique_ptr<Task> make_merge(const Attention &attention, int partials, const Target &y);
// The batch's page tables in one of `groups` layer groups, of pages of `slots` positions; they have been checked.
void resolve_tables(const BatchView &batch, int64_t groups, int64_t group, int64_t slots, Tables &tables);
// The tiles for this batch. Long contexts are split when there are few tiles.
TileSet make_tiles(const BatchView &batch, const Tables &tables, const Attention &attention, int threads);
int64_t partials_bytes(const TileSet &tiles, const Attention &attention);

// ids (T, top_k) and weights (T, top_k) from logits (T, experts).
std::unique_ptr<Task> make_route(int logits, int64_t experts, int64_t top_k, bool normalise, int ids, int weights,
                                 Rows rows);

// y = what the rows of x are routed by.
std::unique_ptr<Task> make_pool(Pooling pooling, int x, int64_t width, int y);
// Makes what of a bank has never been read; `filled` represents its content.
std::unique_ptr<Task> make_fill(std::shared_ptr<const MemoryAttention> memory, int ids, Rows rows, int filled);
// y = attention from q to a bank; ids and weights: -1 without chapters. The blocks that a few rows read are shared out
// among threads, and their parts joined: `partials` has memory_partial_floats.
std::unique_ptr<Task> make_read(std::shared_ptr<const MemoryAttention> memory, int q, int ids, int weights, Rows rows,
                                int filled, int partials, int y);
std::unique_ptr<Task> make_join(std::shared_ptr<const MemoryAttention> memory, int ids, int weights, Rows rows,
                                int partials, int y);
int64_t memory_partial_floats(const MemoryAttention &memory);

// A weight's product y, to which each row's adapter adds something.
struct Adapted {
  std::shared_ptr<const LowRank> factors;
  int y;
};
// y += what each row's adapter makes of x, for several weights that read x; `inner` has inner_floats per row.
std::vector<std::unique_ptr<Task>> make_low_rank(const std::vector<Adapted> &adapted, int x, int inner, Rows rows);
int64_t inner_floats(const std::vector<Adapted> &adapted, Rows rows);

struct Experts {
  std::vector<MatrixPointer> gate, up, down;
  int64_t top_k;
  ActivationKind activation;
};
// The tasks of a mixture of experts; the buffers have room for `top_k` rows per token. `order` holds ints:
// (expert count + 1) starts, then the (token * top_k + choice) of each row, sorted by expert.
std::unique_ptr<Task> make_sort_rows(std::shared_ptr<const Experts> experts, int ids, int order, Rows rows);
std::unique_ptr<Task> make_gather(std::shared_ptr<const Experts> experts, int x, int order, int input, Rows rows);
std::unique_ptr<Task> make_gated_experts(std::shared_ptr<const Experts> experts, int input, int order, int inner,
                                         Rows rows);
std::unique_ptr<Task> make_down_experts(std::shared_ptr<const Experts> experts, int input, int order, int outer,
                                        Rows rows);
std::unique_ptr<Task> make_combine(std::shared_ptr<const Experts> experts, int outer, int order, int weights, int y,
                                   Rows rows);

}  // namespace mnemos
