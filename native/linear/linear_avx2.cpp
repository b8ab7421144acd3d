// The matrix products with AVX2, FMA and F16C.
#include "linear/avx2.h"

namespace mnemos {

const Kernels avx2_kernels{"avx2", Form::f32, prepare_all<Avx2>, multiply_all<Avx2>};

}  // namespace mnemos
