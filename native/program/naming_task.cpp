#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "program/attention_rows.h"
#include "program/recalling.h"
#include "program/tasks.h"

namespace mnemos {
namespace {

// Has the queries of long texts name the pages that suit them best. Threads share the work of a head, as there may be
// fewer heads that recall than threads: the pages, in parts, where there are few tiles, and otherwise a text's tiles.
// All tokens of a share have the work of expanding an index in common.
class NamingTask : public Task {
 public:
  NamingTask(const Attention &attention, int q, int stored, int partials) : a_(attention), q_(q), partials_(partials) {
    reads = {q, stored};
    writes = {partials};
  }
  bool active(const Step &step) const override { return step.tile_sets[a_.tile_set].named > 0; }
  int64_t items(const Step &step) const override {
    return active(step) ? step.batch.sequences * a_.kv_heads * step.threads : 0;
  }
  int64_t scratch_bytes(const BatchView &batch, int) const override {
    if (a_.recall() == nullptr) return 0;
    // Tiles of a text begin at each page, and are padded.
    int64_t tokens = 0;
    for (int64_t s = 0; s < batch.sequences; s++)
      tokens = std::max<int64_t>(tokens, batch.sequence_starts[s + 1] - batch.sequence_starts[s]);
    const int64_t tiles = 2 * (tokens / a_.cache->cell().slots + 2) + tokens * group_of(a_) / least_tile_rows;
    const int64_t rows = tokens * group_of(a_) + tiles * query_columns;
    return rows * (layout().groups * 4 + 4) + a_.cache->cell().value_stride * static_cast<int64_t>(sizeof(float)) +
           expanded_bytes(layout()) + 3 * line;
  }

  void run(const Step &step, int64_t item, int thread) const override {
    const TileSet &set = step.tile_sets[a_.tile_set];
    const int64_t head = item % a_.kv_heads, share = item / a_.kv_heads / step.batch.sequences;
    const auto sequence = static_cast<size_t>(item / a_.kv_heads % step.batch.sequences);
    const bool by_pages = set.parts > 1;
    const int64_t part = by_pages ? share : 0;
    if (part >= set.parts) return;
    const uint8_t *indices = a_.cache->index(a_.layer, head);
    if (indices == nullptr) return;
    auto *scratch = aligned(step.thread_scratch<uint8_t>(thread));
    uint8_t *expanded = scratch;
    auto *query = reinterpret_cast<float *>(aligned(expanded + expanded_bytes(layout())));
    auto *columns = aligned(reinterpret_cast<uint8_t *>(query + a_.cache->cell().value_stride));
    thread_local std::vector<NamingQueries> sets;
    sets.clear();
    const auto first = static_cast<int64_t>(set.starts[sequence]);
    const int64_t tiles = static_cast<int64_t>(set.starts[sequence + 1]) - first;
    // Single tiles of different texts go to different threads.
    const auto bound = [&](int64_t n) {
      return (tiles * n + static_cast<int64_t>(sequence) % step.threads) / step.threads;
    };
    for (int64_t i = by_pages ? 0 : bound(share); i < (by_pages ? tiles : bound(share + 1)); i++) {
      const QueryTile &tile = set.tiles[static_cast<size_t>(first + i)];
      if (tile.recalled == 0) continue;
      const Named named = named_pages(step, a_, step.data(partials_, thread), tile, head, part);
      sets.push_back(prepare(step, tile, head, named, query, columns, thread));
      columns += padded_rows(sets.back().rows) * (layout().groups * 4 + 4);
    }
    if (sets.empty()) return;
    const int64_t pages = sets.back().pages;
    const int32_t *table = step.batch.pages + step.tables[a_.group].new_pages[sequence];
    const PageIndices own{
        indices, a_.cache->index_chunk_bytes(), table, pages * part / set.parts, pages * (part + 1) / set.parts,
        expanded};
    step.kernels->name_pages(layout(), own, sets.data(), static_cast<int64_t>(sets.size()));
  }

 private:
  static constexpr int64_t line = 64, least_tile_rows = 32;

  const IndexLayout &layout() const { return a_.cache->index_layout(); }
  static uint8_t *aligned(uint8_t *data) {
    return reinterpret_cast<uint8_t *>((reinterpret_cast<uintptr_t>(data) + line - 1) / line * line);
  }

  // A tile's queries in 8 bits, with nothing named yet.
  NamingQueries prepare(const Step &step, const QueryTile &tile, int64_t head, const Named &named, float *query,
                        uint8_t *columns, int thread) const {
    const int64_t naming = naming_count(a_, head), rows = (tile.token_end - tile.token_begin) * naming;
    const int64_t padded = padded_rows(rows), width = a_.heads * a_.head_dim;
    auto *codes = reinterpret_cast<int8_t *>(columns);
    auto *sums = reinterpret_cast<int32_t *>(columns + padded * layout().groups * 4);
    std::memset(columns, 0, static_cast<size_t>(padded * (layout().groups * 4 + 4)));
    std::fill_n(named.most, padded, -INFINITY);
    std::fill_n(named.least, padded, INFINITY);
    std::fill_n(named.least, rows, -INFINITY);
    std::fill_n(named.scores, rows * named.stride, -INFINITY);
    const float *x = step.data(q_, thread) + head * group_of(a_) * a_.head_dim;
    for (int64_t r = 0; r < rows; r++) {
      const int64_t t = tile.token_begin + r / naming;
      transform(step, a_.query_norm, rotation(a_.query_rope.get(), step.batch.positions[t]), a_.scale, a_.head_dim,
                x + t * width + naming_query(a_, head, r % naming) * a_.head_dim, query);
      int8_t *tile_codes = codes + r / query_columns * query_columns * layout().groups * 4;
      named.factors[r] = quantize(query, tile_codes + r % query_columns * 4, &sums[r]);
    }
    const int64_t page = step.batch.positions[tile.token_begin] / a_.cache->cell().slots;
    const Sight sight = sight_of(step.batch, *a_.cache, tile.sequence);
    return {rows, codes, sums, page, sight.sinks, page + 1 - sight.window, named};
  }

  // One column of a tile; returns what its codes are to be multiplied by.
  float quantize(const float *x, int8_t *column, int32_t *sum) const {
    const std::vector<int64_t> &components = a_.recall()->components;
    float most = 0;
    for (const int64_t i : components) most = std::max(most, std::fabs(x[i]));
    if (!(most <= std::numeric_limits<float>::max())) most = 0;
    const float inverse = most > 0 ? 127.0f / most : 0.0f;
    *sum = 0;
    for (size_t i = 0; i < components.size(); i++) {
      const float code = most > 0 ? std::nearbyint(x[components[i]] * inverse) : 0.0f;
      *sum += column[i / 4 * 4 * query_columns + i % 4] = static_cast<int8_t>(code);
    }
    return most / 127.0f;
  }

  const Attention a_;
  const int q_, partials_;
};

}  // namespace

std::unique_ptr<Task> make_naming(const Attention &attention, int q, int stored, int partials) {
  return std::make_unique<NamingTask>(attention, q, stored, partials);
}

}  // namespace mnemos
