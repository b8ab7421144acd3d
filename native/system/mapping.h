// Memory in large pieces: zeroed, aligned to pages, and only taken from the system once touched.
#pragma once

#include <cstddef>
#include <cstdint>

namespace mnemos {

// Throws Error (capacity) naming `purpose` if it is not available.
uint8_t *map_memory(size_t bytes, const char *purpose);
// Asks for large pages for this memory, which save address translations; only a hint.
void prefer_large_pages(uint8_t *data, size_t bytes);
void unmap_memory(uint8_t *data, size_t bytes);

// Releases the memory of whole pages inside this range of `map_memory`'s, which is taken anew, with other content, when
// it is touched again.
void release_memory(uint8_t *data, size_t bytes);

// Releases the memory of whole pages inside this range, which must be an unmodified mapping of a file, from which
// they are read again when needed.
void release_file_pages(const uint8_t *data, size_t bytes);

}  // namespace mnemos
