// Products of pseudo-random weights and activations of every type, one hash per line: builds for other processors and
// with other kernels must print the same lines. With a sanitizer it shows that nothing is read or written outside the
// buffers, which here have exactly the required size.
//   hash_products KERNELS
// With a second name, products of other shapes are compared bit by bit between the two.
//   hash_products KERNELS OTHERS
#include <cstdio>
#include <cstring>
#include <memory>
#include <vector>

#include "tests/check_products.h"

using namespace mnemos;

namespace {

struct Random {
  uint32_t state;
  uint32_t next() { return (state = state * 1664525 + 1013904223) >> 8; }
};

struct Hash {
  uint64_t value = 1469598103934665603ull;
  void add(const std::vector<float> &values) {
    for (float x : values) {
      uint32_t bits;
      memcpy(&bits, &x, 4);
      value = (value ^ bits) * 1099511628211ull;
    }
  }
};

struct AlignedDelete {
  void operator()(void *p) const { ::operator delete(p, std::align_val_t(64)); }
};

void check(WeightType type, bool as_float32, bool precise, int64_t rows, int64_t columns, int64_t tokens,
           const ProductKernels &kernels) {
  Random random{uint32_t(type) + 1};
  std::vector<uint8_t> raw(size_t(row_bytes(type, columns) * rows));
  for (uint8_t &byte : raw) byte = uint8_t((random.next() >> 16) % 0x34);  // floats below 0.25
  Matrix matrix(type, rows, columns, as_float32, kernels);
  place({&matrix});
  const Form form = matrix.input_form(precise);
  pack_panels(matrix, raw.data(), 0, matrix.panels());

  std::vector<float> x(size_t(tokens * columns)), y(size_t(tokens * rows)), row(size_t(columns), 0.0f);
  for (float &value : x) value = float(int32_t(random.next()) - (1 << 23)) / float(1 << 22);
  const std::unique_ptr<void, AlignedDelete> workspace(
      ::operator new(input_bytes(form, tokens, columns), std::align_val_t(64)));
  const Input input = bind_input(kernels, form, tokens, columns, workspace.get());
  prepare_rows(input, x.data(), columns, 0, tokens);
  multiply(matrix, input, 0, tokens, 0, matrix.panels(), y.data(), rows, nullptr, 0);

  Hash hash;
  hash.add(y);
  for (int64_t r = 0; r < rows; r++) {
    dequantize_row(matrix, r, row.data());
    hash.add(row);
  }
  printf("type %2d form %d %3lld x %4lld, %2lld rows: %016llx\n", int(type), int(form), (long long)rows,
         (long long)columns, (long long)tokens, (unsigned long long)hash.value);
}

}  // namespace

int main(int count, char **arguments) {
  const ProductKernels *kernels = count >= 2 ? find_kernels(arguments[1]) : nullptr;
  const ProductKernels *others = count == 3 ? find_kernels(arguments[2]) : nullptr;
  if (kernels == nullptr || (count > 2 && others == nullptr)) {
    fprintf(stderr, "usage: hash_products KERNELS [OTHERS]; this machine can run:");
    for (const ProductKernels *one : runnable_kernels()) fprintf(stderr, " %s", name_of(*one));
    fprintf(stderr, "\n");
    return 2;
  }
  if (others != nullptr) return check_products(*kernels, *others) != 0;
  for (int32_t type = 0; type < 64; type++) {
    if (!is_weight_type(type)) continue;
    const auto weight = WeightType(type);
    const int64_t block = block_columns(weight), columns = block == 1 ? 333 : block == 32 ? 1568 : 1536;
    for (int64_t tokens : {1, 2, 5, 15, 37}) {
      check(weight, false, false, 45, columns, tokens, *kernels);
      check(weight, false, true, 45, columns, tokens, *kernels);
      check(weight, true, false, 45, columns, tokens, *kernels);
    }
  }
}
