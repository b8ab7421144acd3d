#include "vector/vector_kernels.h"

namespace mnemos {

extern const VectorKernels scalar_vector_kernels;
#if defined(__x86_64__)
extern const VectorKernels avx2_vector_kernels;
#elif defined(__aarch64__)
extern const VectorKernels neon_vector_kernels;
#endif

#if defined(__x86_64__)
static VectorKernels avx512_with(decltype(VectorKernels::attend) attend,
                                 decltype(VectorKernels::name_pages) name_pages = nullptr) {
  VectorKernels kernels = avx512_vector_kernels;
  kernels.attend = attend;
  if (name_pages != nullptr) kernels.name_pages = name_pages;
  return kernels;
}
#endif

const VectorKernels &vector_kernels(Isa isa) {
#if defined(__x86_64__)
  static const VectorKernels avx512bf16_vector_kernels = avx512_with(attend_by_dots);
  static const VectorKernels amx_vector_kernels = avx512_with(attend_in_tiles, name_pages_in_tiles);
  if (isa >= Isa::amx) return amx_vector_kernels;
  if (isa >= Isa::avx512_bf16) return avx512bf16_vector_kernels;
  if (isa >= Isa::avx512) return avx512_vector_kernels;
  if (isa >= Isa::avx2) return avx2_vector_kernels;
#elif defined(__aarch64__)
  if (isa != Isa::scalar) return neon_vector_kernels;
#endif
  return scalar_vector_kernels;
}

}  // namespace mnemos
