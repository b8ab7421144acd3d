#include "sampler.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <string>

#include "system/error.h"

namespace mnemos {
namespace {

constexpr int64_t block = 64;
constexpr int64_t few = 256;  // candidates to sort before trying anything else
constexpr int64_t small = 1024;  // a vocabulary this small is simply sorted
constexpr int64_t bin_count = 2048;

// A number that grows as x does; the same for 0 and -0.
uint32_t ordered_bits(float x) {
  uint32_t bits;
  x += 0.0f;
  std::memcpy(&bits, &x, sizeof bits);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

bool comes_before(const float *logits, int32_t a, int32_t b) {
  return logits[a] > logits[b] || (logits[a] == logits[b] && a < b);
}

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
  const float *bad = std::find_if(logits, logits + n, [](float x) { return !(x < INFINITY); });
  throw request_error("the logit of token " + std::to_string(bad - logits) + " is " + std::to_string(*bad) +
                      "; logits must be numbers below infinity to choose a token");
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
  const auto before = [logits](int32_t a, int32_t b) { return comes_before(logits, a, b); };
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
  const int64_t count = limited ? cutoffs.top_k : n <= small ? n : std::min(few, n / (2 * block) - 1);
  const std::optional<int32_t> token = sample_among(logits, n, cutoffs, random, peak, count);
  return token ? *token : sample_by_bins(logits, n, cutoffs, random, peak);
}

std::optional<int32_t> Sampler::sample_among(const float *logits, int64_t n, const Cutoffs &cutoffs, double random,
                                             float peak, int64_t count) {
  const bool limited = cutoffs.top_k > 0 && cutoffs.top_k < n;
  const double inverse = 1.0 / static_cast<double>(cutoffs.temperature);
  const auto weight = [&](int32_t id) { return std::exp(static_cast<double>(logits[id] - peak) * inverse); };
  collect(logits, n, count);
  cumulative_.clear();
  double sum = 0;
  for (int32_t id : candidates_) {
    const double added = weight(id);
    if (added == 0) break;  // a forbidden token must not be drawn, even if rounding puts the target beyond the sum
    cumulative_.push_back(sum += added);
  }
  candidates_.resize(cumulative_.size());
  const double total = limited ? sum : kernels_.sum_exp(logits, peak, static_cast<float>(inverse), n);
  const bool cut = cutoffs.top_p < 1 || cutoffs.min_p > 0;
  if (!limited && count < n) {
    const double reach = total * (cutoffs.top_p < 1 ? cutoffs.top_p : random);
    const bool cut_by_min_p = cutoffs.min_p > 0 && weight(candidates_.back()) < cutoffs.min_p;
    const bool reached = sum > reach && (cutoffs.top_p < 1 || !cut);
    if (!cut_by_min_p && !reached) return std::nullopt;
  }
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
  const double target = random * (cut ? *(end - 1) : total);
  const auto place = std::upper_bound(cumulative_.begin(), end, target);
  return candidates_[static_cast<size_t>(std::min(place, end - 1) - cumulative_.begin())];
}

int32_t Sampler::sample_by_bins(const float *logits, int64_t n, const Cutoffs &cutoffs, double random, float peak) {
  weights_.resize(static_cast<size_t>(n));
  kernels_.exponentials(logits, peak, 1.0f / cutoffs.temperature, weights_.data(), n);
  const double total = kernels_.sum_exp(logits, peak, 1.0f / cutoffs.temperature, n);
  double left = total;
  if (cutoffs.min_p > 0) {
    const float least = static_cast<float>(cutoffs.min_p);
    left = 0;
    for (float &weight : weights_) {
      weight = weight < least ? 0 : weight;
      left += static_cast<double>(weight);
    }
  }
  if (cutoffs.top_p >= 1) return find(logits, n, random * left, false).token;
  const Place last = find(logits, n, cutoffs.top_p * total, true);
  const int32_t token = find(logits, n, random * last.sum, false).token;
  return comes_before(logits, last.token, token) ? last.token : token;  // if rounding puts the target beyond the cut
}

Sampler::Place Sampler::find(const float *logits, int64_t n, double goal, bool or_equal) {
  const auto reached = [&](double sum) { return or_equal ? sum >= goal : sum > goal; };
  double sum = 0;
  bool all = true;  // the bins are of all tokens, not of candidates_
  const auto each = [&](const auto &take) {
    if (all) {
      for (int32_t id = 0; id < n; id++) take(id);
    } else {
      for (int32_t id : candidates_) take(id);
    }
  };
  for (int shift : {21, 10, 0}) {  // first by sign, exponent and two bits, then by the remaining bits
    const auto bin_of = [&](int32_t id) { return (ordered_bits(logits[id]) >> shift) % bin_count; };
    bins_.assign(bin_count, 0.0);
    each([&](int32_t id) { bins_[bin_of(id)] += static_cast<double>(weights_[static_cast<size_t>(id)]); });
    int64_t bin = -1;
    double before = sum;
    for (int64_t b = bin_count - 1; b >= 0; b--) {
      const double added = bins_[static_cast<size_t>(b)];
      if (added == 0) continue;
      bin = b;
      before = sum;
      sum += added;
      if (reached(sum)) break;
    }
    sum = before;
    // Overwrites the last one if it was not taken: avoids a branch that is hard to predict.
    int64_t found = 0;
    if (all) candidates_.resize(static_cast<size_t>(n));
    each([&](int32_t id) {
      candidates_[static_cast<size_t>(found)] = id;
      found += (static_cast<int64_t>(bin_of(id)) == bin) & (weights_[static_cast<size_t>(id)] > 0);
    });
    candidates_.resize(static_cast<size_t>(found));
    all = false;
    if (static_cast<int64_t>(candidates_.size()) <= small) break;
  }
  // Beyond `small` all are equal, and in order of id.
  if (static_cast<int64_t>(candidates_.size()) <= small) {
    std::sort(candidates_.begin(), candidates_.end(),
              [logits](int32_t a, int32_t b) { return comes_before(logits, a, b); });
  }
  for (int32_t id : candidates_) {
    sum += static_cast<double>(weights_[static_cast<size_t>(id)]);
    if (reached(sum)) return {id, sum};
  }
  return {candidates_.back(), sum};
}

double Sampler::log_sum_exp(const float *logits, int64_t n) {
  const float peak = kernels_.largest(logits, n);
  if (peak == -INFINITY) return static_cast<double>(peak);
  if (!std::isfinite(peak))
    return std::any_of(logits, logits + n, [](float x) { return std::isnan(x); }) ? NAN : INFINITY;
  return static_cast<double>(peak) + std::log(kernels_.sum_exp(logits, peak, 1.0f, n));
}

}  // namespace mnemos
