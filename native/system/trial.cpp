#include "system/trial.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <vector>

#include "cache.h"
#include "system/denormals.h"

namespace mnemos {
namespace {

constexpr int runs = 5, many_rows = 48, repeats_of_few = 16;

// The median of some runs, after one that fills the caches.
template <typename Work>
double seconds_of(const Work &work) {
  using Clock = std::chrono::steady_clock;
  std::vector<double> times;
  for (int run = -1; run < runs; run++) {
    const auto start = Clock::now();
    work();
    if (run >= 0) times.push_back(std::chrono::duration<double>(Clock::now() - start).count());
  }
  std::nth_element(times.begin(), times.begin() + runs / 2, times.end());
  return times[runs / 2];
}

size_t size(int64_t count) { return static_cast<size_t>(count); }

// Numbers between -1 and 1, the same every time.
std::vector<float> numbers(int64_t count) {
  std::vector<float> values(size(count));
  uint32_t state = 1;
  for (float &value : values) {
    state = state * 1664525 + 1013904223;
    value = static_cast<float>(static_cast<int32_t>(state)) * 0x1p-31f;
  }
  return values;
}

// Bytes below 0x34, which make every type's scales ordinary numbers; but not for float32, whose exponents they would
// be.
std::vector<uint8_t> weight_bytes(WeightType type, int64_t rows, int64_t columns) {
  std::vector<uint8_t> bytes(size(rows * row_bytes(type, columns)));
  if (type == WeightType::f32) {
    const std::vector<float> values = numbers(rows * columns);
    std::copy_n(reinterpret_cast<const uint8_t *>(values.data()), bytes.size(), bytes.begin());
    return bytes;
  }
  uint32_t state = 1;
  for (uint8_t &byte : bytes) {
    state = state * 1664525 + 1013904223;
    byte = static_cast<uint8_t>(0x10 + (state >> 24) % 0x24);
  }
  return bytes;
}

double time_product(const ProductKernels &kernels, WeightType type, int64_t rows) {
  constexpr int64_t outputs = 256, columns = 512;
  Matrix matrix(type, outputs, columns, false, kernels);
  place({&matrix});
  pack_panels(matrix, weight_bytes(type, outputs, columns).data(), 0, matrix.panels());
  constexpr size_t alignment = 64;
  std::vector<uint8_t> workspace(input_bytes(matrix.form, rows, columns) + alignment);
  uint8_t *aligned =
      workspace.data() + (alignment - reinterpret_cast<uintptr_t>(workspace.data()) % alignment) % alignment;
  const Input input = bind_input(kernels, matrix.form, rows, columns, aligned);
  const std::vector<float> x = numbers(rows * columns);
  std::vector<float> y(size(rows * outputs));
  const int repeats = rows == 1 ? repeats_of_few : 1;
  return seconds_of([&] {
           for (int i = 0; i < repeats; i++) {
             prepare_rows(input, x.data(), columns, 0, rows);
             multiply(matrix, input, 0, rows, 0, matrix.panels(), y.data(), outputs, nullptr, 0);
           }
         }) /
         repeats;
}

// `rows` queries, the last one at the last of the positions.
double time_rows(const VectorKernels &kernels, const Cache &cache, int64_t positions, int64_t rows) {
  const CellLayout &cell = cache.cell();
  const int64_t stride = cell.value_stride;
  const std::vector<float> queries = numbers(rows * stride);
  std::vector<float> scores(size(rows * score_stride)), partial(size(rows * stride)), result(size(rows * stride));
  std::vector<float> expanded(size(expanded_floats(cell) + rows * stride)), most(size(rows)), total(size(rows));
  std::vector<int64_t> first(size(rows), 0), last(size(rows), positions - 1);
  std::vector<int32_t> table(size(cache.pages));
  for (size_t page = 0; page < table.size(); page++) table[page] = static_cast<int32_t>(page);
  std::vector<KeyBlock> blocks;
  for (int64_t start = 0; start < positions; start += attention_block) {
    blocks.push_back({start, start, start + attention_block - 1, &table[size(start / cell.slots)]});
  }
  AttentionTile tile{};
  tile.cell = &cell, tile.cells = cache.cells(0, 0), tile.page_bytes = cache.page_bytes(), tile.blocks = blocks.data();
  tile.rows = rows, tile.first = first.data(), tile.last = last.data();
  tile.queries = queries.data(), tile.scores = scores.data(), tile.partial = partial.data(),
  tile.expanded = expanded.data();
  tile.most = most.data(), tile.total = total.data(), tile.result = result.data();
  return seconds_of([&] {
    std::fill(most.begin(), most.end(), -INFINITY);
    std::fill(total.begin(), total.end(), 0.0f);
    kernels.attend(tile, 0, positions / attention_block);
  });
}

}  // namespace

double time_products(const ProductKernels &kernels, bool quantized) {
  const DenormalsAreZero denormals;
  // Without minima, with them, with two scales per block.
  static const std::vector<WeightType> quantized_types{WeightType::q8_0, WeightType::q4_k, WeightType::q6_k};
  static const std::vector<WeightType> float_types{WeightType::bf16, WeightType::f16, WeightType::f32};
  double logarithms = 0;
  const auto &types = quantized ? quantized_types : float_types;
  for (const WeightType type : types) {
    for (const int64_t rows : {1, many_rows}) logarithms += std::log(time_product(kernels, type, rows));
  }
  return std::exp(logarithms / static_cast<double>(2 * types.size()));
}

double time_attention(const VectorKernels &kernels, bool bfloats) {
  const DenormalsAreZero denormals;
  constexpr int64_t head_dim = 64, slots = 32, positions = 512, decode_rows = 4, prompt_rows = 96;
  Cache cache(1, 1, head_dim, slots, bfloats ? CacheType::bfloat16 : CacheType::float16, positions / slots);
  const std::vector<float> keys = numbers(positions * head_dim);
  for (int64_t t = 0; t < positions; t++) {
    uint8_t *cell = cache.cells(0, 0) + t / slots * cache.page_bytes();
    kernels.store_key(cache.cell(), cell, t % slots, &keys[size(t * head_dim)]);
    kernels.store_value(cache.cell(), cell, t % slots, &keys[size(t * head_dim)]);
  }
  return std::sqrt(time_rows(kernels, cache, positions, decode_rows) *
                   time_rows(kernels, cache, positions, prompt_rows));
}

}  // namespace mnemos
