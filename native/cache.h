// Keys and values of past positions, in pages whose memory is only allocated when they are first written.
#pragma once

#include <cstdint>
#include <string>

#include "vector/vector_kernels.h"

namespace mnemos {

CacheType cache_type(const std::string &name);

class Cache {
 public:
  // Throws Error (config) for sizes that are not allowed, Error (capacity) if the address space is not available.
  Cache(int64_t layers, int64_t kv_heads, int64_t head_dim, int64_t page_size, CacheType type, int64_t pages);
  ~Cache();
  Cache(const Cache &) = delete;
  Cache &operator=(const Cache &) = delete;

  const int64_t layers, kv_heads, pages;
  const CellLayout &cell() const { return cell_; }
  int64_t page_bytes() const { return page_bytes_; }
  // The cell of page 0; that of page p is p * page_bytes() further on.
  uint8_t *cells(int64_t layer, int64_t head) const { return data_ + (layer * kv_heads + head) * cell_.bytes; }
  uint8_t *page(int64_t index) const;  // throws Error (request) if there is no such page

  void copy(int64_t source, int64_t target);
  // Gives a page's memory back to the system; its content is lost.
  void release(int64_t index);

 private:
  CellLayout cell_;
  int64_t page_bytes_;
  uint8_t *data_;
};

}  // namespace mnemos
