// What the tasks of attention share: a head's rows, and where their partial results are.
#pragma once

#include "program/tasks.h"

namespace mnemos {

inline int64_t group_of(const Attention &a) { return a.heads / a.kv_heads; }

// A rotation of one position; without cosines it is none.
struct Rotation {
  const float *cosines = nullptr, *sines = nullptr;
  int64_t half = 0;
};

inline Rotation rotation(const RopeTable *rope, int64_t position) {
  if (rope == nullptr) return {};
  return {rope->cosines(position), rope->sines(position), rope->half()};
}

// y = one head of queries or keys, normed, rotated and scaled.
inline void transform(const Step &step, const Norm &norm, const Rotation &by, float factor, int64_t head_dim,
                      const float *x, float *y) {
  if (norm.kind != Norm::none) {
    step.kernels->rms_norm(x, norm.weight->data(), norm.epsilon, y, 1, head_dim);
    x = y;
  }
  const int64_t rotated = 2 * by.half;
  if (rotated > 0) step.kernels->rope(x, by.cosines, by.sines, factor, y, by.half);
  if (rotated < head_dim) step.kernels->scale(x + rotated, factor, y + rotated, head_dim - rotated);
}

// Floats of one partial result: values of every query of the group, then maxima and sums.
inline int64_t partial_floats(const Attention &a) {
  return group_of(a) * a.cache->cell().value_stride + 2 * ((group_of(a) + 15) / 16 * 16);
}

// Where the pages that rows of long texts name begin, after the partial results.
inline int64_t named_begin(const TileSet &tiles, const Attention &a) {
  return tiles.partials * a.kv_heads * partial_floats(a);
}

}  // namespace mnemos
