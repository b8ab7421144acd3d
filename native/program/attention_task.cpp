#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>

#include "program/attention_rows.h"
#include "program/recalling.h"
#include "program/tasks.h"

namespace mnemos {
namespace {

constexpr int64_t wanted_tile_rows = 96;
constexpr int64_t least_part = 64;  // pages of a text that are worth a thread's while

int64_t tile_tokens(const Attention &a) { return std::max<int64_t>(1, wanted_tile_rows / group_of(a)); }

int64_t first_visible(const Attention &a, int64_t position) {
  return a.window > 0 ? std::max<int64_t>(0, position - a.window + 1) : 0;
}

// Writes a head's results, which are weighted sums still to be divided by their totals, for `rows` tokens of one head
// of queries: that of token t at values + (t - token) * stride. The values are overwritten.
void write_head(const Step &step, const Attention &a, const Target &y, int64_t token, int64_t rows, int64_t head,
                float *values, int64_t stride, const float *totals, int64_t totals_stride, int thread) {
  const int64_t width = a.heads * a.head_dim, first = head * a.head_dim;
  for (int64_t r = 0; r < rows; r++) {
    float *into = y.form ? values + r * stride : step.data(y.buffer, thread) + (token + r) * width + first;
    step.kernels->scale(values + r * stride, 1.0f / totals[r * totals_stride], into, a.head_dim);
  }
  if (!y.form) return;
  const Input input =
      bind_input(*y.form->kernels, y.form->form, step.batch.tokens, width, step.data<uint8_t>(y.buffer, thread));
  prepare_columns(input, values - token * stride - first, stride, token, token + rows, first, first + a.head_dim);
}

int64_t sequence_of(const BatchView &batch, int64_t token) {
  const int32_t *end = batch.sequence_starts + batch.sequences + 1;
  return std::upper_bound(batch.sequence_starts, end, static_cast<int32_t>(token)) - batch.sequence_starts - 1;
}

// True if no sequence has several tokens: then the item that attends to a token's own block first stores it.
bool one_token_each(const BatchView &batch) {
  for (int64_t s = 0; s < batch.sequences; s++) {
    if (batch.sequence_starts[s + 1] - batch.sequence_starts[s] > 1) return false;
  }
  return true;
}

// What a tile's rows have recalled, from their sums before and after it.
class Effects {
 public:
  struct Effect {
    int64_t share, change;  // in units of 1 / recalled_unit
  };

  explicit Effects(const AttentionTile &tile) : stride_(tile.cell->value_stride) {}

  void note(const AttentionTile &tile) {
    moments_.push_back({{tile.most, tile.most + tile.rows},
                        {tile.total, tile.total + tile.rows},
                        {tile.result, tile.result + tile.rows * stride_}});
  }
  // When all is seen: the share of a row's attention that what it recalled has, and how far its result is from what it
  // would be if nothing had been recalled.
  Effect of_row(const AttentionTile &tile, int64_t r) const {
    const auto factor = [&](const Moment &moment) {  // of nothing seen, whose result is not set, none
      return moment.total[static_cast<size_t>(r)] > 0 ? std::exp(moment.most[static_cast<size_t>(r)] - tile.most[r])
                                                      : 0.0f;
    };
    const Moment &before = moments_[0], &after = moments_[1];
    const float all = tile.total[r], before_factor = factor(before), after_factor = factor(after);
    const float share =
        (after_factor * after.total[static_cast<size_t>(r)] - before_factor * before.total[static_cast<size_t>(r)]) /
        all;
    double square = 0;
    for (int64_t i = 0; i < tile.cell->head_dim; i++) {
      const auto at = static_cast<size_t>(r * stride_ + i);
      const float was = before_factor > 0 ? before_factor * before.result[at] : 0.0f;
      const float recalled = (after_factor * after.result[at] - was) / all;
      const float moved = recalled - share * tile.result[static_cast<int64_t>(at)] / all;
      square += static_cast<double>(moved) * moved;
    }
    const double change = std::sqrt(square) / std::max(1.0 - share, 1e-3);
    if (!(share > 0 && share <= 1 && change < 1e6)) return {0, 0};  // none where it is not a number
    return {static_cast<int64_t>(share * recalled_unit), static_cast<int64_t>(change * recalled_unit)};
  }

