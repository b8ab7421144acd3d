#include "cache.h"

#include <cstring>

#include "system/error.h"
#include "system/mapping.h"

namespace mnemos {
namespace {

int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

int64_t checked(const char *name, int64_t value) {
  if (value >= 1 && value <= (int64_t{1} << 31)) return value;
  throw config_error(std::string("the cache's ") + name + " is " + std::to_string(value) + "; it must be at least 1");
}

CellLayout make_cell(CacheType type, int64_t slots, int64_t head_dim) {
  if (attention_block % checked("page_size", slots) != 0) {
    throw config_error("page_size is " + std::to_string(slots) + "; it must be a power of two up to " +
                       std::to_string(attention_block));
  }
  const int64_t element = type == CacheType::float32 ? 4 : type == CacheType::int8 ? 1 : 2;
  const int64_t scales = type == CacheType::int8 ? round_up(slots * 4, 64) : 0;
  CellLayout cell{};
  cell.type = type;
  cell.slots = slots;
  cell.head_dim = checked("head_dim", head_dim);
  cell.key_stride = round_up(slots, 16);
  cell.value_stride = round_up(head_dim, 16);
  const int64_t rows = type == CacheType::bfloat16 ? 2 : 1;  // stored in one
  cell.value_offset = round_up(cell.key_stride * round_up(head_dim, rows) * element, 64);
  cell.key_scale_offset = cell.value_offset + round_up(round_up(slots, rows) * cell.value_stride * element, 64);
  cell.value_scale_offset = cell.key_scale_offset + scales;
  cell.bytes = cell.value_scale_offset + scales;
  return cell;
}

int64_t mapping_bytes(int64_t page_bytes, int64_t pages) {
  int64_t bytes = 0;
  // Vectors of a cell's last elements are loaded whole and may reach a little beyond them.
  if (__builtin_mul_overflow(page_bytes, pages, &bytes) || __builtin_add_overflow(bytes, int64_t{64}, &bytes)) {
    throw capacity_error("a cache of " + std::to_string(pages) + " pages of " + std::to_string(page_bytes) +
                         " bytes is too large for this machine");
  }
  return bytes;
}

}  // namespace

CacheType cache_type(const std::string &name) {
  if (name == "float32") return CacheType::float32;
  if (name == "float16") return CacheType::float16;
  if (name == "bfloat16") return CacheType::bfloat16;
  if (name == "int8") return CacheType::int8;
  throw config_error("the cache's dtype is '" + name + "'; it must be float32, float16, bfloat16 or int8");
}

Cache::Cache(int64_t layers, int64_t kv_heads, int64_t head_dim, int64_t page_size, CacheType type, int64_t pages)
    : layers(checked("number of layers", layers)), kv_heads(checked("kv_heads", kv_heads)),
      pages(checked("number of pages", pages)), cell_(make_cell(type, page_size, head_dim)),
      page_bytes_(layers * kv_heads * cell_.bytes),
      data_(map_memory(static_cast<size_t>(mapping_bytes(page_bytes_, pages)), "the key/value cache")) {
  prefer_large_pages(data_, static_cast<size_t>(mapping_bytes(page_bytes_, pages)));
}

Cache::~Cache() { unmap_memory(data_, static_cast<size_t>(mapping_bytes(page_bytes_, pages))); }

uint8_t *Cache::page(int64_t index) const {
  if (index < 0 || index >= pages) {
    throw request_error("page " + std::to_string(index) + " is not in the cache, which has " + std::to_string(pages));
  }
  return data_ + index * page_bytes_;
}

void Cache::copy(int64_t source, int64_t target) {
  const uint8_t *from = page(source);
  uint8_t *to = page(target);
  if (from != to) std::memcpy(to, from, static_cast<size_t>(page_bytes_));
}

void Cache::release(int64_t index) { release_memory(page(index), static_cast<size_t>(page_bytes_)); }

}  // namespace mnemos
