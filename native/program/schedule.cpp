// From recorded operators to tasks. A fusion only saves passes over memory and barriers: it computes the
// same numbers in the same order as the operators one by one, except that a product which is added to something
// starts from it.
#include <algorithm>
#include <utility>

#include "program/graph.h"

namespace mnemos {
namespace {

class Scheduler {
 public:
  Scheduler(const Graph &graph, int threads)
      : graph_(graph), threads_(threads), done_(graph.operators.size(), false), producer_(graph.values.size(), -1),
        uses_(graph.values.size(), 0), buffer_(graph.values.size(), -1) {
    for (size_t i = 0; i < graph.operators.size(); i++) {
      for (int value : graph.operators[i].outputs) producer_[at(value)] = static_cast<int>(i);
      for (int value : graph.operators[i].inputs) uses_[at(value)]++;
    }
    for (int value : graph.outputs) uses_[at(value)]++;
  }

  Schedule run() {
    mark_precise();
    plan_fusions();
    find_head();
    for (size_t i = 0; i < graph_.operators.size(); i++) {
      if (!done_[i]) schedule(static_cast<int>(i));
    }
    for (int value : graph_.outputs) schedule_.output_buffers.push_back(buffer(value));
    return std::move(schedule_);
  }

 private:
  static size_t at(int index) { return static_cast<size_t>(index); }
  const Operator &op(int index) const { return graph_.operators[at(index)]; }
  const Value &value(int index) const { return graph_.values[at(index)]; }
  // The operator that makes this value, if it is of that kind and no other operator uses the value; -1 otherwise.
  int only_source(int v, OperatorKind kind) const {
    const int source = producer_[at(v)];
    return source >= 0 && op(source).kind == kind && uses_[at(v)] == 1 ? source : -1;
  }

  int buffer(int v) {
    if (buffer_[at(v)] < 0) {
      BufferSpec spec;
      spec.rows = value(v).rows;
      spec.row_floats = value(v).width;
      buffer_[at(v)] = add_buffer(spec);
    }
    return buffer_[at(v)];
  }
  int add_buffer(const BufferSpec &spec) {
    schedule_.buffers.push_back(spec);
    return static_cast<int>(schedule_.buffers.size()) - 1;
  }
  void add(std::unique_ptr<Task> task) { schedule_.tasks.push_back(std::move(task)); }

  // Products whose rounding shows most take finer activations: those whose results are an output of the program
  // (logits), that choose chapters, or the keys or values that later tokens attend to, perhaps normalised, rotated or
  // scaled in between; and
  // those after the last attention, whose errors are not evened out: in a prompt they run for the chosen rows alone.
  // Queries, of which there are more, gain little.
  void mark_precise() {
    precise_.assign(graph_.operators.size(), false);
    size_t last = graph_.operators.size();
    for (size_t i = 0; i < graph_.operators.size(); i++) {
      if (op(static_cast<int>(i)).kind == OperatorKind::attention) last = i;
    }
    for (size_t i = last; i < graph_.operators.size(); i++)
      precise_[i] = op(static_cast<int>(i)).kind == OperatorKind::linear;
    for (int v : graph_.outputs) mark_source(v);
    for (const Operator &o : graph_.operators) {
      if (o.kind == OperatorKind::choose) mark_source(o.inputs[0]);
      if (o.kind == OperatorKind::attention)
        std::for_each(o.inputs.begin() + 1, o.inputs.end(), [&](int v) { mark_source(v); });
    }
  }
  void mark_source(int v) {
    const int source = producer_[at(v)];
    if (source < 0) return;
    const Operator &o = op(source);
    if (o.kind == OperatorKind::linear) precise_[at(source)] = true;
    const bool alone = o.kind == OperatorKind::elementwise && o.inputs.size() == 1;
    const bool adapted = o.kind == OperatorKind::low_rank;
    if (o.kind == OperatorKind::norm || o.kind == OperatorKind::rope || adapted || alone) mark_source(o.inputs[0]);
  }
  // The forms in which products want a value, and how many products do.
  std::vector<PreparedForm> forms_of(int v, int *readers) const {
    std::vector<PreparedForm> forms;
    const auto want = [&](const PreparedForm &form) {
      if (std::find(forms.begin(), forms.end(), form) == forms.end()) forms.push_back(form);
    };
    *readers = 0;
    for (int i = 0; i < static_cast<int>(graph_.operators.size()); i++) {
      if (op(i).kind != OperatorKind::linear || op(i).inputs[0] != v) continue;
      want(form_of(i));
      if (i == head_) want(coarse_form(i));
      ++*readers;
    }
    return forms;
  }
  PreparedForm coarse_form(int i) const { return prepared_form(*op(i).matrix); }
  // Where a task that can prepare its results puts them.
  Target target(int v, bool prepares) {
    Target y;
    int readers;
    const std::vector<PreparedForm> forms = forms_of(v, &readers);
    if (prepares && forms.size() == 1 && readers == uses_[at(v)]) y.form = forms[0];
    y.buffer = y.form ? input_buffer(value(v).rows, *y.form) : buffer(v);
    if (y.form) prepared_.push_back({v, *y.form, y.buffer});
    return y;
  }
  int input_buffer(Rows rows, const PreparedForm &form, int64_t row_multiple = 1) {
    BufferSpec spec;
    spec.kind = BufferSpec::input;
    spec.rows = rows;
    spec.row_multiple = row_multiple;
    spec.form = form;
    return add_buffer(spec);
  }
  PreparedForm form_of(int i) const { return prepared_form(*op(i).matrix, precise_[at(i)]); }

