// Attention to a memory bank. A row reads spans: the shared chapters, then those chosen for it, or the whole bank.
// Every block of a span is attended to by itself and merged in order, so that a row's result depends on nothing else,
// and the blocks of a few rows may be shared out among threads.
#include "program/memory.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "program/tasks.h"

namespace mnemos {
namespace {

constexpr int64_t most_split_rows = 4;
constexpr int64_t most_queries = 96;  // rows of a tile times heads that share keys

struct Operands {
  int q, ids, weights;  // ids and weights: -1 without chapters
};

class MemoryTask : public Task {
 public:
  MemoryTask(std::shared_ptr<const MemoryAttention> memory, Operands operands, Rows rows)
      : memory_(std::move(memory)), m_(*memory_), operands_(operands), rows_(rows) {
    const int64_t span = m_.span_rows(), slots = m_.bank->cache().cell().slots;
    for (int64_t page = 0; page < m_.bank->cache().pages; page++) pages_.push_back(static_cast<int32_t>(page));
    for (int64_t begin = 0; begin < m_.rows; begin += span) {
      for (int64_t first = 0; first < span; first += attention_block)
        blocks_.push_back(
            {first, first, std::min(first + attention_block, span) - 1, pages_.data() + (begin + first) / slots});
    }
  }

 protected:
  int64_t group() const { return m_.heads / m_.kv_heads; }
  int64_t stride() const { return m_.bank->cache().cell().value_stride; }
  int64_t parts() const { return m_.spans() * m_.span_blocks(); }
  int64_t partial_floats() const { return group() * (stride() + 2); }
  bool splits(const Step &step) const { return step.rows(rows_) <= most_split_rows; }
  float *partial(const Step &step, int buffer, int64_t row, int64_t head, int64_t part, int thread) const {
    return step.data(buffer, thread) + ((row * m_.kv_heads + head) * parts() + part) * partial_floats();
  }

  int64_t chapter(const Step &step, int64_t row, int64_t span, int thread) const {
    if (span < m_.shared || m_.chapters == 0) return span;
    return m_.shared + step.data<int32_t>(operands_.ids, thread)[row * m_.chosen + span - m_.shared];
  }
  // What multiplies the keys and values of a span, and the result of a span that has a softmax of its own.
  float share(const Step &step, int64_t row, int64_t span, int thread) const {
    if (m_.chapters == 0 || m_.separate) return 1;
    const float *weights = step.data(operands_.weights, thread) + row * m_.chosen;
    if (m_.shared == 0) return weights[span];
    float total = static_cast<float>(m_.shared);
    for (int64_t i = 0; i < m_.chosen; i++) total += m_.scaling * weights[i];
    return (span < m_.shared ? 1 : m_.scaling * weights[span - m_.shared]) / total;
  }
  float result_share(const Step &step, int64_t row, int64_t span, int thread) const {
    if (m_.chapters == 0 || !m_.separate || span < m_.shared) return 1;
    return m_.scaling * step.data(operands_.weights, thread)[row * m_.chosen + span - m_.shared];
  }
  // Whether a softmax ends with this span.
  bool ends(int64_t span) const {
    return span == m_.spans() - 1 || (m_.separate && m_.chapters > 0 && span >= m_.shared - 1);
  }

