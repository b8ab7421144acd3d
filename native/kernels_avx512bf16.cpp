#include "kernels_impl.h"

#include "attention_dots.h"

namespace mnemos {

extern const VectorKernels avx512bf16_vector_kernels;
const VectorKernels avx512bf16_vector_kernels = table_with(attend_by_dots);

}  // namespace mnemos
