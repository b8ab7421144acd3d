#include "quantize/search.h"

#include <algorithm>

#include "system/cpu.h"

namespace mnemos {

extern const SearchKernels scalar_search_kernels;
#if defined(__x86_64__)
extern const SearchKernels avx2_search_kernels, avx512_search_kernels;
#endif

namespace {

constexpr int64_t together = 16;

const SearchKernels &kernels() {
#if defined(__x86_64__)
  const Isa isa = current_isa(OperatorClass::quantized);
  if (isa >= Isa::avx512) return avx512_search_kernels;
  if (isa >= Isa::avx2) return avx2_search_kernels;
#endif
  return scalar_search_kernels;
}

}  // namespace

void search_rows(const SearchFormat &format, const SearchCosts &costs, const float *values, int64_t rows, int sweeps,
                 const SearchResult &result, Pool &pool) {
  const int64_t columns = costs.columns, supers = columns / format.super, groups = columns / format.group;
  pool.for_each(rows, together, [&](int64_t begin, int64_t end, int) {
    for (int64_t row = begin; row < end; row += together) {
      const int count = static_cast<int>(std::min(together, end - row));
      kernels().search(
          format, costs, values + row * columns, count, sweeps,
          {result.codes + row * columns, result.units + 2 * row * supers, result.integers + 2 * row * groups});
    }
  });
}

}  // namespace mnemos
