// A file for the pages of a cache that are not kept in memory.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace mnemos {

class Spill {
 public:
  // Takes over the file descriptor. Throws Error (unsupported) where the system has no positioned reads.
  Spill(int file, int64_t page_bytes, int64_t pages);
  ~Spill();
  Spill(const Spill &) = delete;
  Spill &operator=(const Spill &) = delete;

  bool holds(int64_t page) const { return held_[static_cast<std::size_t>(page)] != 0; }
  int64_t count() const;  // of the pages that it holds
  void forget(int64_t page) { held_[static_cast<std::size_t>(page)] = 0; }
  // Stores a page; throws Error (capacity) if the file cannot take it, and holds it no more than before.
  void write(int64_t page, const uint8_t *data);
  // Reads a part of a page that is held. Any thread may; what fails is reported by `check`.
  void read(int64_t page, int64_t offset, int64_t bytes, uint8_t *into) const;
  // Throws Error (capacity) if a read has failed since the last call.
  void check();

  // The step in which a page was last seen from within a window.
  std::vector<int64_t> seen;
  int64_t step = 0;

 private:
  const int file_;
  const int64_t page_bytes_;
  std::vector<char> held_;
  mutable std::atomic<int> failure_{0};
};

}  // namespace mnemos
