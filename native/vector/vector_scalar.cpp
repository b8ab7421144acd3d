#include "vector/vector_kernels_impl.h"

namespace mnemos {

extern const VectorKernels scalar_vector_kernels;
const VectorKernels scalar_vector_kernels = table;

}  // namespace mnemos
