// Which pages the rows of a long text recall, and where their cells are; see Recall in contract.py.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "program/attention_rows.h"
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

// The pages that a tile's queries name in one head, in one part of all pages. Rows are padded to whole tiles.
struct NamedPages : Named {
  static int64_t padded(int64_t rows) { return (rows + query_columns - 1) / query_columns * query_columns; }
  static int64_t floats(int64_t rows, int64_t count) { return padded(rows) * (4 + 2 * named_room(count)); }

  NamedPages(float *data, int64_t rows, int64_t count) {
    const int64_t room = padded(rows);
    this->count = count, stride = named_room(count);
    factors = data, most = factors + room, least = most + room;
    found = reinterpret_cast<int32_t *>(least + room);
    scores = least + 2 * room;
    pages = reinterpret_cast<int32_t *>(scores + room * stride);
  }

  float *factors;  // (rows,) by which scores are to be multiplied
};

// Where they are among a step's partial results.
inline NamedPages named_pages(const Step &step, const Attention &a, float *partials, const QueryTile &tile,
                              int64_t head, int64_t part) {
  const TileSet &set = step.tile_sets[a.tile_set];
  const int64_t rows = (tile.token_end - tile.token_begin) * group_of(a), count = tile.recalled;
  const int64_t number = head * set.parts + part;
  return {partials + named_begin(set, a) + tile.named + number * NamedPages::floats(rows, count), rows, count};
}

// Chooses the pages that a token recalls in one head, from those that its queries name. Works in scratch.
class Choosing {
 public:
  static int64_t bytes(const Attention &a, const BatchView &batch) {
    return a.recall() == nullptr ? 0 : most_recalled(a, batch) * 4;
  }

  Choosing(const Step &step, const Attention &a, float *partials, const QueryTile &tile, int64_t head, void *scratch)
      : step_(step), a_(a), partials_(partials), tile_(tile), head_(head),
        chosen_(static_cast<int32_t *>(scratch)) {}

  void *end() const { return chosen_ + tile_.recalled; }  // of the scratch in use

  // The pages, ascending, of the token whose queries begin at a row.
  const int32_t *choose(int64_t row) const {
    const int64_t count = tile_.recalled, parts = step_.tile_sets[a_.tile_set].parts;
    thread_local std::vector<Page> named;
    named.clear();
    for (int64_t r = row; r < row + group_of(a_); r++) {
      const size_t begin = named.size();
      float most = -INFINITY, factor = 0;
      for (int64_t part = 0; part < parts; part++) {
        const NamedPages own = named_pages(step_, a_, partials_, tile_, head_, part);
        factor = own.factors[r];
        most = std::max(most, own.most[r]);
        for (int64_t i = 0; i < own.found[r]; i++)
          named.push_back({own.scores[r * own.stride + i], own.pages[r * own.stride + i]});
      }
      keep(named, begin, count);
      most *= factor;
      for (size_t i = begin; i < named.size(); i++) named[i].score = named[i].score * factor - most;
    }
    // The best of those that name a page.
    std::sort(named.begin(), named.end(), [](const Page &a, const Page &b) {
      return a.page < b.page || (a.page == b.page && a.score > b.score);
    });
    named.erase(std::unique(named.begin(), named.end(), [](const Page &a, const Page &b) { return a.page == b.page; }),
                named.end());
    keep(named, 0, count);
    for (int64_t i = 0; i < count; i++) chosen_[i] = named[static_cast<size_t>(i)].page;
    std::sort(chosen_, chosen_ + count);
    return chosen_;
  }

 private:
  struct Page {
    float score;
    int32_t page;
  };

  // Drops all but the best `count` from `begin` on.
  static void keep(std::vector<Page> &pages, size_t begin, int64_t count) {
    const auto first = pages.begin() + static_cast<std::ptrdiff_t>(begin);
    if (pages.end() - first <= count) return;
    std::nth_element(first, first + count - 1, pages.end(), [](const Page &a, const Page &b) {
      return a.score > b.score || (a.score == b.score && a.page < b.page);
    });
    pages.resize(begin + static_cast<size_t>(count));
  }

  const Step &step_;
  const Attention &a_;
  float *const partials_;
  const QueryTile &tile_;
  const int64_t head_;
  int32_t *const chosen_;
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
