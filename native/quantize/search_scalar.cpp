// The search for any processor.
#include "quantize/search_rows.h"

namespace mnemos {

extern const SearchKernels scalar_search_kernels;
const SearchKernels scalar_search_kernels = {search_sixteen_rows};

}  // namespace mnemos