 private:
  struct Moment {
    std::vector<float> most, total, result;
  };
  const int64_t stride_;
  std::vector<Moment> moments_;
};

// Norms, rotates and stores the key of one token and key head, and stores its value.
void store_token(const Step &step, const Attention &a, const float *k, const float *v, int64_t sequence, int64_t t,
                 int64_t head, float *scratch) {
  const CellLayout &cell = a.cache->cell();
  const int64_t position = step.batch.positions[t], at = (t * a.kv_heads + head) * a.head_dim;
  const int64_t page =
      step.batch.pages[step.tables[a.group].new_pages[static_cast<size_t>(sequence)] + position / cell.slots];
  uint8_t *data = a.cache->cells(a.layer, head) + page * a.cache->page_bytes();
  transform(step, a.key_norm, rotation(a.key_rope.get(), position), 1.0f, a.head_dim, k + at, scratch);
  step.kernels->store_key(cell, data, position % cell.slots, scratch);
  step.kernels->store_value(cell, data, position % cell.slots, v + at);
  if (a.recall() != nullptr && position % cell.slots == cell.slots - 1) a.cache->index_page(a.layer, head, page);
}

class StoreTask : public Task {
 public:
  StoreTask(const Attention &attention, int k, int v, int stored) : a_(attention), k_(k), v_(v) {
    reads = {k, v};
    writes = {stored};
  }
  bool active(const Step &step) const override { return !step.tile_sets[a_.tile_set].one_token_each; }
  int64_t items(const Step &step) const override {
    return (step.batch.tokens + tokens_per_item - 1) / tokens_per_item * a_.kv_heads;
  }
  int64_t scratch_bytes(const BatchView &, int) const override {
    return a_.head_dim * static_cast<int64_t>(sizeof(float));
  }

  void run(const Step &step, int64_t item, int thread) const override {
    const int64_t first = item / a_.kv_heads * tokens_per_item;
    const int64_t together = a_.recall() != nullptr ? a_.cache->cell().slots : 2;
    const int64_t begin = run_begin(step.batch, first, together),
                  end = run_begin(step.batch, std::min(first + tokens_per_item, step.batch.tokens), together);
    if (begin == end) return;
    int64_t sequence = sequence_of(step.batch, begin);
    for (int64_t t = begin; t < end; t++) {
      while (step.batch.sequence_starts[sequence + 1] <= t) sequence++;
      store_token(step, a_, step.data(k_, thread), step.data(v_, thread), sequence, t, item % a_.kv_heads,
                  step.thread_scratch(thread));
    }
  }

 private:
  static constexpr int64_t tokens_per_item = 32;  // neighbours share the lines of their keys

  // The first token from t on that is not stored together with the one before it: two neighbours share words of the
  // cache, and a page is indexed by whoever stores its last key, after the others.
  static int64_t run_begin(const BatchView &batch, int64_t t, int64_t together) {
    const auto shares = [&] {
      return batch.positions[t] % together != 0 && batch.positions[t] == batch.positions[t - 1] + 1;
    };
    while (t > 0 && t < batch.tokens && shares()) t++;
    return t;
  }

  const Attention a_;
  const int k_, v_;
};

// The pages that a thread's own items read, in the order in which it will run them.
class AttentionAhead : public Ahead {
 public:
  void begin(const Step &step, const Attention &attention, int thread) {
    stop();
    const TileSet &set = step.tile_sets[attention.tile_set];
    if (!set.one_token_each || set.drops) return;  // prompts are bound by arithmetic there too
    const int64_t count = static_cast<int64_t>(set.tiles.size()) * attention.kv_heads;
    step_ = &step, attention_ = &attention;
    first_ = count * thread / step.threads, index_ = count * (thread + 1) / step.threads;
    page_ = page_end_ = nullptr;
    go_to(nullptr, 0, index_ > first_);
  }

