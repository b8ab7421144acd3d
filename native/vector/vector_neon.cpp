#include "vector/vector_kernels_impl.h"

namespace mnemos {

extern const VectorKernels neon_vector_kernels;
const VectorKernels neon_vector_kernels = table;

}  // namespace mnemos
