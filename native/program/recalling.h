// Which pages the rows of a long text recall, and where their cells are; see Recall in contract.py.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "program/tasks.h"

namespace mnemos {
namespace {

// Adds a text's page number `page`, whose cells are at `place`, to the blocks, which hold pages before it.
inline void add_page(std::vector<KeyBlock> &blocks, int64_t page, const int32_t *place, int64_t slots) {
  const int64_t first = page * slots, last = first + slots - 1;
  if (!blocks.empty() && first % attention_block != 0 && blocks.back().last + 1 == first) {
    blocks.back().last = last;
  } else {
    blocks.push_back({first / attention_block * attention_block, first, last, place});
  }
}

// The most pages that a row of the batch recalls; those of short texts see all.
inline int64_t most_recalled(const Attention &a, const BatchView &batch) {
  int64_t most = 0;
  for (int64_t s = 0; s < batch.sequences; s++) {
    const int64_t begin = batch.sequence_starts[s], end = batch.sequence_starts[s + 1];
    const Sight sight = sight_of(batch, *a.cache, s);
    if (begin < end && batch.positions[end - 1] / a.cache->cell().slots >= sight.pages()) most = std::max(most, sight.recalled);
  }
  return most;
}

// Queries in 8 bits, in scratch.
class QuantizedRows {
 public:
  static int64_t bytes(const Attention &a, int64_t rows) { return rows * (a.cache->index_layout().groups * 4 + 4); }

  // Queries are value_stride floats apart; factors (rows,) get what their codes are to be multiplied by.
  QuantizedRows(const Attention &a, const float *queries, int64_t rows, float *factors, void *scratch)
      : rows_(rows), padded_(a.cache->index_layout().groups * 4), sums_(static_cast<int32_t *>(scratch)),
        codes_(reinterpret_cast<int8_t *>(sums_ + rows)) {
    for (int64_t r = 0; r < rows; r++) {
      const float *query = queries + r * a.cache->cell().value_stride;
      factors[r] = quantize(query, a.recall()->components, codes_ + r * padded_, &sums_[r]);
    }
  }

  IndexedQueries queries() const { return {rows_, codes_, sums_}; }
  void *end() const { return codes_ + rows_ * padded_; }

 private:
  float quantize(const float *x, const std::vector<int64_t> &components, int8_t *codes, int32_t *sum) const {
    float most = 0;
    for (const int64_t i : components) most = std::max(most, std::fabs(x[i]));
    if (!(most <= std::numeric_limits<float>::max())) most = 0;
    const float inverse = most > 0 ? 127.0f / most : 0.0f;
    *sum = 0;
    for (int64_t i = 0; i < padded_; i++) {
      const bool indexed = i < static_cast<int64_t>(components.size()) && most > 0;
      const float code = indexed ? std::nearbyint(x[components[static_cast<size_t>(i)]] * inverse) : 0.0f;
      *sum += codes[i] = static_cast<int8_t>(code);
    }
    return most / 127.0f;
  }

  const int64_t rows_, padded_;
  int32_t *const sums_;
  int8_t *const codes_;
};

// Which pages the tokens of a tile recall in one head of keys. Works in scratch.
class Choosing {
 public:
  static int64_t floats(const Attention &a, const BatchView &batch, int64_t rows) {
    if (a.recall() == nullptr) return 0;
    int64_t pages = 0;
    for (int64_t t = 0; t < batch.tokens; t++)
      pages = std::max<int64_t>(pages, batch.positions[t] / a.cache->cell().slots);
    return rows * (pages + 1) + pages + 2 * most_recalled(a, batch) + QuantizedRows::bytes(a, rows) / 4;
  }

