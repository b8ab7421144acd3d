// Which kernels this machine can run.
#include <cstring>

#include "linear/product_kernels.h"
#include "system/cpu.h"

namespace mnemos {

std::vector<const ProductKernels *> runnable_kernels() {
  std::vector<const ProductKernels *> kernels{&scalar_kernels};
  const CpuFeatures &cpu = cpu_features();
#if defined(__aarch64__)
  if (cpu.neon_dotprod) kernels.push_back(&neon_kernels);
  if (cpu.neon_i8mm) kernels.push_back(&neoni8mm_kernels);
#elif defined(__x86_64__)
  if (cpu.avx2) kernels.push_back(&avx2_kernels);
  if (cpu.avx_vnni) kernels.push_back(&avxvnni_kernels);
  if (cpu.avx512) kernels.push_back(&avx512_kernels);
  if (cpu.avx512_bf16) kernels.push_back(&avx512bf16_kernels);
  if (cpu.amx) kernels.push_back(&amx_kernels);
  if (cpu.amx_bf16) kernels.push_back(&amxbf16_kernels);
#else
  (void)cpu;
#endif
  return kernels;
}

const char *name_of(const ProductKernels &kernels) { return kernels.name; }

const ProductKernels *find_kernels(const char *name) {
  for (const ProductKernels *kernels : runnable_kernels())
    if (strcmp(kernels->name, name) == 0) return kernels;
  return nullptr;
}

}  // namespace mnemos
