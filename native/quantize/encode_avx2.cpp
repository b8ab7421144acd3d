// The encoders with AVX2.
#include "quantize/encoders.h"

namespace mnemos {

extern const EncodeKernels avx2_encode_kernels;
const EncodeKernels avx2_encode_kernels = all_encoders();

}  // namespace mnemos
