#include "program/bank.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "system/cpu.h"
#include "system/error.h"

namespace mnemos {
namespace {

float half_value(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  float value = exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                              : std::ldexp(static_cast<float>(fraction + 1024), exponent - 25);
  if (exponent == 31) value = fraction == 0 ? INFINITY : NAN;
  return bits & 0x8000 ? -value : value;
}

int64_t row_bytes(RowKind kind, int64_t width) {
  switch (kind) {
    case RowKind::float32: return 4 * width;
    case RowKind::float16:
    case RowKind::bfloat16: return 2 * width;
    case RowKind::int8: return width;
    case RowKind::int4: return width / 2;
  }
  return 0;
}

}  // namespace

Bank::Bank(BankSource source, std::shared_ptr<Cache> cache, int64_t rows, int64_t span)
    : rows(rows), span(span), source_(std::move(source)), width_(source_.width),
      columns_(2 * cache->kv_heads * cache->cell().head_dim), cache_(std::move(cache)),
      state_(static_cast<size_t>(rows > 0 && span > 0 ? rows / span * ((span + attention_block - 1) / attention_block)
                                                      : 0)) {
  const bool scaled = source_.kind == RowKind::int8 || source_.kind == RowKind::int4;
  const auto fits = [&](int64_t count) {
    return count * row_bytes(source_.kind, width_) <= source_.stored_bytes &&
           (!scaled || count <= static_cast<int64_t>(source_.scales.size()));
  };
  if (rows < 1 || span < 1 || rows % span != 0 || width_ < 1 || !fits(rows) || cache_->layers != 1 ||
      rows > cache_->pages * cache_->cell().slots || (span != rows && span % cache_->cell().slots != 0) ||
      static_cast<int64_t>(source_.projections.size()) != width_ * columns_) {
    throw config_error("a bank of " + std::to_string(rows) + " vectors of width " + std::to_string(width_) +
                       ", in chapters of " + std::to_string(span) + ", does not fit what is stored");
  }
}

void Bank::read_row(int64_t row, float *x) const {
  const uint8_t *p = source_.stored.get() + row * row_bytes(source_.kind, width_);
  switch (source_.kind) {
    case RowKind::float32: std::memcpy(x, p, static_cast<size_t>(width_) * 4); break;
    case RowKind::float16:
      for (int64_t i = 0; i < width_; i++) x[i] = half_value(static_cast<uint16_t>(p[2 * i] | p[2 * i + 1] << 8));
      break;
    case RowKind::bfloat16:
      for (int64_t i = 0; i < width_; i++) {
        const uint32_t bits = static_cast<uint32_t>(p[2 * i] | p[2 * i + 1] << 8) << 16;
        std::memcpy(x + i, &bits, 4);
      }
      break;
    case RowKind::int8:
      for (int64_t i = 0; i < width_; i++) x[i] = static_cast<float>(static_cast<int8_t>(p[i]));
      break;
    case RowKind::int4:
      for (int64_t i = 0; i < width_; i++) {
        const int nibble = i % 2 == 0 ? p[i / 2] & 15 : p[i / 2] >> 4;
        x[i] = static_cast<float>(nibble > 7 ? nibble - 16 : nibble);
      }
      break;
  }
  float scale = source_.scales.empty() ? 1.0f : source_.scales[static_cast<size_t>(row)];
  for (int64_t i = 0; i < width_; i++) x[i] *= scale;
  if (source_.norm == RowNorm::layer) {
    double sum = 0;
    for (int64_t i = 0; i < width_; i++) sum += static_cast<double>(x[i]);
    for (int64_t i = 0; i < width_; i++) x[i] -= static_cast<float>(sum / static_cast<double>(width_));
  }
  if (source_.norm != RowNorm::none) {
    double squares = 0;
    for (int64_t i = 0; i < width_; i++) squares += static_cast<double>(x[i]) * static_cast<double>(x[i]);
    const double mean = squares / static_cast<double>(width_) + static_cast<double>(source_.epsilon);
    for (int64_t i = 0; i < width_; i++) x[i] = static_cast<float>(static_cast<double>(x[i]) / std::sqrt(mean));
  }
  for (int64_t i = 0; i < width_; i++) x[i] *= source_.factor;
}

void Bank::make(int64_t chunk, float *scratch) {
  std::atomic<uint8_t> &state = state_[static_cast<size_t>(chunk)];
  uint8_t expected = 0;
  if (state.load(std::memory_order_relaxed) != 0 || !state.compare_exchange_strong(expected, 1)) return;
  const VectorKernels &kernels = vector_kernels(current_isa(OperatorClass::attention));
  const CellLayout &cell = cache_->cell();
  const int64_t within = chunk % chunks_of_span() * attention_block;
  const int64_t first = chunk / chunks_of_span() * span + within, count = std::min(attention_block, span - within);
  float *x = scratch, *y = scratch + width_;
  for (int64_t row = first; row < first + count; row++) {
    read_row(row, x);
    std::fill(y, y + columns_, 0.0f);
    for (int64_t i = 0; i < width_; i++)
      kernels.accumulate(source_.projections.data() + i * columns_, x[i], y, columns_);
    for (int64_t head = 0; head < cache_->kv_heads; head++) {
      uint8_t *data = cache_->cells(0, head) + row / cell.slots * cache_->page_bytes();
      kernels.store_key(cell, data, row % cell.slots, y + head * cell.head_dim);
      kernels.store_value(cell, data, row % cell.slots, y + columns_ / 2 + head * cell.head_dim);
    }
  }
  state.store(2);
  made_.fetch_add(1);
}

void Bank::release_source() {
  source_.stored.reset();
  std::vector<float>().swap(source_.projections);
  std::vector<float>().swap(source_.scales);
}

int64_t Bank::bytes() const {
  int64_t made = 0;
  for (size_t chunk = 0; chunk < state_.size(); chunk++) {
    const int64_t within = static_cast<int64_t>(chunk) % chunks_of_span() * attention_block;
    if (state_[chunk].load() == 2) made += std::min(attention_block, span - within);
  }
  return made * cache_->page_bytes() / cache_->cell().slots;
}

}  // namespace mnemos
