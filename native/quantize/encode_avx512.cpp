// The encoders with AVX-512.
#include "quantize/encoders.h"

namespace mnemos {

extern const EncodeKernels avx512_encode_kernels;
const EncodeKernels avx512_encode_kernels = all_encoders();

}  // namespace mnemos
