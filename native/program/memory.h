// Attention to memory banks, and the pooling that their chapters are chosen by; see MemoryParams and PoolParams in
// ops/protocol.py.
#pragma once

#include <memory>

#include "program/bank.h"
#include "program/windows.h"

namespace mnemos {

enum class PoolKind { sequence, sequence_rolling, rolling, hybrid };

struct Pooling {
  PoolKind kind;
  int64_t window;
  int64_t layer;  // in the windows
  std::shared_ptr<Windows> windows;  // null if nothing is remembered
};

struct MemoryAttention {
  int64_t heads, kv_heads, head_dim;
  float scale;
  int64_t rows, chapters, shared;  // chapters: 0 if the bank is undivided
  float scaling;
  bool separate;
  std::shared_ptr<Bank> bank;
  int64_t chosen = 0;  // chapters of each row besides the shared ones

  int64_t spans() const { return chapters > 0 ? shared + chosen : 1; }
  int64_t span_rows() const { return chapters > 0 ? rows / chapters : rows; }
  int64_t span_blocks() const { return (span_rows() + attention_block - 1) / attention_block; }
};

}  // namespace mnemos
