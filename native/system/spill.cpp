#include "system/spill.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <string>

#include "system/error.h"

#if !defined(_WIN32)
#include <unistd.h>
#endif

namespace mnemos {

#if defined(_WIN32)
Spill::Spill(int file, int64_t page_bytes, int64_t pages) : file_(file), page_bytes_(page_bytes) {
  (void)pages;
  throw config_error("pages cannot be moved to a file on this system; set spill to False");
}
Spill::~Spill() = default;
void Spill::write(int64_t, const uint8_t *) {}
void Spill::read(int64_t, int64_t, int64_t, uint8_t *) const {}
#else
Spill::Spill(int file, int64_t page_bytes, int64_t pages)
    : seen(static_cast<size_t>(pages)), file_(file), page_bytes_(page_bytes), held_(static_cast<size_t>(pages)) {}

Spill::~Spill() { close(file_); }

void Spill::write(int64_t page, const uint8_t *data) {
  for (int64_t done = 0; done < page_bytes_;) {
    const ssize_t count =
        pwrite(file_, data + done, static_cast<size_t>(page_bytes_ - done), page * page_bytes_ + done);
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) {
      throw capacity_error("the file of pages that left memory cannot take another " + std::to_string(page_bytes_) +
                           " bytes: " + std::strerror(count < 0 ? errno : ENOSPC) +
                           "; choose a folder with more room, or a smaller cache_tokens");
    }
    done += count;
  }
  held_[static_cast<size_t>(page)] = 1;
}

void Spill::read(int64_t page, int64_t offset, int64_t bytes, uint8_t *into) const {
  for (int64_t done = 0; done < bytes;) {
    const ssize_t count =
        pread(file_, into + done, static_cast<size_t>(bytes - done), page * page_bytes_ + offset + done);
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) {
      failure_.store(count < 0 ? errno : EIO, std::memory_order_relaxed);
      std::memset(into + done, 0, static_cast<size_t>(bytes - done));
      return;
    }
    done += count;
  }
}
#endif

int64_t Spill::count() const { return std::count(held_.begin(), held_.end(), 1); }

void Spill::check() {
  const int failure = failure_.exchange(0);
  if (failure == 0) return;
  throw capacity_error(std::string("the file of pages that left memory cannot be read: ") + std::strerror(failure));
}

}  // namespace mnemos