  // What a tile of rows with the same chapters and shares needs besides its state.
  struct Work {
    float *queries, *partial, *result, *scores, *expanded;
    float most[max_tile_rows], total[max_tile_rows];
    int64_t first[max_tile_rows], last[max_tile_rows];
  };
  // What the rows of a tile have attended to so far; `result` is not divided by `total` yet.
  struct State {
    float *result, *most, *total;
  };
  int64_t work_floats(int64_t queries) const {
    return queries * (score_stride + 3 * stride()) + expanded_floats(m_.bank->cache().cell());
  }
  void take(Work &work, float *scratch, int64_t queries) const {
    work.queries = scratch;
    work.partial = work.queries + queries * stride();
    work.result = work.partial + queries * stride();
    work.scores = work.result + queries * stride();
    work.expanded = work.scores + queries * score_stride;
  }
  void load_queries(const Step &step, Work &work, int64_t row, int64_t rows, int64_t head, int64_t span,
                    int thread) const {
    const float *q = step.data(operands_.q, thread) + head * group() * m_.head_dim;
    const float factor = m_.scale * share(step, row, span, thread);
    for (int64_t r = 0; r < rows; r++) {
      for (int64_t g = 0; g < group(); g++) {
        float *into = work.queries + (r * group() + g) * stride();
        step.kernels->scale(q + (row + r) * m_.heads * m_.head_dim + g * m_.head_dim, factor, into, m_.head_dim);
      }
    }
  }
  // The blocks of a span that a row reads.
  const KeyBlock *blocks_of(const Step &step, int64_t row, int64_t span, int thread) const {
    return &blocks_[static_cast<size_t>(chapter(step, row, span, thread) * m_.span_blocks())];
  }
  // Attends to neighbouring blocks and merges each into what is in `state`. next: the keys that this thread reads then.
  void attend(const Step &step, Work &work, const State &state, int64_t rows, int64_t head, const KeyBlock *blocks,
              int64_t count, const NextKeys &next = {}) const {
    const int64_t queries = rows * group();
    AttentionTile tile{};
    tile.cell = &m_.bank->cache().cell();
    tile.cells = m_.bank->cache().cells(0, head);
    tile.page_bytes = m_.bank->cache().page_bytes();
    tile.blocks = blocks;
    tile.rows = queries;
    tile.first = work.first;
    tile.last = work.last;
    tile.queries = work.queries;
    tile.partial = work.partial;
    tile.result = state.result;
    tile.scores = work.scores;
    tile.expanded = work.expanded;
    tile.most = state.most;
    tile.total = state.total;
    tile.next = next;
    for (int64_t i = 0; i < queries; i++) work.first[i] = 0, work.last[i] = m_.span_rows() - 1;
    step.kernels->attend(tile, 0, count);
  }
  // Attends to one block: the result, maxima and sums of it alone are in `work`. Values are multiplied by the share.
  void attend_alone(const Step &step, Work &work, int64_t rows, int64_t head, const KeyBlock *block, float share,
                    const NextKeys &next = {}) const {
    const int64_t queries = rows * group();
    for (int64_t i = 0; i < queries; i++) work.most[i] = -INFINITY, work.total[i] = 0;
    attend(step, work, {work.result, work.most, work.total}, rows, head, block, 1, next);
    if (share != 1) step.kernels->scale(work.result, share, work.result, queries * stride());
  }

  const std::shared_ptr<const MemoryAttention> memory_;
  const MemoryAttention &m_;
  const Operands operands_;
  const Rows rows_;

 private:
  std::vector<int32_t> pages_;
  std::vector<KeyBlock> blocks_;  // of all spans
};

// Makes the keys and values that are read for the first time.
class FillTask : public MemoryTask {
 public:
  FillTask(std::shared_ptr<const MemoryAttention> memory, Operands operands, Rows rows, int filled)
      : MemoryTask(std::move(memory), operands, rows) {
    if (operands.ids >= 0) reads = {operands.ids};
    writes = {filled};
  }
  void plan(const Step &) override {
    needed_ = !m_.bank->complete();
    if (!needed_ && !released_) m_.bank->release_source();
    released_ = !needed_;
  }
  bool active(const Step &) const override { return needed_; }
  int64_t items(const Step &step) const override {
    if (!needed_) return 0;
    return splits(step) ? step.rows(rows_) * parts() : m_.bank->chunks();
  }
  int64_t scratch_bytes(const BatchView &, int) const override {
    return m_.bank->scratch_floats() * static_cast<int64_t>(sizeof(float));
  }
  void run(const Step &step, int64_t item, int thread) const override {
    int64_t chunk = item;
    if (splits(step)) {
      const int64_t part = item % parts();
      chunk =
          chapter(step, item / parts(), part / m_.span_blocks(), thread) * m_.span_blocks() + part % m_.span_blocks();
    } else if (!is_read(step, chunk / m_.span_blocks(), thread)) {
      return;
    }
    m_.bank->make(chunk, step.thread_scratch(thread));
  }

