// The matrix products with AVX-512, VNNI and the bfloat16 dot product.
#include "linear/avx512bf16.h"

namespace mnemos {

const ProductKernels avx512bf16_kernels = kernels_of<Avx512Bf16>("avx512_bf16");

}  // namespace mnemos
