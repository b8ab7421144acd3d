#include "system/bounds.h"

#include <algorithm>
#include <atomic>
#include <chrono>

#include "system/mapping.h"

namespace mnemos {

double read_bandwidth(Pool &pool, int64_t bytes, int repeats) {
  constexpr int64_t lanes = 16;  // independent sums, so that the additions do not wait for each other
  constexpr int64_t ahead = 512;  // words: prefetched the way the kernels prefetch weights
  const int64_t share = std::max<int64_t>(bytes / 8 / pool.threads() / lanes, 1) * lanes;
  const auto count = static_cast<uint64_t>(share * pool.threads());
  uint8_t *memory = map_memory(count * 8, "measuring the bandwidth");
  prefer_large_pages(memory, count * 8);
  auto *words = reinterpret_cast<uint64_t *>(memory);
  std::fill_n(words, count, 1);
  std::atomic<uint64_t> total{0};
  double best = 0;
  for (int i = 0; i < repeats; i++) {
    const auto start = std::chrono::steady_clock::now();
    pool.on_each([&](int thread) {
      const uint64_t *own = words + thread * share;
      uint64_t sums[lanes] = {};
      for (int64_t at = 0; at < share; at += lanes) {
        for (int64_t line = 0; line < lanes; line += 8) __builtin_prefetch(own + at + ahead + line);
        for (int64_t lane = 0; lane < lanes; lane++) sums[lane] += own[at + lane];
      }
      uint64_t sum = 0;
      for (const uint64_t lane : sums) sum += lane;
      total.fetch_add(sum, std::memory_order_relaxed);
    });
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    best = std::max(best, static_cast<double>(count * 8) / seconds.count());
  }
  unmap_memory(memory, count * 8);
  // Every word is 1: using the sum keeps the compiler from omitting the reads.
  return total.load() == static_cast<uint64_t>(repeats) * count ? best : 0;
}

double multiply_rate(Pool &pool, const ProductKernels &kernels, Form form, int repeats) {
  constexpr int64_t rounds = 200'000;  // about a millisecond
  std::atomic<int64_t> products{0};
  double best = 0;
  for (int i = 0; i < repeats; i++) {
    products = 0;
    const auto start = std::chrono::steady_clock::now();
    pool.on_each([&](int) { products += multiply_registers(kernels, form, rounds); });
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    best = std::max(best, static_cast<double>(products.load()) / seconds.count());
  }
  return best;
}

}  // namespace mnemos
