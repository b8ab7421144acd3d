// Keys and values of past positions, in pages whose memory is only allocated when they are first written.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "system/spill.h"
#include "vector/vector_kernels.h"

namespace mnemos {

CacheType cache_type(const std::string &name);

// How much of a long text a row sees, in pages; see Recall in contract.py.
struct Sight {
  int64_t window, recalled, sinks;

  int64_t pages() const { return window + recalled + sinks; }
};

// How rows of long texts choose what they see.
struct Recall {
  Sight sight;  // of sequences for which a batch says nothing else
  int64_t farthest;  // pages farther back than this are seen as if they were as far; 0: at their true distance
  std::vector<char> heads;  // (layers, kv_heads): whether a head recalls
  std::vector<int64_t> components;  // of keys and queries, that scores are computed of
  // (layers, kv_heads): which of a head's queries name the pages that it recalls; none: all of them.
  std::vector<std::vector<int64_t>> naming;
  bool measured;  // how much is recalled, and how much that changes what queries see
};

class Cache {
 public:
  // `recall` may be null. Throws Error (config) for sizes that are not allowed, Error (capacity) if the address space
  // is not available.
  Cache(int64_t layers, int64_t kv_heads, int64_t head_dim, int64_t page_size, CacheType type, int64_t pages,
        std::unique_ptr<const Recall> recall = nullptr);
  ~Cache();
  Cache(const Cache &) = delete;
  Cache &operator=(const Cache &) = delete;

  const int64_t layers, kv_heads, pages;
  const CellLayout &cell() const { return cell_; }
  int64_t page_bytes() const { return page_bytes_; }
  // The cell of page 0; that of page p is p * page_bytes() further on.
  uint8_t *cells(int64_t layer, int64_t head) const { return data_ + (layer * kv_heads + head) * cell_.bytes; }
  uint8_t *page(int64_t index);  // in memory; throws Error (request) if there is no such page
  // Copies a page's content, of page_bytes, from where it is. Errors as of `page` and `Spill::check`.
  void read(int64_t index, uint8_t *content);

  void copy(int64_t source, int64_t target);
  // Gives a page's memory back to the system; its content is lost.
  void release(int64_t index);
  // Replaces a page's content, of page_bytes. Any thread may, while nobody else uses the page.
  void write(int64_t index, const uint8_t *content);

  // Moves pages to this file from now on, which it takes over, where no row sees them unless it recalls them.
  void spill_to(int file);
  Spill *spill() const { return spill_.get(); }
  // Brings back a page into memory; moves one to the file.
  void bring(int64_t index);
  void put_away(int64_t index);

  // Has rows recall from now on, in a cache that was made without: pages that are filled later have an index. Errors as
  // of the constructor; Error (config) if it recalls already.
  void begin_recall(std::unique_ptr<const Recall> recall);
  const Recall *recall() const { return recall_.get(); }
  const IndexLayout &index_layout() const { return index_layout_; }
  // The index of page 0 for a head; index_at says where that of another page is. Null if it does not recall.
  uint8_t *index(int64_t layer, int64_t head) const;
  int64_t index_chunk_bytes() const { return indices_ * index_chunk * index_layout_.bytes; }
  // Makes the index of a page whose keys are all stored.
  void index_page(int64_t layer, int64_t head, int64_t page);
  // Which of a head's queries name pages; none: all.
  const std::vector<int64_t> &naming(int64_t layer, int64_t head) const {
    return recall_->naming[static_cast<size_t>(layer * kv_heads + head)];
  }
  // Throws Error (config) if a query is to name pages that heads of this layer, with this many, do not have.
  void check_naming(int64_t layer, int64_t queries) const;
  // Adds what rows of a head's query number `query` have recalled: the share of their attention, and by how much it
  // changed what they have seen, both in units of 1 / recalled_unit; and the number of rows.
  void count_recalled(int64_t layer, int64_t head, int64_t query, int64_t share, int64_t change, int64_t rows);
  // The means of shares and of changes, (2, layers, kv_heads, queries), of as many queries a head as were counted.
  std::vector<float> recalled() const;

 private:
  CellLayout cell_;
  int64_t page_bytes_;
  uint8_t *data_;
  std::unique_ptr<const Recall> recall_;
  IndexLayout index_layout_{};
  std::vector<int64_t> index_of_;  // (layers, kv_heads): the number of a head's index, or -1
  int64_t indices_ = 0;
  uint8_t *indexed_ = nullptr;
  struct Recalled {
    std::atomic<int64_t> shares{0}, changes{0}, rows{0};
  };
  std::unique_ptr<Recalled[]> recalled_;  // (layers, kv_heads, max_tile_rows), if it is measured
  std::unique_ptr<Spill> spill_;

  void number_indices(const Recall &recall);
  void map_index();
  int64_t index_bytes() const { return (pages + index_chunk - 1) / index_chunk * index_chunk_bytes(); }
};

constexpr double recalled_unit = 1 << 20;

}  // namespace mnemos
