// The encoders for any processor.
#include "quantize/encoders.h"

namespace mnemos {

extern const EncodeKernels scalar_encode_kernels;
const EncodeKernels scalar_encode_kernels = all_encoders();

}  // namespace mnemos
