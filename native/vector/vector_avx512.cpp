#include "vector/vector_kernels_impl.h"

namespace mnemos {

const VectorKernels avx512_vector_kernels = table;

}  // namespace mnemos