 protected:
  void next() override {
    const CellLayout &cell = attention_->cache->cell();
    if (page_ == page_end_) {
      index_--;
      const QueryTile &query =
          step_->tile_sets[attention_->tile_set].tiles[static_cast<size_t>(index_ / attention_->kv_heads)];
      const int64_t position = step_->batch.positions[query.token_begin];
      const KeyBlock &first = step_->tables[attention_->group].blocks[static_cast<size_t>(query.block_begin)];
      const KeyBlock &last = step_->tables[attention_->group].blocks[static_cast<size_t>(query.block_end - 1)];
      page_ = first.pages + (std::max(first_visible(*attention_, position), first.first) - first.first) / cell.slots;
      page_end_ = last.pages + (std::min(position, last.last) - last.first) / cell.slots + 1;
    }
    const uint8_t *cells = attention_->cache->cells(attention_->layer, index_ % attention_->kv_heads);
    const int64_t page = *page_++;
    go_to(cells + page * attention_->cache->page_bytes(), cell.bytes, page_ != page_end_ || index_ > first_);
  }

 private:
  const Step *step_ = nullptr;
  const Attention *attention_ = nullptr;
  const int32_t *page_ = nullptr, *page_end_ = nullptr;  // in the batch's page tables
  int64_t first_ = 0, index_ = 0;
};

class AttendTask : public Task {
 public:
  AttendTask(const Attention &attention, int q, int k, int v, int stored, int partials, const Target &y)
      : a_(attention), q_(q), k_(k), v_(v), partials_(partials), y_(y) {
    reads = {q, k, v, stored};
    writes = {partials, y.buffer};
  }
  int64_t items(const Step &step) const override {
    return static_cast<int64_t>(step.tile_sets[a_.tile_set].tiles.size()) * a_.kv_heads;
  }
  int64_t scratch_bytes(const BatchView &batch, int) const override {
    const int64_t rows = tile_tokens(a_) * group_of(a_);
    const CellLayout &cell = a_.cache->cell();
    const int64_t floats = rows * (score_stride + 3 * cell.value_stride) + expanded_floats(cell);
    const int64_t moved = a_.recall() != nullptr ? rows * cell.value_stride : 0;  // queries
    return (floats + moved) * static_cast<int64_t>(sizeof(float)) + Choosing::bytes(a_, batch) +
           Gathered::bytes(a_, batch);
  }

  bool fetches_ahead() const override { return true; }
  void fetch_ahead(const Step &step, int thread) const override {
    static_cast<AttentionAhead &>(*step.ahead[thread]).begin(step, a_, thread);
  }

  void run(const Step &step, int64_t item, int thread) const override {
    // A thread's own tiles are those of the rows that it has in other tasks. Long ones come last in a prompt, so it
    // takes them first.
    const TileSet &set = step.tile_sets[a_.tile_set];
    const int64_t count = items(step), owner = ((item + 1) * step.threads - 1) / count;
    const int64_t begin = count * owner / step.threads, index = begin + count * (owner + 1) / step.threads - 1 - item;
    const QueryTile &query = tile_at(set, index);
    const int64_t head = index % a_.kv_heads;
    if (set.one_token_each &&
        (query.drops || step.batch.positions[query.token_begin] <= block_at(step, query.block_end - 1).last)) {
      store_token(step, a_, step.data(k_, thread), step.data(v_, thread), query.sequence, query.token_begin, head,
                  step.thread_scratch(thread));
    }
    run_head(step, query, head, index > begin ? first_keys(step, index - 1) : NextKeys{}, thread);
  }

 private:
  static constexpr int64_t ahead = 2;  // tokens whose queries are prefetched before they are needed

  // The heads of a tile are adjacent, as they are in a page.
  const QueryTile &tile_at(const TileSet &set, int64_t index) const {
    return set.tiles[static_cast<size_t>(index / a_.kv_heads)];
  }

  const KeyBlock &block_at(const Step &step, int64_t number) const {
    return step.tables[a_.group].blocks[static_cast<size_t>(number)];
  }

  // The first positions that the part with this index attends to.
  NextKeys first_keys(const Step &step, int64_t index) const {
    const QueryTile &query = tile_at(step.tile_sets[a_.tile_set], index);
    if (query.drops) return {};
    const KeyBlock &block = block_at(step, query.block_begin);
    return {a_.cache->cells(a_.layer, index % a_.kv_heads), &block,
            std::max(block.first, first_visible(a_, step.batch.positions[query.token_begin])),
            std::min<int64_t>(block.last, step.batch.positions[query.token_end - 1])};
  }

