#include "vector/vector_kernels_impl.h"

namespace mnemos {

extern const VectorKernels avx2_vector_kernels;
const VectorKernels avx2_vector_kernels = table;

}  // namespace mnemos