  // A product that a later operator finishes: that operator's place in the list is where the product is needed.
  struct Finish {
    int by = -1;  // the operator that finishes it
    int second = -1;  // the other product of a gated activation
    int residual = -1;  // value that is added
  };

  // Decides which products are finished by which operators, and which rotations and norms belong to an attention.
  void plan_fusions() {
    finish_.resize(graph_.operators.size());
    for (size_t i = 0; i < graph_.operators.size(); i++) {
      const Operator &o = graph_.operators[i];
      if (o.kind == OperatorKind::attention) {
        for (size_t j = 0; j < 2; j++) fuse_into_attention(o.inputs[j]);
      }
      if (o.kind == OperatorKind::elementwise) plan_elementwise(static_cast<int>(i), o);
    }
  }

  void plan_elementwise(int i, const Operator &o) {
    if (o.elementwise.kind == ElementwiseKind::activation) {
      const int product = only_source(o.inputs[0], OperatorKind::linear);
      if (product >= 0) finish_[at(product)] = {i, -1, -1}, done_[at(i)] = true;
    } else if (o.elementwise.kind == ElementwiseKind::gated_activation) {
      const int gate = only_source(o.inputs[0], OperatorKind::linear),
                up = only_source(o.inputs[1], OperatorKind::linear);
      if (gate < 0 || up < 0 || !same_product_shape(gate, up)) return;
      finish_[at(gate)] = {i, up, -1};
      done_[at(i)] = done_[at(up)] = true;
    } else if (o.elementwise.kind == ElementwiseKind::add) {
      for (size_t j = 0; j < 2; j++) {
        const int product = only_source(o.inputs[j], OperatorKind::linear), other = o.inputs[1 - j];
        // The other addend must already exist when the product runs.
        if (product < 0 || finish_[at(product)].by >= 0 || producer_[at(other)] > product) continue;
        if (done_[at(product)]) continue;
        finish_[at(product)] = {i, -1, other};
        done_[at(i)] = true;
        return;
      }
    }
  }

  bool same_product_shape(int a, int b) const {
    return op(a).inputs[0] == op(b).inputs[0] && op(a).matrix->rows == op(b).matrix->rows && form_of(a) == form_of(b);
  }

  void fuse_into_attention(int v) {
    const int rope = only_source(v, OperatorKind::rope);
    if (rope >= 0) done_[at(rope)] = true;
    const int norm = head_norm(rope >= 0 ? op(rope).inputs[0] : v, rope);
    if (norm >= 0) done_[at(norm)] = true;
  }
  int head_norm(int v, int rope) const {
    const int norm = only_source(v, OperatorKind::norm);
    if (norm < 0 || op(norm).norm.kind != Norm::rms) return -1;
    const int64_t head_dim = rope >= 0 ? op(rope).head_dim : static_cast<int64_t>(op(norm).norm.weight->size());
    return static_cast<int64_t>(op(norm).norm.weight->size()) == head_dim && value(v).width % head_dim == 0 ? norm : -1;
  }

