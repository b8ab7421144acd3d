// Operators of a forward pass that is run elsewhere, one call each: products, attention of single queries.
//
// Between two calls the caller works on one core, and the others have nothing to do but read what the next products
// will need into their caches: all passes go the same way, so the order of the last one predicts the next.
#pragma once

#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include "program/tasks.h"
#include "system/pool.h"
#include "vector/vector_kernels.h"

namespace mnemos {

// Attention of one query each, (batch, heads, head_dim), over `count` keys and values, (batch, kv_heads, count,
// head_dim), those of a head being adjacent. Neighbouring heads share keys: `heads` is a multiple of
// `kv_heads`.
struct PlainAttention {
  struct Heads {
    const float *data;
    int64_t batch_step, head_step;  // in floats
    const float *head(int64_t b, int64_t h) const { return data + b * batch_step + h * head_step; }
  };
  int64_t batch, heads, kv_heads, count, head_dim;
  Heads queries, keys, values;
  float scale = 1;
  float *y = nullptr;  // (batch, heads, head_dim), contiguous
};

class ForeignStep {
 public:
  explicit ForeignStep(std::shared_ptr<Pool> pool);
  ~ForeignStep();
  ForeignStep(const ForeignStep &) = delete;
  ForeignStep &operator=(const ForeignStep &) = delete;

  // A product y = x W^T + bias; returns its number. With `precise`, activations that quantized weights meet are rounded
  // to 15 bits instead of 8. Throws Error (config) if the weights are in float16, or the bias does not fit.
  int add(MatrixPointer matrix, VectorPointer bias, bool precise);
  // Replaces a product.
  void replace(int number, MatrixPointer matrix, VectorPointer bias);
  // x (rows, columns) and y (rows, the matrix's rows), contiguous and of the weights' type, with quantized weights
  // float32; sums are float32. Throws Error (config) if there is no such product.
  void multiply(int number, const void *x, int64_t rows, void *y);
  // Throws Error (config) if the sizes do not fit together.
  void attend(const PlainAttention &attention);

 private:
  struct Link {
    MatrixPointer matrix;
    VectorPointer bias;
    bool precise = false;
    PlainAttention attention{};  // that followed it the last time, large enough to be shared; or of nothing
    int next = -1;  // the product that followed it the last time
    std::vector<int64_t> fetched;  // per thread: bytes of its part that it has read ahead since the last product
  };

  Link &link(int number);
  Link checked(MatrixPointer matrix, VectorPointer bias, bool precise) const;
  bool passes_by() const;  // weights are read bypassing the caches
  Input input_of(const Link &link, const void *x, int64_t rows);
  Input quantized_input(const Link &link, const float *x, int64_t rows);
  void share(int64_t items, const std::function<void(int64_t item, int thread)> &body);
  void fetch_ahead();
  bool fetch(const PlainAttention &a, int thread, int64_t *left) const;
  bool fetch(Link &link, int thread, int64_t *left) const;

  const std::shared_ptr<Pool> pool_;
  const VectorKernels &kernels_;
  const ProductKernels *const brief_kernels_;  // of few rows in float32; null: the matrices' own
  std::vector<Link> links_;
  int64_t bytes_ = 0;  // of all weights
  int last_ = -1;
  bool attended_ = false;  // since the last product
  std::vector<uint8_t> padded_;  // an input, as its product takes it
  std::vector<float> sums_;  // of products whose results are rounded to bfloat16
  std::vector<std::vector<float>> scores_;  // per thread
  std::mutex mutex_;
};

}  // namespace mnemos