  void run_head(const Step &step, const QueryTile &query, int64_t head, const NextKeys &next, int thread) const {
    const CellLayout &cell = a_.cache->cell();
    const int64_t group = group_of(a_), stride = cell.value_stride;
    int64_t first[max_tile_rows], last[max_tile_rows];
    float most[max_tile_rows], total[max_tile_rows];
    AttentionTile tile{};
    tile.cell = &cell;
    tile.cells = a_.cache->cells(a_.layer, head);
    tile.page_bytes = a_.cache->page_bytes();
    tile.blocks = step.tables[a_.group].blocks.data();
    tile.rows = (query.token_end - query.token_begin) * group;
    tile.first = first;
    tile.last = last;
    tile.softcap = a_.softcap;
    tile.next = next;
    float *queries = step.thread_scratch(thread);
    tile.queries = queries;
    tile.partial = queries + tile.rows * stride;
    tile.result = tile.partial + tile.rows * stride;
    tile.scores = tile.result + tile.rows * stride;
    tile.expanded = tile.scores + tile.rows * score_stride;
    tile.most = most;
    tile.total = total;
    const float *rows = step.data(q_, thread) + head * group * a_.head_dim;
    const int64_t width = a_.heads * a_.head_dim;
    for (int64_t r = 0; r < tile.rows; r++) {
      const int64_t t = query.token_begin + r / group;
      if (r % group == 0 && t + ahead < query.token_end) {
        for (int64_t i = 0; i < group * a_.head_dim; i += 16) __builtin_prefetch(rows + (t + ahead) * width + i);
      }
      last[r] = step.batch.positions[t];
      first[r] = first_visible(a_, last[r]);
      most[r] = -INFINITY;
      total[r] = 0;
      float *row = queries + r * stride;
      transform(step, a_.query_norm, rotation(a_.query_rope.get(), last[r]), a_.scale, a_.head_dim,
                rows + t * width + r % group * a_.head_dim, row);
    }
    if (query.drops) {
      attend_recalled(step, query, head, tile, first, last, thread);
    } else {
      step.kernels->attend(tile, query.block_begin, query.block_end);
    }
    query.split < 0 ? write_result(step, query, head, tile, thread) : write_partial(step, query, head, tile, thread);
  }

