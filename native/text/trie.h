// Texts found by their bytes, all that begin at a place at once.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

#include "system/error.h"

namespace mnemos {

// Bytes to values. The edges of all nodes are in one hash table.
class Trie {
 public:
  Trie() : values_{-1}, slots_(16, empty_slot) {}

  // Nothing changes if the text is there already.
  void add_new(std::string_view text, int32_t value) {
    uint32_t node = 0;
    for (const char byte : text) {
      uint32_t next = child(node, static_cast<uint8_t>(byte));
      if (next == nothing) {
        next = static_cast<uint32_t>(values_.size());
        if (next > most_nodes) throw format_error("the vocabulary has more than 16 million different beginnings");
        values_.push_back(-1);
        if (2 * values_.size() > slots_.size()) grow();
        slots_[place(node << 8 | static_cast<uint8_t>(byte))] =
            uint64_t(node << 8 | static_cast<uint8_t>(byte)) << 32 | next;
      }
      node = next;
    }
    if (values_[node] < 0) values_[node] = value;
  }
  static constexpr uint32_t nothing = ~0u;
  uint32_t child(uint32_t node, uint8_t byte) const {
    const uint64_t slot = slots_[place(node << 8 | byte)];
    return slot == empty_slot ? nothing : static_cast<uint32_t>(slot);
  }
  int32_t value(uint32_t node) const { return values_[node]; }

 private:
  static constexpr uint64_t empty_slot = ~uint64_t(0);
  static constexpr size_t most_nodes = (1 << 24) - 2;
  size_t place(uint32_t key) const {
    const size_t mask = slots_.size() - 1;
    size_t slot = (key * 0x9E3779B97F4A7C15ull >> 32) & mask;
    while (slots_[slot] != empty_slot && slots_[slot] >> 32 != key) slot = (slot + 1) & mask;
    return slot;
  }
  void grow() {
    std::vector<uint64_t> old(2 * slots_.size(), empty_slot);
    old.swap(slots_);
    for (const uint64_t slot : old)
      if (slot != empty_slot) slots_[place(static_cast<uint32_t>(slot >> 32))] = slot;
  }

  std::vector<int32_t> values_;  // of each node: that of the text that ends there, or -1
  std::vector<uint64_t> slots_;  // node << 8 | byte, then the child
};

}  // namespace mnemos
