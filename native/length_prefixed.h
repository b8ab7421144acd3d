// Strings as GGUF stores them: a 64-bit length, then the bytes.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>

#include "error.h"

namespace mnemos {

// The offset behind `count` strings that begin at `offset`. Throws Error (format) if they reach beyond the buffer.
inline uint64_t skip_strings(const uint8_t *buffer, uint64_t size, uint64_t offset, uint64_t count) {
  for (uint64_t i = 0; i < count; i++) {
    uint64_t length = 0;
    const bool has_length = offset <= size && size - offset >= sizeof length;
    if (has_length) std::memcpy(&length, buffer + offset, sizeof length);
    if (!has_length || length > size - offset - sizeof length) {
      throw format_error("string " + std::to_string(i) + " of " + std::to_string(count) + " at offset " + std::to_string(offset) +
                         " reaches beyond the end of the file at " + std::to_string(size));
    }
    offset += sizeof length + length;
  }
  return offset;
}

}  // namespace mnemos