  // Attends to the sinks, to what each token recalls and to the window, in this order. Blocks do not reach from one to
  // the next. `first` and `last` are the tile's.
  void attend_recalled(const Step &step, const QueryTile &query, int64_t head, AttentionTile &tile, int64_t *first,
                       int64_t *last, int thread) const {
    const Recall &recall = *a_.recall();
    const Sight sight = sight_of(step.batch, *a_.cache, query.sequence);
    const int64_t slots = a_.cache->cell().slots, page = step.batch.positions[query.token_begin] / slots;
    const bool recalls = a_.cache->index(a_.layer, head) != nullptr;
    const int64_t window = page + 1 - sight.window - (recalls ? 0 : sight.recalled);
    const int32_t *pages = step.batch.pages + step.tables[a_.group].new_pages[static_cast<size_t>(query.sequence)];
    thread_local std::vector<KeyBlock> blocks;
    const auto attend = [&](AttentionTile &part) {
      part.blocks = blocks.data();
      step.kernels->attend(part, 0, static_cast<int64_t>(blocks.size()));
      blocks.clear();
    };
    const auto see = [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; p++) add_page(blocks, p, pages + p, slots);
    };
    tile.next = NextKeys{};
    for (int64_t r = 0; r < tile.rows; r++) first[r] = 0;
    float *moved = tile.expanded + expanded_floats(*tile.cell);
    // Pages that are too far back are attended to one by one, with queries that are rotated as if they were nearer.
    const auto is_far = [&](int64_t n) { return a_.query_rope && recall.farthest > 0 && page - n > recall.farthest; };
    const auto attend_far = [&](AttentionTile &part, int64_t row, int64_t n, const int32_t *place) {
      const float *by = a_.query_rope->multiple(n + recall.farthest);
      const int64_t half = a_.query_rope->half(), group = group_of(a_), width = a_.heads * a_.head_dim;
      const float *rows = step.data(q_, thread) + query.token_begin * width + head * group * a_.head_dim;
      for (int64_t r = row; r < row + part.rows; r++) {
        transform(step, a_.query_norm, {by, by + half, half}, a_.scale, a_.head_dim,
                  rows + r / group * width + r % group * a_.head_dim, moved + (r - row) * tile.cell->value_stride);
      }
      const float *queries = part.queries;
      part.queries = moved;
      add_page(blocks, n, place, slots);
      attend(part);
      part.queries = queries;
    };
    int64_t near_sinks = 0;
    for (; near_sinks < sight.sinks && is_far(near_sinks); near_sinks++)
      attend_far(tile, 0, near_sinks, pages + near_sinks);
    if (near_sinks < sight.sinks) {
      see(near_sinks, sight.sinks);
      attend(tile);
    }
    std::optional<Effects> effects;
    if (recall.measured && recalls && sight.recalled > 0) effects.emplace(tile);
    if (recalls && sight.recalled > 0) {
      if (effects) effects->note(tile);
      float *free = moved + tile.rows * tile.cell->value_stride;
      const Choosing choosing(step, a_, step.data(partials_, thread), query, head, free);
      const int64_t group = group_of(a_);
      std::optional<Gathered> gathered;
      if (a_.cache->spill() != nullptr) gathered.emplace(a_, sight, head, choosing.end());
      for (int64_t r = 0; r < tile.rows; r += group) {
        AttentionTile part = tile;
        part.rows = group;
        part.first = first + r, part.last = last + r;
        part.queries = tile.queries + r * tile.cell->value_stride;
        part.result = tile.result + r * tile.cell->value_stride;
        part.most = tile.most + r, part.total = tile.total + r;
        const int32_t *chosen = choosing.choose(r / group);
        const bool apart = gathered && std::any_of(chosen, chosen + sight.recalled,
                                                   [&](int32_t n) { return a_.cache->spill()->holds(pages[n]); });
        const int32_t *places = apart ? gathered->gather(pages, chosen) : nullptr;
        if (apart) part.cells = gathered->cells(), part.page_bytes = a_.cache->cell().bytes;
        const auto place = [&](int64_t i) { return apart ? places + i : pages + chosen[i]; };
        int64_t i = 0;
        for (; i < sight.recalled && is_far(chosen[i]); i++) attend_far(part, r, chosen[i], place(i));
        for (; i < sight.recalled; i++) add_page(blocks, chosen[i], place(i), slots);
        if (!blocks.empty()) attend(part);
      }
      if (effects) effects->note(tile);
    }
    see(window, page + 1);
    attend(tile);
    if (!effects) return;
    for (int64_t g = 0; g < group_of(a_); g++) {
      Effects::Effect sum{0, 0};
      for (int64_t r = g; r < tile.rows; r += group_of(a_)) {
        const Effects::Effect own = effects->of_row(tile, r);
        sum.share += own.share, sum.change += own.change;
      }
      a_.cache->count_recalled(a_.layer, head, g, sum.share, sum.change, tile.rows / group_of(a_));
    }
  }

  void write_result(const Step &step, const QueryTile &query, int64_t head, const AttentionTile &tile,
                    int thread) const {
    const int64_t group = group_of(a_), stride = tile.cell->value_stride;
    for (int64_t g = 0; g < group; g++) {
      write_head(step, a_, y_, query.token_begin, query.token_end - query.token_begin, head * group + g,
                 tile.result + g * stride, group * stride, tile.total + g, group, thread);
    }
  }

  void write_partial(const Step &step, const QueryTile &query, int64_t head, const AttentionTile &tile,
                     int thread) const {
    const int64_t values = tile.rows * tile.cell->value_stride;
    float *partial = step.data(partials_, thread) + (query.split * a_.kv_heads + head) * partial_floats(a_);
    std::memcpy(partial, tile.result, static_cast<size_t>(values) * sizeof(float));
    std::memcpy(partial + values, tile.most, static_cast<size_t>(tile.rows) * sizeof(float));
    std::memcpy(partial + values + tile.rows, tile.total, static_cast<size_t>(tile.rows) * sizeof(float));
  }

