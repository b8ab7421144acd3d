#include "text/pieces.h"

#include <algorithm>
#include <cstring>

#include "system/error.h"
#include "text/unicode.h"

namespace mnemos {
namespace {

constexpr size_t most_bytes = size_t(1) << 31;

uint64_t mix(uint64_t a, uint64_t b) {
  const auto product = static_cast<unsigned __int128>(a) * b;
  return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
}

std::string shown(std::string_view text) { return "'" + std::string(text.substr(0, 80)) + "'"; }

}  // namespace

// A multiplication of 64 x 64 bits for each 16 bytes, as wyhash does it.
uint64_t Pieces::hash_of(std::string_view text) {
  constexpr uint64_t first = 0xa0761d6478bd642full, second = 0xe7037ed1a0b428dbull;
  const char *p = text.data();
  size_t left = text.size();
  const auto read = [](const char *at, size_t size) {
    uint64_t value = 0;
    std::memcpy(&value, at, size);
    return value;
  };
  uint64_t hash = mix(text.size() ^ first, second);
  for (; left > 16; left -= 16, p += 16) hash = mix(read(p, 8) ^ first, read(p + 8, 8) ^ hash);
  uint64_t a = 0, b = 0;
  if (left >= 8) {
    a = read(p, 8), b = read(p + left - 8, 8);
  } else if (left >= 4) {
    a = read(p, 4), b = read(p + left - 4, 4);
  } else if (left > 0) {
    a = uint64_t(uint8_t(p[0])) << 16 | uint64_t(uint8_t(p[left / 2])) << 8 | uint8_t(p[left - 1]);
  }
  return mix(a ^ second, b ^ hash);
}

std::vector<std::string_view> split_strings(std::string_view buffer, uint64_t count) {
  std::vector<std::string_view> strings;
  if (count > buffer.size() / sizeof(uint64_t))
    throw format_error(std::to_string(count) + " strings reach beyond the end at " + std::to_string(buffer.size()));
  strings.reserve(count);
  size_t at = 0;
  for (uint64_t i = 0; i < count; i++) {
    uint64_t length = 0;
    const bool has_length = buffer.size() - at >= sizeof length;
    if (has_length) std::memcpy(&length, buffer.data() + at, sizeof length);
    if (!has_length || length > buffer.size() - at - sizeof length)
      throw format_error("string " + std::to_string(i) + " reaches beyond the end at " + std::to_string(buffer.size()));
    strings.push_back(buffer.substr(at + sizeof length, length));
    at += sizeof length + length;
  }
  return strings;
}

Pieces::Pieces(const std::vector<std::string_view> &texts, Twice twice) {
  size_t size = 0;
  for (const std::string_view text : texts) size += text.size();
  if (size > most_bytes) throw format_error("the vocabulary has more than 2 GiB");
  bytes_.reserve(size);
  starts_.reserve(texts.size() + 1);
  starts_.push_back(0);
  for (const std::string_view text : texts) {
    bytes_.append(text);
    starts_.push_back(static_cast<uint32_t>(bytes_.size()));
  }
  index(twice);
}

void Pieces::index(Twice twice) {
  size_t slots = 16;
  while (3 * slots < 4 * size()) slots *= 2;
  slots_.assign(slots, empty_slot);
  mask_ = slots - 1;
  // The slots of some pieces are fetched before the first of them is needed, as nearly all are out of the cache.
  constexpr size_t together = 32;
  uint64_t hashes[together];
  for (size_t first = 0; first < size(); first += together) {
    const size_t count = std::min(together, size() - first);
    for (size_t i = 0; i < count; i++) {
      hashes[i] = hash_of(text(first + i));
      __builtin_prefetch(&slots_[hashes[i] & mask_], 1);
    }
    for (size_t i = 0; i < count; i++) add(first + i, hashes[i], twice);
  }
}

void Pieces::add(size_t number, uint64_t hash, Twice twice) {
  const std::string_view piece = text(number);
  if (piece.empty()) {
    empty_.push_back(static_cast<int32_t>(number));
    return;
  }
  if (!is_utf8(piece)) throw format_error("string " + std::to_string(number) + " is not UTF-8");
  size_t slot = hash & mask_;
  for (; slots_[slot] != empty_slot; slot = (slot + 1) & mask_) {
    const uint32_t other = static_cast<uint32_t>(slots_[slot]);
    if (slots_[slot] >> 32 != hash >> 32 || text(other) != piece) continue;
    if (twice == Twice::last) break;
    throw format_error("holds " + shown(piece) + " at " + std::to_string(other) + " and at " + std::to_string(number) +
                       "; tokens must be unique");
  }
  slots_[slot] = (hash >> 32) << 32 | number;
}

}  // namespace mnemos