 private:
  bool is_read(const Step &step, int64_t chapter, int thread) const {
    if (m_.chapters == 0 || chapter < m_.shared) return true;
    const int32_t *ids = step.data<int32_t>(operands_.ids, thread), *end = ids + step.rows(rows_) * m_.chosen;
    return std::find(ids, end, static_cast<int32_t>(chapter - m_.shared)) != end;
  }

  bool needed_ = true, released_ = false;
};

class ReadTask : public MemoryTask {
 public:
  ReadTask(std::shared_ptr<const MemoryAttention> memory, Operands operands, Rows rows, int filled, int partials, int y)
      : MemoryTask(std::move(memory), operands, rows), partials_(partials), y_(y) {
    reads = {operands.q, filled};
    if (operands.ids >= 0) reads.push_back(operands.ids), reads.push_back(operands.weights);
    writes = {partials, y};
  }
  int64_t items(const Step &step) const override {
    const int64_t rows = step.rows(rows_);
    return splits(step) ? rows * m_.kv_heads * parts() : (rows + tile_rows() - 1) / tile_rows() * m_.kv_heads;
  }
  int64_t scratch_bytes(const BatchView &, int) const override {
    const int64_t queries = tile_rows() * group();
    return (work_floats(queries) + queries * (2 * stride() + 2)) * static_cast<int64_t>(sizeof(float));
  }

  void run(const Step &step, int64_t item, int thread) const override {
    if (splits(step)) return read_part(step, item, thread);
    const int64_t head = item % m_.kv_heads, first = item / m_.kv_heads * tile_rows();
    const int64_t end = std::min(first + tile_rows(), step.rows(rows_));
    for (int64_t row = first; row < end;) {
      int64_t next = row + 1;
      while (next < end && same_chapters(step, row, next, thread)) next++;
      read_rows(step, row, next - row, head, thread);
      row = next;
    }
  }

 private:
  int64_t tile_rows() const { return std::max<int64_t>(1, most_queries / group()); }

  bool same_chapters(const Step &step, int64_t a, int64_t b, int thread) const {
    if (m_.chapters == 0) return true;
    const size_t bytes = static_cast<size_t>(m_.chosen) * 4;
    const int32_t *ids = step.data<int32_t>(operands_.ids, thread);
    const float *weights = step.data(operands_.weights, thread);
    return std::memcmp(ids + a * m_.chosen, ids + b * m_.chosen, bytes) == 0 &&
           std::memcmp(weights + a * m_.chosen, weights + b * m_.chosen, bytes) == 0;
  }

  // The number of a part of what a row reads with a head of keys.
  struct Part {
    int64_t row, head, part;
  };
  Part part_of(int64_t item) const {
    return {item / parts() / m_.kv_heads, item / parts() % m_.kv_heads, item % parts()};
  }

  void read_part(const Step &step, int64_t item, int thread) const {
    const Part own = part_of(item);
    const auto [row, head, part] = own;
    const auto block_of = [&](const Part &p) {
      return blocks_of(step, p.row, p.part / m_.span_blocks(), thread) + p.part % m_.span_blocks();
    };
    NextKeys next{};
    if (item + 1 < items(step)) {  // most likely this thread's too
      const Part then = part_of(item + 1);
      const KeyBlock *coming = block_of(then);
      next = {m_.bank->cache().cells(0, then.head), coming, coming->first, coming->last};
    }
    Work work;
    take(work, step.thread_scratch(thread), group());
    load_queries(step, work, row, 1, head, part / m_.span_blocks(), thread);
    attend_alone(step, work, 1, head, block_of(own), share(step, row, part / m_.span_blocks(), thread), next);
    float *into = partial(step, partials_, row, head, part, thread);
    const int64_t values = group() * stride();
    std::memcpy(into, work.result, static_cast<size_t>(values) * sizeof(float));
    std::memcpy(into + values, work.most, static_cast<size_t>(group()) * sizeof(float));
    std::memcpy(into + values + group(), work.total, static_cast<size_t>(group()) * sizeof(float));
  }

