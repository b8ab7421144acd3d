#include "vector/vector_kernels_impl.h"

#include "vector/attention_dots.h"

namespace mnemos {

extern const VectorKernels avx512bf16_vector_kernels;
const VectorKernels avx512bf16_vector_kernels = table_with(attend_by_dots);

}  // namespace mnemos
