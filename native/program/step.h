// What the tasks of a program see while it runs.
#pragma once

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "cache.h"
#include "linear/linear.h"
#include "vector/vector_kernels.h"

namespace mnemos {

// How many rows a value has: one for each token of the batch, or one for each row whose logits are asked for.
enum class Rows { tokens, chosen };

// The batch of one step, as in mnemos.contract.Batch. All arrays are checked before a step runs.
struct BatchView {
  int64_t tokens = 0, chosen = 0, sequences = 0, tables = 0, table_pages = 0;
  const int32_t *token_ids = nullptr, *positions = nullptr, *sequence_starts = nullptr;
  const int32_t *pages = nullptr, *page_positions = nullptr, *page_starts = nullptr, *logit_rows = nullptr;
  int64_t state_slots = 0;
  const int32_t *states = nullptr;  // a slot for each sequence, where the model keeps any
  int threads = 0;  // the most to compute with, 0: all of the pool's; results are the same
  const int32_t *adapters = nullptr;  // an adapter for each sequence, -1 for none; null if no sequence has one
  int64_t adapter_count = 0;  // of values in `adapters`
  const int32_t *sights = nullptr;  // (sequences, 3): window, recalled and sinks in pages, zeros or null: the cache's
  int64_t sight_values = 0;  // in `sights`
  bool argmax = false;  // only the index of each row's largest logit is wanted; see Program::finds_argmax
};

// What the rows of a sequence see in a cache that recalls.
inline Sight sight_of(const BatchView &batch, const Cache &cache, int64_t sequence) {
  const int32_t *own = batch.sights == nullptr ? nullptr : batch.sights + 3 * sequence;
  if (own == nullptr || own[0] == 0) return cache.recall()->sight;
  return {own[0], own[1], own[2]};
}

// A piece of the workspace. With `copies` every thread has its own, filled by itself.
struct Piece {
  uint8_t *data;
  int64_t copy_bytes;  // 0 if there is only one
};

// The page tables of a step's sequences in one layer group, resolved once for all its layers.
struct Tables {
  // The new positions of a sequence are consecutive, and so are the pages that hold them: position p is in
  // batch.pages[new_pages[s] + p / slots].
  std::vector<int64_t> new_pages;
  std::vector<KeyBlock> blocks;  // of all sequences, each one's in the order of their positions
  std::vector<int64_t> block_starts;  // (sequences + 1): sequence s has blocks block_starts[s] to block_starts[s + 1]
};

// One sequence's queries for a tile of tokens; see attention_task.cpp.
struct QueryTile {
  int64_t sequence, token_begin, token_end;
  int64_t block_begin, block_end;  // numbers in Tables::blocks
  int64_t split;  // index of the first partial result, or -1 if the tile does all its blocks itself
  bool drops = false;  // its tokens, all of one page of positions, do not see all before them: see Recall
  int64_t recalled = 0;  // how many pages each of them recalls in heads that do
  int64_t named = 0;  // where those that its queries name begin among the set's
};

// The tiles of all attention operators that share window and head counts.
struct TileSet {
  std::vector<QueryTile> tiles;
  std::vector<size_t> starts;  // (sequences + 1): sequence s has tiles starts[s] to starts[s + 1]
  int64_t partials = 0;  // how many there are
  int64_t named = 0;  // floats of the pages that queries name
  int64_t parts = 1;  // of a text's pages, that are searched apart
  bool one_token_each = false;  // no sequence has several tokens
  bool drops = false;  // a tile does
};

struct Step {
  BatchView batch;
  int threads;
  const VectorKernels *kernels;
  const Piece *pieces;  // by buffer
  const Tables *tables;  // by layer group
  const TileSet *tile_sets;
  uint8_t *scratch;  // scratch_bytes for each thread
  int64_t scratch_bytes;
  const std::unique_ptr<Ahead> *ahead;  // per thread: what products fetch for the following task that fetches ahead

  int64_t rows(Rows kind) const { return kind == Rows::tokens ? batch.tokens : batch.chosen; }
  template <typename T = float>
  T *data(int buffer, int thread) const {
    return reinterpret_cast<T *>(pieces[buffer].data + pieces[buffer].copy_bytes * thread);
  }
  template <typename T = float>
  T *thread_scratch(int thread) const {
    return reinterpret_cast<T *>(scratch + scratch_bytes * thread);
  }
};

// A parallel loop of a program. Items are independent of each other and may run on any thread in any order.
class Task {
 public:
  virtual ~Task() = default;
  // Called once before a step's items are counted and run.
  virtual void plan(const Step &) {}
  virtual int64_t items(const Step &step) const = 0;
  virtual void run(const Step &step, int64_t item, int thread) const = 0;
  // Whether products may fetch what the task will read, and how the thread begins with it.
  virtual bool fetches_ahead() const { return false; }
  virtual void fetch_ahead(const Step &, int) const {}
  // False if this batch does not need the task; no thread waits for it then.
  virtual bool active(const Step &) const { return true; }
  // Bytes of scratch that a thread needs.
  virtual int64_t scratch_bytes(const BatchView &, int) const { return 0; }

  std::vector<int> reads, writes;  // buffers
  // Pairs of a buffer that is read and one that is written: they may be the same memory, if no task reads the first
  // later.
  std::vector<std::pair<int, int>> in_place;
  bool cheap_for_one_row = false;  // then every thread does all of it, which is faster than waiting for one
};

}  // namespace mnemos
