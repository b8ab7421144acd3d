#include "program/windows.h"

#include <algorithm>
#include <string>

#include "system/error.h"

namespace mnemos {

Windows::Windows(int64_t layers, int64_t width, int64_t length) : layers(layers), width(width), length(length) {
  const int64_t most = int64_t{1} << 31;
  if (layers < 1 || width < 1 || length < 1 || layers > most / width || layers * width > (int64_t{1} << 40) / length) {
    throw config_error("windows of " + std::to_string(layers) + " layers, " + std::to_string(width) + " columns and " +
                       std::to_string(length) + " positions are not possible");
  }
}

void Windows::reserve(int64_t slots) { slots_.resize(static_cast<size_t>(std::max<int64_t>(slots, 0))); }

std::unique_ptr<float[]> &Windows::checked(int64_t slot) {
  if (slot < 0 || slot >= slots())
    throw request_error("state slot " + std::to_string(slot) + " is not one of " + std::to_string(slots()));
  return slots_[static_cast<size_t>(slot)];
}

void Windows::copy(int64_t source, int64_t target) {
  const std::unique_ptr<float[]> &from = checked(source);
  std::unique_ptr<float[]> &to = checked(target);
  if (&from == &to) return;
  if (!from) return to.reset();
  const size_t count = static_cast<size_t>(layers * width * length);
  if (!to) to = std::make_unique<float[]>(count);
  std::copy(from.get(), from.get() + count, to.get());
}

void Windows::clear(int64_t slot) { checked(slot).reset(); }

float *Windows::row(int64_t slot, int64_t layer, int64_t position) {
  std::unique_ptr<float[]> &data = checked(slot);
  if (!data) data = std::make_unique<float[]>(static_cast<size_t>(layers * width * length));
  return data.get() + (layer * length + position % length) * width;
}

}  // namespace mnemos
