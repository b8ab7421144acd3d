// The keys and values of a memory bank, made of its vectors when they are first read; see BankSource in
// ops/protocol.py.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "cache.h"

namespace mnemos {

enum class RowKind { float32, float16, bfloat16, int8, int4 };
enum class RowNorm { none, rms, layer };

struct BankSource {
  std::shared_ptr<const uint8_t> stored;  // (rows, width) of `kind`
  int64_t stored_bytes;
  RowKind kind;
  std::vector<float> scales;  // of int8 and int4, one for each row
  int64_t width;
  std::vector<float> projections;  // (width, 2 * kv_heads * head_dim), those of keys first
  RowNorm norm;
  float epsilon, factor;
};

// Rows are made in chunks of up to attention_block, counted within spans (chapters) of equal length.
class Bank {
 public:
  // Throws Error (config) if the source does not hold the rows, or pages do not divide a span.
  Bank(BankSource source, std::shared_ptr<Cache> cache, int64_t rows, int64_t span);
  const int64_t rows, span;

  const Cache &cache() const { return *cache_; }  // one layer; row r is slot r % slots of page r / slots
  int64_t chunks_of_span() const { return (span + attention_block - 1) / attention_block; }
  int64_t chunks() const { return rows / span * chunks_of_span(); }
  bool complete() const { return made_.load() == chunks(); }
  // Makes a chunk unless it is there or another thread is at it. Scratch: scratch_floats().
  void make(int64_t chunk, float *scratch);
  int64_t scratch_floats() const { return width_ + columns_; }
  // Lets go of the source of a complete bank; no other thread may use the bank meanwhile.
  void release_source();
  int64_t bytes() const;  // of the keys and values made so far

 private:
  void read_row(int64_t row, float *x) const;

  BankSource source_;
  const int64_t width_, columns_;
  const std::shared_ptr<Cache> cache_;
  std::vector<std::atomic<uint8_t>> state_;  // by chunk: 0, 1 while it is made, 2
  std::atomic<int64_t> made_{0};
};

}  // namespace mnemos