  const Attention a_;
  const int q_, k_, v_, partials_;
  const Target y_;
};

// Tiles of one token that were split follow each other, one for each block.
class MergeTask : public Task {
 public:
  MergeTask(const Attention &attention, int partials, const Target &y) : a_(attention), partials_(partials), y_(y) {
    reads = {partials};
    writes = {y.buffer};
  }
  bool active(const Step &step) const override { return step.tile_sets[a_.tile_set].partials > 0; }
  int64_t items(const Step &step) const override {
    return active(step) ? static_cast<int64_t>(step.tile_sets[a_.tile_set].tiles.size()) * a_.kv_heads : 0;
  }
  int64_t scratch_bytes(const BatchView &, int) const override {
    return a_.cache->cell().value_stride * static_cast<int64_t>(sizeof(float));
  }

  void run(const Step &step, int64_t item, int thread) const override {
    const auto &tiles = step.tile_sets[a_.tile_set].tiles;
    const int64_t head = item % a_.kv_heads, index = item / a_.kv_heads;
    const QueryTile &first = tiles[static_cast<size_t>(index)];
    const bool begins = index == 0 || tiles[static_cast<size_t>(index - 1)].sequence != first.sequence;
    if (first.split < 0 || !begins) return;
    int64_t count = 1;
    while (index + count < static_cast<int64_t>(tiles.size()) &&
           tiles[static_cast<size_t>(index + count)].sequence == first.sequence) {
      count++;
    }
    for (int64_t r = 0; r < group_of(a_); r++) merge_row(step, first, count, head, r, thread);
  }

 private:
  void merge_row(const Step &step, const QueryTile &first, int64_t count, int64_t head, int64_t r, int thread) const {
    const int64_t stride = a_.cache->cell().value_stride, group = group_of(a_);
    float *result = step.thread_scratch(thread);
    float most = -INFINITY, total = 0;
    for (int64_t i = 0; i < count; i++) {
      const float *partial =
          step.data(partials_, thread) + ((first.split + i) * a_.kv_heads + head) * partial_floats(a_);
      const float *numbers = partial + group * stride;
      step.kernels->merge(numbers[r], numbers[group + r], partial + r * stride, &most, &total, result, stride);
    }
    write_head(step, a_, y_, first.token_begin, 1, head * group + r, result, stride, &total, 1, thread);
  }

  const Attention a_;
  const int partials_;
  const Target y_;
};

}  // namespace

std::unique_ptr<Task> make_store(const Attention &attention, int k, int v, int stored) {
  return std::make_unique<StoreTask>(attention, k, v, stored);
}

std::unique_ptr<Task> make_attend(const Attention &attention, int q, int k, int v, int stored, int partials,
                                  const Target &y) {
  return std::make_unique<AttendTask>(attention, q, k, v, stored, partials, y);
}

std::unique_ptr<Ahead> make_attention_ahead() { return std::make_unique<AttentionAhead>(); }

std::unique_ptr<Task> make_merge(const Attention &attention, int partials, const Target &y) {
  return std::make_unique<MergeTask>(attention, partials, y);
}

void resolve_tables(const BatchView &batch, int64_t groups, int64_t group, int64_t slots, Tables &tables) {
  tables.new_pages.clear();
  tables.blocks.clear();
  tables.block_starts.assign(1, 0);
  for (int64_t s = 0; s < batch.sequences; s++) {
    const int64_t table = s * groups + group;
    const int32_t *first = batch.page_positions + batch.page_starts[table],
                  *end = batch.page_positions + batch.page_starts[table + 1];
    const size_t begin = tables.blocks.size();
    for (const int32_t *position = first; position < end; position++) {
      const int64_t last = *position + slots - 1;
      if (tables.blocks.size() > begin && *position % attention_block != 0 &&
          tables.blocks.back().last + 1 == *position) {
        tables.blocks.back().last = last;
      } else {
        const int64_t start = *position / attention_block * attention_block;
        tables.blocks.push_back({start, *position, last, batch.pages + (position - batch.page_positions)});
      }
    }
    tables.block_starts.push_back(static_cast<int64_t>(tables.blocks.size()));
    const int32_t at = first == end || batch.sequence_starts[s] == batch.sequence_starts[s + 1]
                           ? 0
                           : batch.positions[batch.sequence_starts[s]];
    tables.new_pages.push_back(std::upper_bound(first, end, at) - 1 - batch.page_positions - at / slots);
  }
}

