#include "kernels_impl.h"

#include "attention_tiles.h"

namespace mnemos {
namespace {

constexpr VectorKernels with_tiles() {
  VectorKernels kernels = table;
  kernels.attend = attend_in_tiles;
  return kernels;
}

}  // namespace

extern const VectorKernels amx_vector_kernels;
const VectorKernels amx_vector_kernels = with_tiles();

}  // namespace mnemos
