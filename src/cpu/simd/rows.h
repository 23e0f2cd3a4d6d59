// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cpu/engine.h"
#include "cpu/simd/vector.h"

namespace voxgemm::cpu::VOXGEMM_ISA {
namespace {

template <class T>
void store_rows(const StoreArgs& a) {
  const T* bias = static_cast<const T*>(a.bias);
  const T* residual = static_cast<const T*>(a.residual);
  const int64_t n = a.n;  // a may overlap y, for all that the compiler knows
  const bool relu = a.relu;
  const float* acc = a.acc;
  T* y = static_cast<T*>(a.y);
  const auto finished = [&](F32s sum, int64_t c, const auto& load_row) {
    if (bias != nullptr) sum += load_row(bias + c);
    if (residual != nullptr) sum += load_row(residual + c);
    return relu ? select((I32s)(sum < 0), F32s{}, sum) : sum;
  };
  for (int64_t row = 0; row < a.rows; ++row, acc += a.acc_stride, y += a.y_stride) {
    int64_t c = 0;
    for (; c + lanes <= n; c += lanes) {
      const auto load_row = [](const auto* from) { return load_f32(from); };
      store_f32(y + c, finished(load<F32s>(acc + c), c, load_row));
    }
    if (c < n) {
      const int rest = static_cast<int>(n - c);
      const auto load_row = [&](const auto* from) { return load_part(from, rest); };
      store_part(y + c, finished(load_part(acc + c, rest), c, load_row), rest);
    }
    if (residual != nullptr) residual += a.residual_stride;
  }
}

int compact(
    const int32_t* indices, int n, int32_t first_position, int32_t* in_rows, int32_t* positions) {
  for (int i = 0; i < n; i += 16) __builtin_prefetch(indices + n + i);
  int found = 0;
  int i = 0;
#if defined(__AVX512F__)
  const __m512i steps = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (; i < n; i += 16) {
    const int rest = n - i;
    const __mmask16 inside = rest >= 16 ? 0xffff : (1U << rest) - 1;
    const __m512i rows = _mm512_maskz_loadu_epi32(inside, indices + i);
    const __mmask16 present = _mm512_mask_cmpge_epi32_mask(inside, rows, _mm512_setzero_si512());
    const __m512i at = _mm512_add_epi32(steps, _mm512_set1_epi32(first_position + i));
    // Compressed in a register and stored whole: compressing stores are many times slower on some
    // CPUs.
    _mm512_storeu_si512(in_rows + found, _mm512_maskz_compress_epi32(present, rows));
    _mm512_storeu_si512(positions + found, _mm512_maskz_compress_epi32(present, at));
    found += __builtin_popcount(present);
  }
#else
  for (; i < n; ++i) {
    in_rows[found] = indices[i];
    positions[found] = first_position + i;
    found += indices[i] >= 0 ? 1 : 0;
  }
#endif
  return found;
}

}  // namespace
}  // namespace voxgemm::cpu::VOXGEMM_ISA