// Tokens that see all before them and those that do not are in different tiles; of the latter, a tile's are of one
// page.
static void limit_to_page(const Attention &attention, const Sight &sight, int64_t position, QueryTile &tile) {
  const int64_t slots = attention.cache->cell().slots, whole = sight.pages() * slots;
  tile.drops = position >= whole;
  const int64_t left = tile.drops ? slots - position % slots : whole - position;
  tile.token_end = std::min(tile.token_end, tile.token_begin + left);
}

TileSet make_tiles(const BatchView &batch, const Tables &tables, const Attention &attention, int threads) {
  TileSet set;
  set.one_token_each = one_token_each(batch);
  const int64_t size = tile_tokens(attention);
  int64_t whole_tiles = 0;
  for (int64_t s = 0; s < batch.sequences; s++) {
    whole_tiles += (batch.sequence_starts[s + 1] - batch.sequence_starts[s] + size - 1) / size;
  }
  const bool few = threads > 1 && whole_tiles * attention.kv_heads < 4 * threads;
  if (attention.recall() != nullptr && whole_tiles > 0 && whole_tiles < 2 * threads) {
    const int32_t farthest = *std::max_element(batch.positions, batch.positions + batch.tokens);
    set.parts = std::clamp<int64_t>(farthest / attention.cache->cell().slots / least_part, 1, threads);
  }
  for (int64_t s = 0; s < batch.sequences; s++) {
    set.starts.push_back(set.tiles.size());
    const int64_t begin = batch.sequence_starts[s], end = batch.sequence_starts[s + 1];
    const auto blocks = tables.blocks.begin() + tables.block_starts[static_cast<size_t>(s)];
    const auto blocks_end = tables.blocks.begin() + tables.block_starts[static_cast<size_t>(s) + 1];
    // The first block that ends at a position or later.
    const auto block_of = [&](int64_t position) {
      const auto ends_before = [](const KeyBlock &block, int64_t wanted) { return block.last < wanted; };
      return std::lower_bound(blocks, blocks_end, position, ends_before) - tables.blocks.begin();
    };
    for (int64_t t = begin, next = begin; t < end; t = next) {
      QueryTile tile{s, t, std::min(t + size, end), 0, 0, -1};
      Sight sight{};
      if (attention.recall() != nullptr) {
        sight = sight_of(batch, *attention.cache, s);
        limit_to_page(attention, sight, batch.positions[t], tile);
      }
      next = tile.token_end;
      if (tile.drops) {
        set.drops = true;
        if (sight.recalled > 0) {
          const int64_t rows = (tile.token_end - t) * group_of(attention);
          tile.recalled = sight.recalled, tile.named = set.named;
          set.named += attention.kv_heads * set.parts * named_floats(rows, sight.recalled);
        }
        set.tiles.push_back(tile);
        continue;
      }
      tile.block_begin = block_of(first_visible(attention, batch.positions[t]));
      tile.block_end = block_of(batch.positions[tile.token_end - 1]) + 1;
      const bool split = few && end - begin == 1 && tile.block_end - tile.block_begin > 1;
      if (!split) {
        set.tiles.push_back(tile);
        continue;
      }
      for (int64_t block = tile.block_begin; block < tile.block_end; block++) {
        QueryTile part = tile;
        part.block_begin = block;
        part.block_end = block + 1;
        part.split = set.partials++;
        set.tiles.push_back(part);
      }
    }
  }
  set.starts.push_back(set.tiles.size());
  return set;
}

int64_t partials_bytes(const TileSet &tiles, const Attention &attention) {
  return (named_begin(tiles, attention) + tiles.named) * static_cast<int64_t>(sizeof(float));
}

}  // namespace mnemos
