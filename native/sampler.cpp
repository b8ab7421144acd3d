#include "sampler.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <string>

#include "error.h"

namespace mnemos {
namespace {

constexpr int64_t block = 64;
constexpr int64_t first_candidates = 256;

}  // namespace

double uniform(uint64_t seed, uint64_t position, uint64_t draw) {
  uint32_t low = static_cast<uint32_t>(seed), high = static_cast<uint32_t>(seed >> 32);
  uint32_t a = static_cast<uint32_t>(position), b = static_cast<uint32_t>(position >> 32);
  uint32_t c = static_cast<uint32_t>(draw), d = static_cast<uint32_t>(draw >> 32);
  for (int round = 0; round < 10; round++) {
    const uint64_t first = uint64_t{0xD2511F53} * a, second = uint64_t{0xCD9E8D57} * c;
    a = static_cast<uint32_t>(second >> 32) ^ b ^ low;
    b = static_cast<uint32_t>(second);
    c = static_cast<uint32_t>(first >> 32) ^ d ^ high;
    d = static_cast<uint32_t>(first);
    low += 0x9E3779B9;
    high += 0xBB67AE85;
  }
  return (static_cast<double>(a >> 5) * 67108864.0 + static_cast<double>(b >> 6)) / 9007199254740992.0;
}

float Sampler::finite_peak(const float *logits, int64_t n) {
  const float peak = kernels_.largest(logits, n);
  if (std::isfinite(peak)) return peak;
  if (peak == -INFINITY) throw request_error("every token is forbidden here: no logit is above minus infinity");
  throw request_error("the largest logit is " + std::to_string(peak) + "; logits must be finite to choose a token");
}

int32_t Sampler::greedy(const float *logits, int64_t n) {
  const float peak = finite_peak(logits, n);
  int32_t token = 0;
  kernels_.select_at_least(logits, peak, &token, 1, n);
  return token;
}

void Sampler::collect(const float *logits, int64_t n, int64_t count) {
  float threshold = -INFINITY;
  if (count * 2 < n / block) {
    // The count-th largest of the blocks' maxima is at most the count-th largest of all.
    block_peaks_.clear();
    for (int64_t i = 0; i < n; i += block) block_peaks_.push_back(kernels_.largest(logits + i, std::min(block, n - i)));
    std::nth_element(block_peaks_.begin(), block_peaks_.begin() + (count - 1), block_peaks_.end(), std::greater<>());
    threshold = block_peaks_[static_cast<size_t>(count - 1)];
  }
  candidates_.resize(static_cast<size_t>(n));
  const int64_t found = kernels_.select_at_least(logits, threshold, candidates_.data(), n, n);
  candidates_.resize(static_cast<size_t>(found));
  const auto before = [&](int32_t a, int32_t b) { return logits[a] > logits[b] || (logits[a] == logits[b] && a < b); };
  if (found > count) {
    const auto middle = candidates_.begin() + (count - 1);
    std::nth_element(candidates_.begin(), middle, candidates_.end(), before);
    const float last = logits[*middle];
    const auto end = std::partition(middle, candidates_.end(), [&](int32_t id) { return logits[id] >= last; });
    candidates_.erase(end, candidates_.end());
  }
  std::sort(candidates_.begin(), candidates_.end(), before);
}

std::vector<int32_t> Sampler::top(const float *logits, int64_t n, int64_t count) {
  const int64_t wanted = std::min(count, n);
  if (wanted <= 0) return {};
  collect(logits, n, wanted);
  const auto end = candidates_.begin() + std::min<int64_t>(wanted, static_cast<int64_t>(candidates_.size()));
  return {candidates_.begin(), end};
}

int32_t Sampler::sample(const float *logits, int64_t n, const Cutoffs &cutoffs, double random) {
  const float peak = finite_peak(logits, n);
  const bool limited = cutoffs.top_k > 0 && cutoffs.top_k < n;
  const double inverse = 1.0 / static_cast<double>(cutoffs.temperature);
  const auto weight = [&](int32_t id) { return std::exp(static_cast<double>(logits[id] - peak) * inverse); };
  const double all = limited ? 0 : kernels_.sum_exp(logits, peak, static_cast<float>(inverse), n);
  const auto accumulate = [&] {
    cumulative_.clear();
    double sum = 0;
    for (int32_t id : candidates_) {
      const double added = weight(id);
      if (added == 0) break;  // a forbidden token must not be drawn, even where rounding puts the target beyond the sum
      cumulative_.push_back(sum += added);
    }
    candidates_.resize(cumulative_.size());
  };
  int64_t size = limited ? cutoffs.top_k : first_candidates;
  // Without top_k, as many candidates as the draw or the cut needs.
  for (;; size *= 8) {
    collect(logits, n, std::min(size, n));
    accumulate();
    const double reach = all * (cutoffs.top_p < 1 ? cutoffs.top_p : random);
    const bool cut_by_min_p = cutoffs.min_p > 0 && weight(candidates_.back()) < cutoffs.min_p;
    if (limited || size >= n || cut_by_min_p || (cutoffs.min_p <= 0 && cumulative_.back() > reach)) break;
    if (cutoffs.top_p < 1 && cumulative_.back() > reach) break;
  }
  const double total = limited ? cumulative_.back() : all;
  auto end = cumulative_.end();
  if (cutoffs.top_p < 1) {
    end = std::lower_bound(cumulative_.begin(), end, cutoffs.top_p * total);
    if (end != cumulative_.end()) ++end;
  }
  if (cutoffs.min_p > 0) {
    const auto low = std::partition_point(candidates_.begin(), candidates_.end(),
                                          [&](int32_t id) { return weight(id) >= cutoffs.min_p; });
    end = std::min(end, cumulative_.begin() + std::max<int64_t>(1, low - candidates_.begin()));
  }
  const bool cut = cutoffs.top_p < 1 || cutoffs.min_p > 0;
  const double target = random * (cut ? *(end - 1) : total);
  const auto place = std::upper_bound(cumulative_.begin(), end, target);
  return candidates_[static_cast<size_t>(std::min(place, end - 1) - cumulative_.begin())];
}

double Sampler::log_sum_exp(const float *logits, int64_t n) {
  const float peak = kernels_.largest(logits, n);
  if (!std::isfinite(peak)) return static_cast<double>(peak);
  return static_cast<double>(peak) + std::log(kernels_.sum_exp(logits, peak, 1.0f, n));
}

}  // namespace mnemos