  // Scores the pages before `page` for all rows of the tile, unless that has been done: scores (rows, page) or null.
  Choosing(const Step &step, const Attention &a, const Sight &sight, const AttentionTile &tile, int64_t head,
           const int32_t *table, int64_t page, const float *scores, float *scratch)
      : step_(step), a_(a), sight_(sight), pages_(page), factors_(scratch),
        combined_(factors_ + tile.rows), best_(combined_ + page),
        chosen_(reinterpret_cast<int32_t *>(best_ + sight.recalled)), scores_(scores) {
    const QuantizedRows rows(a, tile.queries, tile.rows, factors_, chosen_ + sight.recalled);
    end_ = rows.end();
    if (scores != nullptr) return;
    auto *own = static_cast<float *>(end_);
    step.kernels->score_pages(a.cache->index_layout(), {a.cache->index(a.layer, head), table, page}, rows.queries(), own,
                              page);
    scores_ = own, end_ = own + tile.rows * page;
  }

  void *end() const { return end_; }  // of the scratch in use

  // The pages, ascending, of the token whose queries begin at a row.
  const int32_t *choose(int64_t row) const {
    const PageChoice choice{a_.heads / a_.kv_heads, scores_ + row * pages_, pages_, factors_ + row, pages_, sight_.sinks,
                            pages_ + 1 - sight_.window, sight_.recalled, combined_, best_};
    step_.kernels->choose_pages(choice, chosen_);
    return chosen_;
  }

 private:
  const Step &step_;
  const Attention &a_;
  const Sight sight_;
  const int64_t pages_;
  float *const factors_, *const combined_, *const best_;
  int32_t *const chosen_;
  const float *scores_;
  void *end_;
};

// The cells of one head that the tokens of a tile recall, in scratch, where some of their pages are in a file.
// Neighbouring tokens recall much the same, so that what one has read is kept for the next ones.
class Gathered {
 public:
  static int64_t bytes(const Attention &a, const BatchView &batch) {
    if (a.recall() == nullptr || a.cache->spill() == nullptr) return 0;
    return room(most_recalled(a, batch)) * (a.cache->cell().bytes + 16) + 128;  // vectors may reach beyond the last cell
  }

  Gathered(const Attention &a, const Sight &sight, int64_t head, void *scratch)
      : a_(a), recalled_(sight.recalled), head_(head), room_(room(sight.recalled)),
        cells_(reinterpret_cast<uint8_t *>((reinterpret_cast<uintptr_t>(scratch) + 63) / 64 * 64)),
        pages_(reinterpret_cast<int32_t *>(cells_ + room_ * a.cache->cell().bytes + 64)), used_(pages_ + room_),
        places_(used_ + room_) {
    std::fill_n(pages_, room_, -1);
    std::fill_n(used_, room_, 0);
  }

  // Where the cells of these pages are now; room for as many others is not touched.
  const int32_t *gather(const int32_t *table, const int32_t *chosen) {
    now_++;
    for (int64_t i = 0; i < recalled_; i++) {
      const int32_t page = table[chosen[i]];
      const int64_t known = std::find(pages_, pages_ + room_, page) - pages_;
      places_[i] = static_cast<int32_t>(known < room_ ? known : -1);
      if (known < room_) used_[known] = now_;
    }
    for (int64_t i = 0; i < recalled_; i++) {
      if (places_[i] >= 0) continue;
      while (used_[next_] == now_) next_ = (next_ + 1) % room_;
      read(table[chosen[i]], cells_ + next_ * a_.cache->cell().bytes);
      pages_[next_] = table[chosen[i]], used_[next_] = now_, places_[i] = static_cast<int32_t>(next_);
      next_ = (next_ + 1) % room_;
    }
    return places_;
  }
  const uint8_t *cells() const { return cells_; }

 private:
  static int64_t room(int64_t recalled) { return 4 * recalled; }
  void read(int64_t page, uint8_t *into) const {
    const Cache &cache = *a_.cache;
    const uint8_t *cell = cache.cells(a_.layer, head_) + page * cache.page_bytes();
    if (cache.spill()->holds(page)) {
      cache.spill()->read(page, cell - cache.cells(0, 0) - page * cache.page_bytes(), cache.cell().bytes, into);
    } else {
      std::memcpy(into, cell, static_cast<size_t>(cache.cell().bytes));
    }
  }

  const Attention &a_;
  const int64_t recalled_, head_, room_;
  uint8_t *const cells_;
  int32_t *const pages_, *const used_, *const places_;
  int32_t now_ = 0;
  int64_t next_ = 0;
};

}  // namespace
}  // namespace mnemos
