// Strings as GGUF stores them: a 64-bit length, then the bytes.
#pragma once

#include <bitset>
#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>
#include <vector>

#include "system/error.h"

namespace mnemos {

// Finds strings in one text. Most are rejected by their first or last two bytes.
class Occurrences {
 public:
  explicit Occurrences(std::string_view text) : text_(text) {
    for (size_t i = 0; i + 1 < text.size(); i++) pairs_.set(pair(text.data() + i));
  }

  bool contain(std::string_view s) const {
    if (s.size() >= 2 && !(pairs_[pair(s.data())] && pairs_[pair(s.data() + s.size() - 2)])) return false;
    return text_.find(s) != std::string_view::npos;
  }

 private:
  static size_t pair(const char *p) { return size_t(static_cast<uint8_t>(p[0])) << 8 | static_cast<uint8_t>(p[1]); }

  std::string_view text_;
  std::bitset<1 << 16> pairs_;
};

// The indices of those of `count` strings that occur in `text`. With `halves` a string is two with a space between, and
// they occur if they do without it; one without a space after its first byte is taken to occur, for the caller to
// decide. Throws Error (format) if the strings reach beyond the buffer.
inline std::vector<int32_t> find_strings(std::string_view buffer, uint64_t count, std::string_view text, bool halves) {
  const Occurrences occurrences(text);
  std::vector<int32_t> found;
  std::string joined;
  size_t offset = 0;
  for (uint64_t i = 0; i < count; i++) {
    uint64_t length = 0;
    const bool has_length = buffer.size() - offset >= sizeof length;
    if (has_length) std::memcpy(&length, buffer.data() + offset, sizeof length);
    if (!has_length || length > buffer.size() - offset - sizeof length) {
      throw format_error("string " + std::to_string(i) + " of " + std::to_string(count) + " at offset " +
                         std::to_string(offset) + " reaches beyond the end at " + std::to_string(buffer.size()));
    }
    std::string_view s = buffer.substr(offset + sizeof length, length);
    offset += sizeof length + length;
    if (halves) {
      const size_t divider = s.find(' ', 1);
      if (divider != std::string_view::npos) {
        joined.assign(s.data(), divider).append(s.data() + divider + 1, s.size() - divider - 1);
        s = joined;
      } else {
        s = {};  // occurs in every text
      }
    }
    if (occurrences.contain(s)) found.push_back(static_cast<int32_t>(i));
  }
  return found;
}

}  // namespace mnemos
