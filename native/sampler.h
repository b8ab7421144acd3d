// From a row of logits to a token, without sorting the vocabulary.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "vector/vector_kernels.h"

namespace mnemos {

// Philox4x32-10 (Salmon et al. 2011): 53 random bits as a number in [0, 1). `position` is the lower and `draw`
// the upper half of the counter, so the number depends on nothing else.
double uniform(uint64_t seed, uint64_t position, uint64_t draw);

// The cut-offs, in this order: top_k (0: nothing), top_p (1: nothing), min_p (0: nothing).
struct Cutoffs {
  float temperature;
  int64_t top_k;
  double top_p, min_p;
};

// One row at a time, and one instance per thread.
class Sampler {
 public:
  explicit Sampler(const VectorKernels &kernels) : kernels_(kernels) {}

  // The token at `random` in the cumulative distribution over tokens in descending probability, ties by
  // ascending id. Tokens as probable as the last of the top_k stay. Throws Error (request) if a logit is not a number
  // or plus infinity, or all are minus infinity.
  int32_t sample(const float *logits, int64_t n, const Cutoffs &cutoffs, double random);
  // The lowest id of the largest logit; throws as `sample` does.
  int32_t greedy(const float *logits, int64_t n);
  // The most probable tokens, descending, ties by ascending id.
  std::vector<int32_t> top(const float *logits, int64_t n, int64_t count);
  double log_sum_exp(const float *logits, int64_t n);

 private:
  // A place in the descending order of tokens, and the sum of all weights up to and including it.
  struct Place {
    int32_t token;
    double sum;
  };

  float finite_peak(const float *logits, int64_t n);
  // Puts at least the `count` largest logits' ids into candidates_, sorted; all those as large as the last are
  // included.
  void collect(const float *logits, int64_t n, int64_t count);
  // `sample` by sorting the `count` most probable tokens; nothing if that many do not suffice.
  std::optional<int32_t> sample_among(const float *logits, int64_t n, const Cutoffs &cutoffs, double random, float peak,
                                      int64_t count);
  // `sample` by sums over bins of logits, whatever their distribution; without top_k.
  int32_t sample_by_bins(const float *logits, int64_t n, const Cutoffs &cutoffs, double random, float peak);
  // The first token at which the sum of weights_ in descending order of logits exceeds `goal` (or_equal: reaches it),
  // the last token of any weight if none is.
  Place find(const float *logits, int64_t n, double goal, bool or_equal);

  const VectorKernels &kernels_;
  std::vector<float> block_peaks_;
  std::vector<int32_t> candidates_;
  std::vector<double> cumulative_;
  std::vector<float> weights_;
  std::vector<double> bins_;
};

}  // namespace mnemos
