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
    if (begin < end && batch.positions[end - 1] / a.cache->cell().slots >= sight.pages())
      most = std::max(most, sight.recalled);
  }
  return most;
}

// How many of a head's queries name the pages that it recalls, and which they are.
inline int64_t naming_count(const Attention &a, int64_t head) {
  const std::vector<int64_t> &naming = a.cache->naming(a.layer, head);
  return naming.empty() ? group_of(a) : static_cast<int64_t>(naming.size());
}
inline int64_t naming_query(const Attention &a, int64_t head, int64_t n) {
  const std::vector<int64_t> &naming = a.cache->naming(a.layer, head);
  return naming.empty() ? n : naming[static_cast<size_t>(n)];
}

// Rows of queries are padded to whole tiles.
inline int64_t padded_rows(int64_t rows) { return (rows + query_columns - 1) / query_columns * query_columns; }
inline int64_t named_floats(int64_t rows, int64_t count) { return padded_rows(rows) * (3 + 2 * named_room(count)); }

// The pages that a tile's queries name in one head, in one part of all pages, among a step's partial results. There is
// room for all queries of the head.
inline Named named_pages(const Step &step, const Attention &a, float *partials, const QueryTile &tile, int64_t head,
                         int64_t part) {
  const TileSet &set = step.tile_sets[a.tile_set];
  const int64_t rows = (tile.token_end - tile.token_begin) * group_of(a), count = tile.recalled;
  const int64_t number = head * set.parts + part, padded = padded_rows(rows), room = named_room(count);
  float *data = partials + named_begin(set, a) + tile.named + number * named_floats(rows, count);
  float *scores = data + 3 * padded;
  return {
      count, room, data, data + padded, data + 2 * padded, scores, reinterpret_cast<int32_t *>(scores + padded * room)};
}

// Chooses the pages that a token recalls in one head, from those that its queries name. Works in scratch.
class Choosing {
 public:
  static int64_t bytes(const Attention &a, const BatchView &batch) {
    if (a.recall() == nullptr) return 0;
    const int64_t most = most_recalled(a, batch);
    return (choosing_floats(most) + most) * static_cast<int64_t>(sizeof(float));
  }

  Choosing(const Step &step, const Attention &a, float *partials, const QueryTile &tile, int64_t head, void *scratch)
      : kernels_(*step.kernels), naming_(naming_count(a, head)), scratch_(static_cast<float *>(scratch)),
        chosen_(reinterpret_cast<int32_t *>(scratch_ + choosing_floats(tile.recalled))), end_(chosen_ + tile.recalled) {
    parts_.clear();
    for (int64_t part = 0; part < step.tile_sets[a.tile_set].parts; part++)
      parts_.push_back(named_pages(step, a, partials, tile, head, part));
  }

  void *end() const { return end_; }  // of the scratch in use

  // The pages, ascending, of the tile's token number `token`.
  const int32_t *choose(int64_t token) const {
    kernels_.choose_pages(parts_.data(), static_cast<int64_t>(parts_.size()), token * naming_, naming_, scratch_,
                          chosen_);
    return chosen_;
  }

 private:
  const VectorKernels &kernels_;
  const int64_t naming_;
  float *const scratch_;
  int32_t *const chosen_, *const end_;
  static thread_local inline std::vector<Named> parts_;  // of the tile that the thread is at
};

// The cells of one head that the tokens of a tile recall, in scratch, where some of their pages are in a file.
// Neighbouring tokens recall much the same, so that what one has read is kept for the next ones.
class Gathered {
 public:
  static int64_t bytes(const Attention &a, const BatchView &batch) {
    if (a.recall() == nullptr || a.cache->spill() == nullptr) return 0;
    return room(most_recalled(a, batch)) * (a.cache->cell().bytes + 16) +
           128;  // vectors may reach beyond the last cell
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