  void read_rows(const Step &step, int64_t row, int64_t rows, int64_t head, int thread) const {
    const int64_t queries = rows * group();
    float *scratch = step.thread_scratch(thread);
    Work work;
    take(work, scratch, queries);
    float *sum = scratch + work_floats(tile_rows() * group()), *most = sum + queries * stride(),
          *total = most + queries;
    std::fill(most, most + queries, -INFINITY);
    std::fill(total, total + queries, 0.0f);
    float *y = step.data(y_, thread) + row * m_.heads * m_.head_dim + head * group() * m_.head_dim;
    bool begun = false;
    for (int64_t span = 0; span < m_.spans(); span++) {
      load_queries(step, work, row, rows, head, span, thread);
      const KeyBlock *blocks = blocks_of(step, row, span, thread);
      const float factor = share(step, row, span, thread);
      if (factor == 1) attend(step, work, {sum, most, total}, rows, head, blocks, m_.span_blocks());
      for (int64_t block = 0; factor != 1 && block < m_.span_blocks(); block++) {
        attend_alone(step, work, rows, head, blocks + block, factor);
        for (int64_t i = 0; i < queries; i++)
          step.kernels->merge(work.most[i], work.total[i], work.result + i * stride(), most + i, total + i,
                              sum + i * stride(), stride());
      }
      if (!ends(span)) continue;
      for (int64_t i = 0; i < queries; i++) {
        float *into = y + i / group() * m_.heads * m_.head_dim + i % group() * m_.head_dim;
        const float weight = result_share(step, row + i / group(), span, thread) / total[i];
        if (begun) {
          step.kernels->accumulate(sum + i * stride(), weight, into, m_.head_dim);
        } else {
          step.kernels->scale(sum + i * stride(), weight, into, m_.head_dim);
        }
        most[i] = -INFINITY, total[i] = 0;
      }
      begun = true;
    }
  }

  const int partials_, y_;
};

// Puts the parts of a few rows together.
class JoinTask : public MemoryTask {
 public:
  JoinTask(std::shared_ptr<const MemoryAttention> memory, Operands operands, Rows rows, int partials, int y)
      : MemoryTask(std::move(memory), operands, rows), partials_(partials), y_(y) {
    reads = {partials};
    if (operands.ids >= 0) reads.push_back(operands.weights);
    writes = {y};
  }
  bool active(const Step &step) const override { return splits(step); }
  int64_t items(const Step &step) const override { return active(step) ? step.rows(rows_) * m_.heads : 0; }
  int64_t scratch_bytes(const BatchView &, int) const override {
    return stride() * static_cast<int64_t>(sizeof(float));
  }

  void run(const Step &step, int64_t item, int thread) const override {
    const int64_t row = item / m_.heads, g = item % group(), head = item % m_.heads / group();
    float *sum = step.thread_scratch(thread), most = -INFINITY, total = 0;
    float *y = step.data(y_, thread) + item * m_.head_dim;
    bool begun = false;
    for (int64_t part = 0; part < parts(); part++) {
      const float *from = partial(step, partials_, row, head, part, thread), *numbers = from + group() * stride();
      step.kernels->merge(numbers[g], numbers[group() + g], from + g * stride(), &most, &total, sum, stride());
      const int64_t span = part / m_.span_blocks();
      if (part % m_.span_blocks() != m_.span_blocks() - 1 || !ends(span)) continue;
      const float factor = result_share(step, row, span, thread) / total;
      if (begun) {
        step.kernels->accumulate(sum, factor, y, m_.head_dim);
      } else {
        step.kernels->scale(sum, factor, y, m_.head_dim);
      }
      begun = true, most = -INFINITY, total = 0;
    }
  }

 private:
  const int partials_, y_;
};

class PoolTask : public Task {
 public:
  PoolTask(Pooling pooling, int x, int64_t width, int y) : p_(std::move(pooling)), x_(x), width_(width), y_(y) {
    reads = {x};
    writes = {y};
  }
  int64_t items(const Step &step) const override { return step.batch.sequences; }
  int64_t scratch_bytes(const BatchView &, int) const override { return width_ * static_cast<int64_t>(sizeof(double)); }

