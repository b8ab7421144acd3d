// Codes for weights that are chosen one column after the other: what rounding a column costs is made up for by the
// columns that follow, and groups' scales are chosen by what their columns will then cost. Frantar et al. 2022,
// arXiv:2210.17323 (GPTQ), Chee et al. 2023, arXiv:2307.13304 (LDLQ), and coordinate descent after that as in
// arXiv:2309.01885 (QuantEase).
#pragma once

#include <cstdint>

#include "system/pool.h"

namespace mnemos {

// A value is scale * level + minimum. The level of a code, 0..top, is code - zero or, if `curved`, IQ4's value of it. A
// group of columns shares scale and minimum; if `super` groups together have units in float16, they are integers times
// these: scale = unit * (scale_low..scale_top), minimum = -unit * (0..minimum_top). Otherwise they are float16 numbers
// themselves.
struct SearchFormat {
  int32_t group, super, top, zero, minima, scale_low, scale_top, minimum_top, curved;
};

// The error d of a row costs d' products d; `factor` is the upper triangular U of inverse(products) = U'U.
struct SearchCosts {
  const float *products, *factor;  // (columns, columns) each
  int64_t columns;
};

// `codes` (rows, columns); `units` (rows, columns / super, 2): scale and minimum in float16's values; `integers` (rows,
// columns / group, 2). sweeps: how often scales and codes are improved in turn after the first pass.
struct SearchResult {
  uint8_t *codes;
  float *units;
  int8_t *integers;
};

void search_rows(const SearchFormat &format, const SearchCosts &costs, const float *values, int64_t rows, int sweeps,
                 const SearchResult &result, Pool &pool);

struct SearchKernels {
  // Sixteen rows at most.
  void (*search)(const SearchFormat &format, const SearchCosts &costs, const float *values, int rows, int sweeps,
                 const SearchResult &result);
};

}  // namespace mnemos
