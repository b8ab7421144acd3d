// From a row of logits to a token, without sorting the vocabulary.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels.h"

namespace mnemos {

// Philox4x32-10 (Salmon et al. 2011): 53 random bits as a number from 0 to below 1. `position` is the lower and `draw` the
// upper half of the counter, so the number depends on nothing else.
double uniform(uint64_t seed, uint64_t position, uint64_t draw);

// What is cut off, in this order: top_k (0: nothing), top_p (1: nothing), min_p (0: nothing).
struct Cutoffs {
  float temperature;
  int64_t top_k;
  double top_p, min_p;
};

class Sampler {
 public:
  explicit Sampler(const VectorKernels &kernels) : kernels_(kernels) {}

  // The token at `random` of the cumulative distribution over tokens in descending probability, equal ones by
  // ascending id. Tokens as probable as the last of the top_k stay. Throws Error (request) if no logit is finite.
  int32_t sample(const float *logits, int64_t n, const Cutoffs &cutoffs, double random);
  // The lowest id of the largest logit.
  int32_t greedy(const float *logits, int64_t n);
  // The most probable tokens, descending, equal ones by ascending id.
  std::vector<int32_t> top(const float *logits, int64_t n, int64_t count);
  double log_sum_exp(const float *logits, int64_t n);

 private:
  float finite_peak(const float *logits, int64_t n);
  // Puts at least the `count` largest logits' ids into candidates_, sorted; all that are as large as the last are there.
  void collect(const float *logits, int64_t n, int64_t count);

  const VectorKernels &kernels_;
  std::vector<float> block_peaks_;
  std::vector<int32_t> candidates_;
  std::vector<double> cumulative_;
};

}  // namespace mnemos
