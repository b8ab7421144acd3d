#include "cache.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <mutex>
#include <shared_mutex>

#include "system/error.h"
#include "system/mapping.h"

namespace mnemos {
namespace {

// Held while a page is written, by any number of threads, and by one that has a cache recall from then on: so a page is
// written either before, and is known to lack an index, or with one. One for all caches, as the latter is rare.
std::shared_mutex writing;

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

float from_half(uint16_t half) {
  const int exponent = half >> 10 & 31, fraction = half & 1023;
  const uint32_t bits = static_cast<uint32_t>(half & 0x7fff) << 13;
  const uint32_t raised = exponent == 31 ? bits | 0x7f800000u : bits + (112u << 23);
  float size;
  std::memcpy(&size, &raised, 4);
  if (exponent == 0) size = static_cast<float>(fraction) * 0x1p-24f;
  return half >> 15 != 0 ? -size : size;
}

// Component i of the keys in index_run slots of a cell from `slot` on.
void stored_keys(const CellLayout &cell, const uint8_t *data, int64_t slot, int64_t i, float *keys) {
  const int64_t at = i * cell.key_stride + slot;
  switch (cell.type) {
    case CacheType::float32: std::memcpy(keys, data + at * 4, index_run * 4); break;
    case CacheType::float16: {
      uint16_t halves[index_run];
      std::memcpy(halves, data + at * 2, sizeof halves);
      for (int64_t k = 0; k < index_run; k++) keys[k] = from_half(halves[k]);
      break;
    }
    case CacheType::bfloat16: {
      uint32_t pairs[index_run];
      std::memcpy(pairs, data + (i / 2 * cell.key_stride + slot) * 4, sizeof pairs);
      for (uint32_t &pair : pairs) pair = i % 2 == 0 ? pair << 16 : pair & 0xffff0000u;
      std::memcpy(keys, pairs, sizeof pairs);
      break;
    }
    case CacheType::int8: {
      float scales[index_run];
      std::memcpy(scales, data + cell.key_scale_offset + slot * 4, sizeof scales);
      for (int64_t k = 0; k < index_run; k++)
        keys[k] = static_cast<float>(static_cast<int8_t>(data[at + k])) * scales[k];
      break;
    }
  }
}

// The index of the keys in index_run slots of a cell, see `index_keys` in ops/recall.py.
void index_keys(const CellLayout &cell, const uint8_t *data, int64_t slot, const std::vector<int64_t> &components,
                const IndexLayout &layout, uint8_t *run) {
  const auto count = static_cast<int64_t>(components.size());
  thread_local std::vector<float> keys;
  keys.resize(static_cast<size_t>(count * index_run));
  float most = 0;
  bool finite = true;
  for (int64_t i = 0; i < count; i++) {
    float *own = keys.data() + i * index_run;
    stored_keys(cell, data, slot, components[static_cast<size_t>(i)], own);
    for (int64_t k = 0; k < index_run; k++) {
      most = std::max(most, std::fabs(own[k]));
      finite = finite && std::fabs(own[k]) <= std::numeric_limits<float>::max();
    }
  }
  uint8_t *lows = run + layout.lows(), *steps = run + layout.steps();
  std::memset(run, 0, static_cast<size_t>(layout.run_bytes));
  std::memset(lows, index_offset, static_cast<size_t>(layout.groups * 4));
  if (!finite || most == 0) return;
  const float inverse = static_cast<float>(index_levels) / most, scale = most / static_cast<float>(index_levels);
  std::memcpy(run + layout.scale(), &scale, 4);
  for (int64_t i = 0; i < count; i++) {
    int32_t levels[index_run], least = index_levels, largest = -index_levels;
    for (int64_t k = 0; k < index_run; k++) {
      levels[k] = static_cast<int32_t>(std::nearbyint(keys[static_cast<size_t>(i * index_run + k)] * inverse));
      least = std::min(least, levels[k]), largest = std::max(largest, levels[k]);
    }
    const int32_t step = std::max((largest - least + 3) / 7, 1);
    const int32_t low = least + ((largest - least - 7 * step) >> 1);
    lows[i] = static_cast<uint8_t>(low + index_offset), steps[i] = static_cast<uint8_t>(step);
    for (int64_t k = 0; k < index_run; k++) {
      const int32_t code = std::min((2 * std::max(levels[k] - low, 0) + step) / (2 * step), 7);
      uint8_t *half = run + k / index_half * layout.half();
      const int64_t at = 4 * (k % index_half) + i % 4;
      half[i / 16 * 64 + at] |= static_cast<uint8_t>((code & 3) << (i / 4 % 4 * 2));
      half[layout.thirds() + i / 4 * 8 + at / 8] |= static_cast<uint8_t>(code >> 2 << (at % 8));
    }
  }
}

}  // namespace

CacheType cache_type(const std::string &name) {
  if (name == "float32") return CacheType::float32;
  if (name == "float16") return CacheType::float16;
  if (name == "bfloat16") return CacheType::bfloat16;
  if (name == "int8") return CacheType::int8;
  throw config_error("the cache's dtype is '" + name + "'; it must be float32, float16, bfloat16 or int8");
}

Cache::Cache(int64_t layers, int64_t kv_heads, int64_t head_dim, int64_t page_size, CacheType type, int64_t pages,
             std::unique_ptr<const Recall> recall)
    : layers(checked("number of layers", layers)), kv_heads(checked("kv_heads", kv_heads)),
      pages(checked("number of pages", pages)), cell_(make_cell(type, page_size, head_dim)),
      page_bytes_(layers * kv_heads * cell_.bytes), recall_(std::move(recall)) {
  if (recall_) number_indices(*recall_);
  data_ = map_memory(static_cast<size_t>(mapping_bytes(page_bytes_, pages)), "the key/value cache");
  // Large pages would take memory for neighbours of pages that are moved to a file.
  if (!recall_) prefer_large_pages(data_, static_cast<size_t>(mapping_bytes(page_bytes_, pages)));
  try {
    map_index();
  } catch (...) {
    unmap_memory(data_, static_cast<size_t>(mapping_bytes(page_bytes_, pages)));
    throw;
  }
}

Cache::~Cache() {
  unmap_memory(data_, static_cast<size_t>(mapping_bytes(page_bytes_, pages)));
  if (indexed_ != nullptr) unmap_memory(indexed_, static_cast<size_t>(index_bytes()));
}

void Cache::begin_recall(std::unique_ptr<const Recall> recall) {
  const std::unique_lock alone(writing);
  if (recall_) throw config_error("the cache recalls already");
  number_indices(*recall);
  map_index();
  recall_ = std::move(recall);
}

void Cache::map_index() {
  if (indices_ == 0) return;
  try {
    indexed_ = map_memory(static_cast<size_t>(index_bytes()), "the index of keys");
    prefer_large_pages(indexed_, static_cast<size_t>(index_bytes()));
  } catch (...) {
    indices_ = 0;
    throw;
  }
}

void Cache::number_indices(const Recall &recall) {
  const size_t heads = static_cast<size_t>(layers * kv_heads);
  const Sight &sight = recall.sight;
  if (recall.heads.size() != heads || sight.window < 1 || sight.recalled < 0 || sight.sinks < 0 ||
      recall.farthest < 0 || cell_.slots % index_run != 0 || recall.components.empty() ||
      recall.naming.size() != heads) {
    throw config_error("recall needs pages of a multiple of " + std::to_string(index_run) +
                       " positions, a window of a page, and to know of each of " + std::to_string(heads) +
                       " heads whether it recalls");
  }
  for (const int64_t component : recall.components) {
    if (component >= 0 && component < cell_.head_dim) continue;
    throw config_error("component " + std::to_string(component) + " is not one of " + std::to_string(cell_.head_dim));
  }
  for (const std::vector<int64_t> &queries : recall.naming) {
    if (!queries.empty() && *std::min_element(queries.begin(), queries.end()) < 0)
      throw config_error("recall has a negative number of a query");
  }
  index_layout_ = mnemos::index_layout(cell_.slots, static_cast<int64_t>(recall.components.size()));
  index_of_.clear(), indices_ = 0;
  for (const char recalls : recall.heads) index_of_.push_back(recalls ? indices_++ : -1);
  recalled_ = recall.measured ? std::make_unique<Recalled[]>(heads * max_tile_rows) : nullptr;
}

uint8_t *Cache::index(int64_t layer, int64_t head) const {
  const int64_t number = recall_ ? index_of_[static_cast<size_t>(layer * kv_heads + head)] : -1;
  return number < 0 ? nullptr : indexed_ + number * index_chunk * index_layout_.bytes;
}

namespace {

// Makes a head's index of a page whose cell has this content.
void index_cell(const Cache &cache, int64_t layer, int64_t head, int64_t page, const uint8_t *cell) {
  uint8_t *index = cache.index(layer, head);
  if (index == nullptr) return;
  const IndexLayout &layout = cache.index_layout();
  index += index_at(layout, cache.index_chunk_bytes(), page);
  for (int64_t run = 0; run < layout.runs; run++) {
    index_keys(cache.cell(), cell, run * index_run, cache.recall()->components, layout, index + run * layout.run_bytes);
  }
}

}  // namespace

void Cache::index_page(int64_t layer, int64_t head, int64_t page) {
  index_cell(*this, layer, head, page, cells(layer, head) + page * page_bytes_);
}

void Cache::check_naming(int64_t layer, int64_t queries) const {
  for (int64_t head = 0; head < kv_heads; head++) {
    for (const int64_t query : naming(layer, head)) {
      if (query >= queries)
        throw config_error("query " + std::to_string(query) + " is to name pages, and heads have " +
                           std::to_string(queries));
    }
  }
}

void Cache::count_recalled(int64_t layer, int64_t head, int64_t query, int64_t share, int64_t change, int64_t rows) {
  Recalled &own = recalled_[static_cast<size_t>((layer * kv_heads + head) * max_tile_rows + query)];
  own.shares.fetch_add(share, std::memory_order_relaxed);
  own.changes.fetch_add(change, std::memory_order_relaxed);
  own.rows.fetch_add(rows, std::memory_order_relaxed);
}

std::vector<float> Cache::recalled() const {
  if (!recalled_) return {};
  const int64_t heads = layers * kv_heads;
  int64_t queries = 0;
  for (int64_t n = 0; n < heads * max_tile_rows; n++) {
    if (recalled_[static_cast<size_t>(n)].rows > 0) queries = std::max(queries, n % max_tile_rows + 1);
  }
  std::vector<float> means(static_cast<size_t>(2 * heads * queries));
  for (int64_t n = 0; n < heads * queries; n++) {
    const Recalled &own = recalled_[static_cast<size_t>(n / queries * max_tile_rows + n % queries)];
    const double rows = recalled_unit * static_cast<double>(std::max<int64_t>(own.rows, 1));
    means[static_cast<size_t>(n)] = static_cast<float>(static_cast<double>(own.shares) / rows);
    means[static_cast<size_t>(heads * queries + n)] = static_cast<float>(static_cast<double>(own.changes) / rows);
  }
  return means;
}

uint8_t *Cache::page(int64_t index) {
  if (index < 0 || index >= pages) {
    throw request_error("page " + std::to_string(index) + " is not in the cache, which has " + std::to_string(pages));
  }
  bring(index);
  return data_ + index * page_bytes_;
}

void Cache::read(int64_t index, uint8_t *content) {
  if (spill_ && index >= 0 && index < pages && spill_->holds(index)) {
    spill_->read(index, 0, page_bytes_, content);
    spill_->check();
  } else {
    std::memcpy(content, page(index), static_cast<size_t>(page_bytes_));
  }
}

void Cache::spill_to(int file) { spill_ = std::make_unique<Spill>(file, page_bytes_, pages); }

void Cache::bring(int64_t index) {
  if (!spill_ || !spill_->holds(index)) return;
  spill_->read(index, 0, page_bytes_, data_ + index * page_bytes_);
  spill_->forget(index);
}

void Cache::put_away(int64_t index) {
  uint8_t *data = data_ + index * page_bytes_;
  spill_->write(index, data);
  release_memory(data, static_cast<size_t>(page_bytes_));
}

void Cache::copy(int64_t source, int64_t target) {
  const uint8_t *from = page(source);
  uint8_t *to = page(target);
  if (from == to) return;
  std::memcpy(to, from, static_cast<size_t>(page_bytes_));
  const int64_t bytes = index_layout_.bytes;
  for (int64_t i = 0; i < indices_; i++) {
    uint8_t *index = indexed_ + i * index_chunk * bytes;
    std::memcpy(index + index_at(index_layout_, index_chunk_bytes(), target),
                index + index_at(index_layout_, index_chunk_bytes(), source), static_cast<size_t>(bytes));
  }
}

void Cache::write(int64_t index, const uint8_t *content) {
  const std::shared_lock shared(writing);
  if (spill_ && index >= 0 && index < pages) {  // to the file without a place in memory
    const bool resident = !spill_->holds(index);
    spill_->write(index, content);
    if (resident) release_memory(data_ + index * page_bytes_, static_cast<size_t>(page_bytes_));
  } else {
    std::memcpy(page(index), content, static_cast<size_t>(page_bytes_));
  }
  for (int64_t layer = 0; indices_ > 0 && layer < layers; layer++) {
    for (int64_t head = 0; head < kv_heads; head++) {
      index_cell(*this, layer, head, index, content + (layer * kv_heads + head) * cell_.bytes);
    }
  }
}

void Cache::release(int64_t index) {
  if (spill_ && index >= 0 && index < pages) spill_->forget(index);
  release_memory(page(index), static_cast<size_t>(page_bytes_));
}

}  // namespace mnemos
