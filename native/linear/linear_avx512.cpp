// The matrix products with AVX-512 and its integer dot product (VNNI).
#include "linear/avx512.h"

namespace mnemos {

const Kernels avx512_kernels{"avx512", Form::f32, prepare_all<Avx512>, multiply_all<Avx512>};

}  // namespace mnemos