  void schedule(int i) {
    const Operator &o = op(i);
    done_[at(i)] = true;
    switch (o.kind) {
      case OperatorKind::input: schedule_.input_buffers.push_back(buffer(o.outputs[0])); return;
      case OperatorKind::embed: return add(make_embed(o.matrix, o.index, buffer(o.outputs[0])));
      case OperatorKind::choose_rows:
        return add(make_choose_rows(buffer(o.inputs[0]), value(o.inputs[0]).width, buffer(o.outputs[0])));
      case OperatorKind::linear: return schedule_products(i);
      case OperatorKind::norm: return schedule_norm(o);
      case OperatorKind::rope: {
        const Value &x = value(o.inputs[0]);
        return add(make_rope(buffer(o.inputs[0]), buffer(o.outputs[0]), x.width, o.head_dim, o.rope, x.rows));
      }
      case OperatorKind::attention: return schedule_attention(o);
      case OperatorKind::elementwise: {
        const Value &x = value(o.inputs[0]);
        const int second = o.inputs.size() > 1 ? buffer(o.inputs[1]) : -1;
        return add(make_elementwise(o.elementwise, buffer(o.inputs[0]), second, buffer(o.outputs[0]), x.width, x.rows));
      }
      case OperatorKind::route: return schedule_route(o);
      case OperatorKind::experts: return schedule_experts(o);
      case OperatorKind::choose: {
        const Value &x = value(o.inputs[0]);
        const int ids = buffer(o.outputs[0]), weights = buffer(o.outputs[1]);
        return add(make_route(buffer(o.inputs[0]), x.width, o.top_k, true, ids, weights, x.rows));
      }
      case OperatorKind::pool:
        return add(make_pool(o.pooling, buffer(o.inputs[0]), value(o.inputs[0]).width, buffer(o.outputs[0])));
      case OperatorKind::memory: return schedule_memory(o);
      case OperatorKind::low_rank: return schedule_low_rank(i);
    }
  }

  // A norm that only products read is done where their input is prepared.
  void schedule_norm(const Operator &o) {
    const int y = o.outputs[0];
    bool fused = uses_[at(y)] > 0;
    int readers = 0;
    for (const Operator &reader : graph_.operators) {
      if (reader.kind != OperatorKind::linear && reader.kind != OperatorKind::route) {
        if (std::count(reader.inputs.begin(), reader.inputs.end(), y) > 0) fused = false;
      } else if (reader.inputs[0] == y) {
        readers++;
      }
    }
    if (fused && readers == uses_[at(y)]) {
      pending_norm_.emplace_back(y, &o);
      return;
    }
    add(make_norm(o.norm, buffer(o.inputs[0]), buffer(y), value(y).width, value(y).rows));
  }

  // The product that makes the last output, for chosen rows, where there are bounds on it and nothing else is done to
  // it.
  void find_head() {
    if (graph_.outputs.empty()) return;
    const int v = graph_.outputs.back(), i = only_source(v, OperatorKind::linear);
    if (i < 0 || value(v).rows != Rows::chosen || finish_[at(i)].by >= 0 || op(i).bias) return;
    if (form_of(i).form == Form::int15 && has_weight_lengths(*op(i).matrix)) head_ = i;
  }

  void schedule_argmax(int i, int fine) {
    const Rows rows = value(op(i).outputs[0]).rows;
    const int coarse = prepared(op(i).inputs[0], coarse_form(i));
    const int margins = float_buffer(rows, 1), found = float_buffer(rows, argmax_state_floats(threads_));
    schedule_.argmax_buffer = float_buffer(rows, 1);
    for (auto &task : make_argmax({op(i).matrix, fine, coarse, rows}, margins, found, schedule_.argmax_buffer))
      add(std::move(task));
  }

