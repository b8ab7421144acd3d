// The matrix products with AVX-512, VNNI and the bfloat16 dot product.
#include "linear/avx512.h"

namespace mnemos {
namespace {

struct Avx512Bf16 : Avx512 {
  static constexpr Form bf16_form = Form::bf16;

  static __m512bh as_bfloats(__m512i a) { return reinterpret_cast<__m512bh>(a); }
  static __m512i broadcast_bfloats(const uint16_t *p) { return broadcast_quad(reinterpret_cast<const int8_t *>(p)); }
  static Floats dot_bfloats(Floats sum, Bytes weights, __m512i x) {
    return _mm512_dpbf16_ps(sum, as_bfloats(weights), as_bfloats(x));
  }
};

void multiply_bfloats(const Matrix &matrix, const Input &input, int64_t row_begin, int64_t row_end, int64_t panel_begin,
                      int64_t panel_end, float *y, int64_t y_stride, const float *starts, int64_t start_stride) {
  const bool bfloats = matrix.layout.type == WeightType::bf16;
  const auto multiply = bfloats ? multiply_floats<Avx512Bf16, WeightType::bf16> : avx512_kernels.multiply;
  multiply(matrix, input, row_begin, row_end, panel_begin, panel_end, y, y_stride, starts, start_stride);
}

}  // namespace

const Kernels avx512bf16_kernels{"avx512_bf16", Form::bf16, prepare_all<Avx512>, multiply_bfloats};

}  // namespace mnemos
