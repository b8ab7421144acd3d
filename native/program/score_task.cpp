#include <algorithm>

#include "program/attention_rows.h"
#include "program/recalling.h"
#include "program/tasks.h"

namespace mnemos {
namespace {

// Scores the pages of long texts for single rows. All threads share the pages of a head: there may be fewer heads that
// recall than threads.
class ScoreTask : public Task {
 public:
  ScoreTask(const Attention &attention, int q, int partials) : a_(attention), q_(q), partials_(partials) {
    reads = {q};
    writes = {partials};
  }
  bool active(const Step &step) const override { return step.tile_sets[a_.tile_set].scores > 0; }
  int64_t items(const Step &step) const override { return heads(step) * step.threads; }
  int64_t scratch_bytes(const BatchView &, int) const override {
    const int64_t group = group_of(a_);
    return group * (a_.cache->cell().value_stride + 1) * static_cast<int64_t>(sizeof(float)) +
           QuantizedRows::bytes(a_, group);
  }

  void run(const Step &step, int64_t item, int thread) const override {
    const TileSet &set = step.tile_sets[a_.tile_set];
    const int64_t part = item / heads(step), index = item % heads(step), head = index % a_.kv_heads;
    const QueryTile &query = set.tiles[static_cast<size_t>(index / a_.kv_heads)];
    const uint8_t *indices = a_.cache->index(a_.layer, head);
    if (query.scores < 0 || indices == nullptr) return;
    const int64_t group = group_of(a_), stride = a_.cache->cell().value_stride, t = query.token_begin;
    const int64_t position = step.batch.positions[t], pages = position / a_.cache->cell().slots;
    float *queries = step.thread_scratch(thread), *factors = queries + group * stride;
    const float *x = step.data(q_, thread) + t * a_.heads * a_.head_dim + head * group * a_.head_dim;
    for (int64_t g = 0; g < group; g++) {
      transform(step, a_.query_norm, rotation(a_.query_rope.get(), position), a_.scale, a_.head_dim, x + g * a_.head_dim,
                queries + g * stride);
    }
    const QuantizedRows rows(a_, queries, group, factors, factors + group);
    const int64_t begin = pages * part / step.threads, end = pages * (part + 1) / step.threads;
    const int32_t *table = step.batch.pages + step.tables[a_.group].new_pages[static_cast<size_t>(query.sequence)];
    float *scores = step.data(partials_, thread) + scores_begin(set, a_) + query.scores + head * group * pages;
    step.kernels->score_pages(a_.cache->index_layout(), {indices, table + begin, end - begin}, rows.queries(),
                              scores + begin, pages);
  }

 private:
  int64_t heads(const Step &step) const {
    return static_cast<int64_t>(step.tile_sets[a_.tile_set].tiles.size()) * a_.kv_heads;
  }

  const Attention a_;
  const int q_, partials_;
};

}  // namespace

std::unique_ptr<Task> make_score(const Attention &attention, int q, int partials) {
  return std::make_unique<ScoreTask>(attention, q, partials);
}

}  // namespace mnemos