  // The buffer with `x` in that form; made by a separate task, once for all products, whatever forms they want.
  int prepared(int x, const PreparedForm &form) {
    for (const Prepared &p : prepared_) {
      if (p.value == x && p.form == form) return p.buffer;
    }
    int readers;
    std::vector<PreparedForm> forms = forms_of(x, &readers);
    if (std::find(forms.begin(), forms.end(), form) == forms.end()) forms.push_back(form);  // a router's
    std::vector<Target> targets;
    for (const PreparedForm &wanted : forms) {
      targets.push_back({input_buffer(value(x).rows, wanted), wanted});
      prepared_.push_back({x, wanted, targets.back().buffer});
    }
    Norm norm;
    int source = x;
    for (const auto &[normed, o] : pending_norm_) {
      if (normed == x) norm = o->norm, source = o->inputs[0];
    }
    add(make_prepare(norm, buffer(source), value(x).width, targets, value(x).rows));
    return prepared(x, form);
  }

  Product make_product(int i) {
    const Operator &o = op(i);
    const Finish &finish = finish_[at(i)];
    Product product;
    product.matrix = o.matrix;
    product.bias = o.bias;
    product.y = target(finish.by >= 0 ? op(finish.by).outputs[0] : o.outputs[0], finish.residual < 0);
    if (finish.by < 0) return product;
    product.activated = op(finish.by).elementwise.kind != ElementwiseKind::add;
    product.activation = op(finish.by).elementwise.activation;
    if (finish.second >= 0) {
      product.second = op(finish.second).matrix;
      product.second_bias = op(finish.second).bias;
    }
    if (finish.residual >= 0) product.residual = buffer(finish.residual);
    return product;
  }

  // All products of the same rows in the same form run as one task.
  void schedule_products(int i) {
    const int x = op(i).inputs[0];
    const PreparedForm form = form_of(i);
    const int input = prepared(x, form);
    if (i == head_) {
      add(make_products({make_product(i)}, input, form, value(x).rows, true));
      return schedule_argmax(i, input);
    }
    std::vector<Product> products{make_product(i)};
    for (int j = i + 1; j < static_cast<int>(graph_.operators.size()); j++) {
      const Operator &o = op(j);
      if (done_[at(j)] || j == head_ || o.kind != OperatorKind::linear || o.inputs[0] != x || !(form_of(j) == form))
        continue;
      const int residual = finish_[at(j)].residual;
      if (residual >= 0 && producer_[at(residual)] > i) continue;  // what it adds may not exist yet
      done_[at(j)] = true;
      products.push_back(make_product(j));
    }
    add(make_products(std::move(products), input, form, value(x).rows));
  }

  // The adapters of all weights that read the same rows are applied together, after their products.
  void schedule_low_rank(int i) {
    const int x = op(i).inputs[1];
    const Rows rows = value(x).rows;
    std::vector<Adapted> adapted;
    for (int j = i; j < static_cast<int>(graph_.operators.size()); j++) {
      const Operator &o = op(j);
      if (o.kind != OperatorKind::low_rank || o.inputs[1] != x || (j > i && done_[at(j)])) continue;
      const int product = producer_[at(o.inputs[0])];
      if (!done_[at(product)]) {
        if (op(product).kind != OperatorKind::linear || op(product).inputs[0] != x) continue;
        schedule(product);
      }
      done_[at(j)] = true;
      const int y = buffer_[at(o.outputs[0])] = buffer(o.inputs[0]);
      adapted.push_back({o.low_rank, y});
    }
    const int inner = float_buffer(rows, inner_floats(adapted, rows));
    for (auto &task : make_low_rank(adapted, buffer(x), inner, rows)) add(std::move(task));
  }

  void schedule_attention(const Operator &o) {
    Attention attention = o.attention;
    int inputs[2];
    for (size_t j = 0; j < 2; j++) {
      int v = o.inputs[j];
      const int rope = only_source(v, OperatorKind::rope);
      if (rope >= 0) (j == 0 ? attention.query_rope : attention.key_rope) = op(rope).rope, v = op(rope).inputs[0];
      const int norm = head_norm(v, rope);
      if (norm >= 0) (j == 0 ? attention.query_norm : attention.key_norm) = op(norm).norm, v = op(norm).inputs[0];
      inputs[j] = buffer(v);
    }
    attention.tile_set = tile_set(attention);
    BufferSpec partials;
    partials.kind = BufferSpec::partials;
    const int k = inputs[1], v = buffer(o.inputs[2]), stored = float_buffer(Rows::tokens, 0, 1);
    const int partial = add_buffer(partials);
    // A head's results must be whole blocks of any form.
    const Target y = target(o.outputs[0], attention.head_dim % 32 == 0);
    add(make_store(attention, k, v, stored));
    if (attention.window == 0) add(make_naming(attention, inputs[0], stored, partial));
    add(make_attend(attention, inputs[0], k, v, stored, partial, y));
    add(make_merge(attention, partial, y));
  }

