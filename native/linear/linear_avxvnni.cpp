// The matrix products with AVX2 and the 256-bit integer dot product.
#include "linear/avx2.h"

namespace mnemos {

const ProductKernels avxvnni_kernels = kernels_of<AvxVnni>("avxvnni");

}  // namespace mnemos
