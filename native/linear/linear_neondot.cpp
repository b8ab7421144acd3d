// The matrix products with NEON and its integer dot product.
#include "linear/neon.h"

namespace mnemos {

const ProductKernels neon_kernels = kernels_of<Neon>("neon");

}  // namespace mnemos
