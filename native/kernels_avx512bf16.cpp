#include "kernels_impl.h"

#include "attention_dots.h"

namespace mnemos {
namespace {

constexpr VectorKernels with_dots() {
  VectorKernels kernels = table;
  kernels.attend = attend_by_dots;
  return kernels;
}

}  // namespace

extern const VectorKernels avx512bf16_vector_kernels;
const VectorKernels avx512bf16_vector_kernels = with_dots();

}  // namespace mnemos
