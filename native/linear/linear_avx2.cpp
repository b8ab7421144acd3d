// The matrix products with AVX2, FMA and F16C.
#include "linear/avx2.h"

namespace mnemos {

const ProductKernels avx2_kernels = kernels_of<Avx2>("avx2");

}  // namespace mnemos