  int tile_set(const Attention &attention) {
    auto &sets = schedule_.attentions;
    for (size_t i = 0; i < sets.size(); i++) {
      if (sets[i].window == attention.window && sets[i].heads == attention.heads &&
          sets[i].kv_heads == attention.kv_heads && sets[i].group == attention.group) {
        return static_cast<int>(i);
      }
    }
    sets.push_back(attention);
    return static_cast<int>(sets.size()) - 1;
  }

  int float_buffer(Rows rows, int64_t row_floats, int64_t extra_floats = 0) {
    BufferSpec spec;
    spec.rows = rows;
    spec.row_floats = row_floats;
    spec.extra_floats = extra_floats;
    return add_buffer(spec);
  }

  void schedule_route(const Operator &o) {
    const int x = o.inputs[0];
    const PreparedForm form = prepared_form(*o.matrix);
    const int input = prepared(x, form);
    const int64_t experts = o.matrix->rows;
    Product product;
    product.matrix = o.matrix;
    const int logits = float_buffer(value(x).rows, experts);
    product.y.buffer = logits;
    add(make_products({product}, input, form, value(x).rows));
    add(make_route(logits, experts, o.top_k, o.normalise, buffer(o.outputs[0]), buffer(o.outputs[1]), value(x).rows));
  }

  void schedule_memory(const Operator &o) {
    const Rows rows = value(o.inputs[0]).rows;
    const bool routed = o.inputs.size() > 1;
    const int ids = routed ? buffer(o.inputs[1]) : -1, weights = routed ? buffer(o.inputs[2]) : -1;
    const int partials = float_buffer(rows, 0, memory_partial_floats(*o.memory)), y = buffer(o.outputs[0]);
    const int filled = float_buffer(rows, 0, 1);
    add(make_fill(o.memory, ids, rows, filled));
    add(make_read(o.memory, buffer(o.inputs[0]), ids, weights, rows, filled, partials, y));
    add(make_join(o.memory, ids, weights, rows, partials, y));
  }

  void schedule_experts(const Operator &o) {
    const Experts &experts = *o.experts;
    const Rows rows = value(o.inputs[0]).rows;
    const int order = float_buffer(rows, experts.top_k, static_cast<int64_t>(experts.gate.size()) + 1);
    const int gathered = input_buffer(rows, prepared_form(*experts.gate[0]), experts.top_k);
    const int inner = input_buffer(rows, prepared_form(*experts.down[0]), experts.top_k);
    const int outer = float_buffer(rows, experts.top_k * experts.down[0]->rows);
    add(make_sort_rows(o.experts, buffer(o.inputs[1]), order, rows));
    add(make_gather(o.experts, buffer(o.inputs[0]), order, gathered, rows));
    add(make_gated_experts(o.experts, gathered, order, inner, rows));
    add(make_down_experts(o.experts, inner, order, outer, rows));
    add(make_combine(o.experts, outer, order, buffer(o.inputs[2]), buffer(o.outputs[0]), rows));
  }

  struct Prepared {
    int value;
    PreparedForm form;
    int buffer;
  };

  const Graph &graph_;
  const int threads_;
  int head_ = -1;  // the product whose largest results can be found without all of them
  Schedule schedule_;
  std::vector<bool> done_, precise_;  // by operator
  std::vector<int> producer_, uses_, buffer_;
  std::vector<Finish> finish_;
  std::vector<Prepared> prepared_;
  std::vector<std::pair<int, const Operator *>> pending_norm_;
};

}  // namespace

Schedule make_schedule(const Graph &graph, int threads) { return Scheduler(graph, threads).run(); }

}  // namespace mnemos
