// The rows at the latest positions of sequences, for the routers of some layers; see Windows in ops/protocol.py.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

namespace mnemos {

class Windows {
 public:
  // Throws Error (config) for sizes that are not allowed.
  Windows(int64_t layers, int64_t width, int64_t length);
  const int64_t layers, width, length;

  Windows(const Windows &) = delete;
  Windows &operator=(const Windows &) = delete;

  void reserve(int64_t slots);
  int64_t slots() const { return static_cast<int64_t>(slots_.size()); }
  // The next two throw Error (request) if there is no such slot.
  void copy(int64_t source, int64_t target);
  void clear(int64_t slot);
  // The row of a slot and layer for a position, which is kept until `length` more have been written. No other thread
  // may use the slot.
  float *row(int64_t slot, int64_t layer, int64_t position);

 private:
  std::unique_ptr<float[]> &checked(int64_t slot);

  std::vector<std::unique_ptr<float[]>> slots_;  // null until first written
};

}  // namespace mnemos
