// The search with AVX2.
#include "quantize/search_rows.h"

namespace mnemos {

extern const SearchKernels avx2_search_kernels;
const SearchKernels avx2_search_kernels = {search_sixteen_rows};

}  // namespace mnemos
