#include "linear/compare.h"

#include <cstring>
#include <memory>
#include <new>
#include <vector>

namespace mnemos {
namespace {

struct Random {
  uint32_t state;
  uint32_t next() { return (state = state * 1664525 + 1013904223) >> 8; }
};

struct AlignedDelete {
  void operator()(void *p) const { ::operator delete(p, std::align_val_t(64)); }
};

// The kinds of weights and activations. Sums of small whole numbers are exact, in whatever order.
enum class Numbers { any, whole };

// Any bytes are codes and subscales; the float16 scales at the end of a record are small numbers of both signs. Weights
// in bfloat16 are such numbers too, or whole ones.
void fill(Matrix &matrix, Numbers numbers, Random random) {
  const Layout &layout = matrix.layout;
  if (!layout.quantized()) {
    auto *weight = reinterpret_cast<uint16_t *>(matrix.panel(0));
    for (size_t i = 0; i < matrix.bytes() / sizeof *weight; i++)
      weight[i] = numbers == Numbers::whole ? float_to_bfloat(float(int32_t(random.next() >> 20) - 8))
                                            : uint16_t(0x3c00 | (random.next() & 0x83ff));
    return;
  }
  const int supers = layout.minimum() ? 32 : 16, record_bytes = layout.record_bytes();
  uint8_t *record = matrix.panel(0), *end = record + matrix.bytes();
  for (; record < end; record += record_bytes) {
    for (int i = 0; i < record_bytes; i++) record[i] = uint8_t(random.next() >> 12);
    for (int i = 0; i < supers; i++) {
      const uint16_t scale = uint16_t(0x1c00 | (random.next() & 0x8fff));
      memcpy(record + record_bytes - (supers - i) * 2, &scale, 2);
    }
  }
}

// This many rows are multiplied at once.
std::vector<float> product(const ProductKernels &kernels, const ProductShape &shape, Numbers numbers,
                           int64_t together) {
  Random random{uint32_t(shape.type) * 977 + uint32_t(shape.tokens)};
  Matrix matrix(shape.type, shape.rows, shape.columns, false, kernels);
  place({&matrix});
  fill(matrix, numbers, random);
  matrix.find_raises(0, matrix.panels());
  std::vector<float> x(size_t(shape.tokens * shape.columns)), y(size_t(shape.tokens * shape.rows)),
      bias(size_t(shape.rows));
  for (float &value : x) {
    const int32_t number = int32_t(random.next()) - (1 << 23);
    value = numbers == Numbers::whole ? float(number >> 16) : float(number) / float(1 << 22);
  }
  for (float &value : bias) value = float(random.next() >> (numbers == Numbers::whole ? 4 : 0));
  const Form form = matrix.input_form(shape.precise);
  const std::unique_ptr<void, AlignedDelete> workspace(
      ::operator new(input_bytes(form, shape.tokens, shape.columns), std::align_val_t(64)));
  const Input input = bind_input(kernels, form, shape.tokens, shape.columns, workspace.get());
  prepare_rows(input, x.data(), shape.columns, 0, shape.tokens);
  for (int64_t row = 0; row < shape.tokens; row += together)
    multiply(matrix, input, row, row + together < shape.tokens ? row + together : shape.tokens, 0, matrix.panels(),
             y.data(), shape.rows, shape.bias ? bias.data() : nullptr, 0);
  return y;
}

bool same_bits(const std::vector<float> &a, const std::vector<float> &b) {
  return memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

}  // namespace

bool same_products(const ProductKernels &one, const ProductKernels &other, const ProductShape &shape) {
  const Numbers numbers = shape.type == WeightType::bf16 ? Numbers::whole : Numbers::any;
  return same_bits(product(one, shape, numbers, shape.tokens), product(other, shape, numbers, shape.tokens));
}

bool same_alone(const ProductKernels &kernels, const ProductShape &shape) {
  return same_bits(product(kernels, shape, Numbers::any, shape.tokens), product(kernels, shape, Numbers::any, 1));
}

bool near_products(const ProductKernels &one, const ProductKernels &other, const ProductShape &shape) {
  const std::vector<float> a = product(one, shape, Numbers::any, shape.tokens);
  const std::vector<float> b = product(other, shape, Numbers::any, shape.tokens);
  double squares = 0, errors = 0, largest = 0;
  for (size_t i = 0; i < a.size(); i++) {
    const double error = double(a[i]) - double(b[i]);
    squares += double(b[i]) * double(b[i]), errors += error * error;
    largest = error * error > largest ? error * error : largest;
  }
  return errors <= 1e-4 * squares && largest * double(a.size()) <= 2.5e-3 * squares;
}

bool same_products(const ProductKernels &one, const ProductKernels &other) {
  for (WeightType type : {WeightType::q4_1, WeightType::q8_0, WeightType::q2_k, WeightType::q6_k})
    for (bool precise : {false, true})
      if (!same_products(one, other, {type, precise, 40, 256, 21, precise})) return false;
  return same_products(one, other, {WeightType::bf16, false, 40, 333, 37, true}) &&
         same_alone(one, {WeightType::bf16, false, 40, 333, 37, false});
}

bool right_products(const ProductKernels &kernels, const ProductKernels &other) {
  for (WeightType type : {WeightType::q4_1, WeightType::q8_0, WeightType::q2_k, WeightType::q6_k}) {
    const ProductShape shape{type, false, 40, 256, 35, true};
    if (!near_products(kernels, other, shape) || !same_alone(kernels, shape)) return false;
  }
  return true;
}

}  // namespace mnemos
