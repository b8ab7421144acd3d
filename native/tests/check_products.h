// Two sets of kernels on products of every quantized type, both forms of activations and 1 to 40 rows.
#pragma once

#include <cstdio>

#include "linear/compare.h"

namespace mnemos {

// How many products differ.
inline int check_products(const ProductKernels &one, const ProductKernels &other) {
  int64_t count = 0;
  int failures = 0;
  for (int32_t number = 0; number < 64; number++)
    for (int64_t tokens = 1; tokens <= 40; tokens++)
      for (bool precise : {false, true}) {
        const auto type = WeightType(number);
        if (!is_weight_type(number) || !layout_of(type).quantized()) continue;
        // Whole and partly empty panels, odd and even numbers of them, of blocks and of chunks.
        const bool wide = tokens % 8 == 5;
        const int64_t columns = block_columns(type) == 32 ? (wide ? 1568 : 96) : (wide ? 1536 : 256);
        const int64_t rows = tokens % 3 == 0 ? 32 : tokens % 3 == 1 ? 41 : 20;
        if (!same_products(one, other, {type, precise, rows, columns, tokens, tokens % 2 == 0})) {
          printf("type %d, precise %d, %lld x %lld, %lld tokens: other bits\n", number, int(precise), (long long)rows,
                 (long long)columns, (long long)tokens);
          failures++;
        }
        count++;
      }
  printf("%s and %s: %lld products, %d differ\n", one.name, other.name, (long long)count, failures);
  return failures;
}

}  // namespace mnemos