  void run(const Step &step, int64_t item, int thread) const override {
    const int64_t begin = step.batch.sequence_starts[item], end = step.batch.sequence_starts[item + 1];
    if (begin == end) return;
    const float *x = step.data(x_, thread) + begin * width_;
    float *y = step.data(y_, thread) + begin * width_;
    const int64_t rows = end - begin, position = step.batch.positions[begin];
    double *sums = step.thread_scratch<double>(thread);
    if (position == 0) {
      pool_prompt(x, rows, sums);
      for (int64_t i = 0; i < width_; i++) y[i] = static_cast<float>(sums[i]);
      for (int64_t r = 1; r < rows; r++) std::memcpy(y + r * width_, y, static_cast<size_t>(width_) * sizeof(float));
    } else if (!p_.windows) {
      std::memcpy(y, x, static_cast<size_t>(rows * width_) * sizeof(float));
    }
    for (int64_t r = 0; p_.windows && r < rows; r++) {
      float *kept = p_.windows->row(step.batch.states[item], p_.layer, position + r);
      std::memcpy(kept, x + r * width_, static_cast<size_t>(width_) * sizeof(float));
      if (position > 0) pool_window(step.batch.states[item], position + r, sums, y + r * width_);
    }
  }

 private:
  void pool_prompt(const float *x, int64_t rows, double *sums) const {
    std::fill(sums, sums + width_, 0.0);
    const int64_t first = p_.kind == PoolKind::rolling ? std::max<int64_t>(0, rows - p_.window) : 0;
    for (int64_t r = first; r < rows; r++) {
      double share = 1.0 / static_cast<double>(rows - first);
      if (p_.kind == PoolKind::sequence_rolling) {
        // Row r is in the windows that end at r to r + window - 1, each of which divides by its own length.
        share = 0;
        for (int64_t end = r; end < std::min(r + p_.window, rows); end++)
          share += 1.0 / static_cast<double>(std::min(end + 1, p_.window));
        share /= static_cast<double>(rows);
      }
      for (int64_t i = 0; i < width_; i++) sums[i] += share * static_cast<double>(x[r * width_ + i]);
    }
  }
  void pool_window(int64_t slot, int64_t position, double *sums, float *y) const {
    std::fill(sums, sums + width_, 0.0);
    const int64_t first = std::max<int64_t>(0, position - p_.window + 1);
    for (int64_t p = first; p <= position; p++) {
      const float *row = p_.windows->row(slot, p_.layer, p);
      for (int64_t i = 0; i < width_; i++) sums[i] += static_cast<double>(row[i]);
    }
    for (int64_t i = 0; i < width_; i++) y[i] = static_cast<float>(sums[i] / static_cast<double>(position - first + 1));
  }

  const Pooling p_;
  const int x_;
  const int64_t width_;
  const int y_;
};

}  // namespace

int64_t memory_partial_floats(const MemoryAttention &m) {
  return most_split_rows * m.heads * m.spans() * m.span_blocks() * (m.bank->cache().cell().value_stride + 2);
}

std::unique_ptr<Task> make_fill(std::shared_ptr<const MemoryAttention> memory, int ids, Rows rows, int filled) {
  return std::make_unique<FillTask>(std::move(memory), Operands{-1, ids, -1}, rows, filled);
}

std::unique_ptr<Task> make_read(std::shared_ptr<const MemoryAttention> memory, int q, int ids, int weights, Rows rows,
                                int filled, int partials, int y) {
  return std::make_unique<ReadTask>(std::move(memory), Operands{q, ids, weights}, rows, filled, partials, y);
}

std::unique_ptr<Task> make_join(std::shared_ptr<const MemoryAttention> memory, int ids, int weights, Rows rows,
                                int partials, int y) {
  return std::make_unique<JoinTask>(std::move(memory), Operands{-1, ids, weights}, rows, partials, y);
}

std::unique_ptr<Task> make_pool(Pooling pooling, int x, int64_t width, int y) {
  return std::make_unique<PoolTask>(std::move(pooling), x, width, y);
}

}  // namespace mnemos
