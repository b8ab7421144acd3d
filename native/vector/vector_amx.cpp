#include "vector/vector_kernels_impl.h"

#include "vector/attention_tiles.h"

namespace mnemos {

extern const VectorKernels amx_vector_kernels;
const VectorKernels amx_vector_kernels = table_with(attend_in_tiles);

}  // namespace mnemos
