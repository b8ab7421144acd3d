// A vocabulary's texts, and the way from a text to its number.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace mnemos {

// Strings as GGUF stores them, with a 64-bit length before each. Throws Error (format) if they reach beyond the buffer.
std::vector<std::string_view> split_strings(std::string_view buffer, uint64_t count);

// n texts, numbered from 0. Empty ones stand for unused numbers and are never found.
class Pieces {
 public:
  // Of two equal texts the last one is found, or they are refused.
  enum class Twice { refused, last };
  // Throws Error (format) for a text that is not UTF-8 and, unless it is empty, for one that is there twice.
  explicit Pieces(const std::vector<std::string_view> &texts, Twice twice = Twice::refused);

  size_t size() const { return starts_.size() - 1; }
  const std::vector<int32_t> &empty_numbers() const { return empty_; }
  std::string_view text(size_t number) const {
    return std::string_view(bytes_).substr(starts_[number], starts_[number + 1] - starts_[number]);
  }
  // The number of a text; -1 if it is none of them.
  int32_t find(std::string_view text) const {
    const uint64_t hash = hash_of(text);
    for (size_t slot = hash & mask_;; slot = (slot + 1) & mask_) {
      const uint64_t entry = slots_[slot];
      if (entry == empty_slot) return -1;
      if (entry >> 32 == hash >> 32 && this->text(static_cast<uint32_t>(entry)) == text)
        return static_cast<int32_t>(static_cast<uint32_t>(entry));
    }
  }
  static uint64_t hash_of(std::string_view text);

 private:
  void index(Twice twice);
  void add(size_t number, uint64_t hash, Twice twice);

  static constexpr uint64_t empty_slot = ~uint64_t(0);
  std::string bytes_;
  std::vector<uint32_t> starts_;  // n + 1
  std::vector<uint64_t> slots_;  // upper half of the hash, number
  size_t mask_ = 0;
  std::vector<int32_t> empty_;
};

}  // namespace mnemos
