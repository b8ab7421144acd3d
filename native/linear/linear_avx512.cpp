// The matrix products with AVX-512 and its integer dot product (VNNI).
#include "linear/avx512.h"

namespace mnemos {

const ProductKernels avx512_kernels = kernels_of<Avx512>("avx512");

}  // namespace mnemos
