#include "vector/vector_kernels_impl.h"

namespace mnemos {

extern const VectorKernels avx512_vector_kernels;
const VectorKernels avx512_vector_kernels = table;

}  // namespace mnemos
