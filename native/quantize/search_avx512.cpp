// The search with AVX-512.
#include "quantize/search_rows.h"

namespace mnemos {

extern const SearchKernels avx512_search_kernels;
const SearchKernels avx512_search_kernels = {search_sixteen_rows};

}  // namespace mnemos
