#include "system/mapping.h"

#include <cstdlib>
#include <string>

#include "system/error.h"

#if !defined(_WIN32)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace mnemos {

uint8_t *map_memory(size_t bytes, const char *purpose) {
#if defined(_WIN32)
  void *data = std::calloc(bytes, 1);
  if (data != nullptr) return static_cast<uint8_t *>(data);
#else
#if !defined(MAP_NORESERVE)
#define MAP_NORESERVE 0
#endif
  void *data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (data != MAP_FAILED) return static_cast<uint8_t *>(data);
#endif
  throw capacity_error("the system has no " + std::to_string(bytes) + " bytes of address space for " + purpose);
}

void prefer_large_pages(uint8_t *data, size_t bytes) {
#if defined(MADV_HUGEPAGE)
  madvise(data, bytes, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

void unmap_memory(uint8_t *data, size_t bytes) {
#if defined(_WIN32)
  (void)bytes;
  std::free(data);
#else
  munmap(data, bytes);
#endif
}

namespace {

#if !defined(_WIN32)
void advise_inside(const uint8_t *data, size_t bytes, int advice) {
  const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / page * page;
  if (begin < end) madvise(reinterpret_cast<void *>(begin), end - begin, advice);
}
#endif

}  // namespace

void release_memory(uint8_t *data, size_t bytes) {
#if defined(_WIN32)
  (void)data, (void)bytes;
#elif defined(__APPLE__)
  advise_inside(data, bytes, MADV_FREE);  // there MADV_DONTNEED releases nothing
#else
  advise_inside(data, bytes, MADV_DONTNEED);
#endif
}

void release_file_pages(const uint8_t *data, size_t bytes) {
#if defined(_WIN32)
  (void)data, (void)bytes;
#else
  advise_inside(data, bytes, MADV_DONTNEED);
#endif
}

}  // namespace mnemos
