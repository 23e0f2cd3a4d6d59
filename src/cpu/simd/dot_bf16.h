// SPDX-License-Identifier: Apache-2.0
#pragma once

// bf16 by vdpbf16ps: a word of the operands is two consecutive k of a row (multiply) or one k of two
// consecutive pairs (outer), and each step adds both products to an f32 sum. The instruction takes
// subnormal operands for zeros and gives zeros for subnormal sums, whatever the floating-point environment.

#include "cpu/simd/outer.h"

namespace voxgemm::cpu::VOXGEMM_ISA {
namespace {

#if defined(__AVX512BF16__)

// Columns [first, first + lanes) of a row of `count`.
struct Columns {
  int first;
  int count;
};

// Words of the same column of two rows, `low` in the low half; zeros past the end. Unless `both` rows are
// there, null stands for zeros.
template <bool both, class T>
[[gnu::always_inline]] inline U32s words_of(const T* low, const T* high, Columns c) {
  const int rest = c.count - c.first;
  const __mmask16 inside = rest >= lanes ? 0xffff : (1U << rest) - 1;
  U16s first = {};
  U16s second = {};
  if (both || low != nullptr) first = (U16s)_mm256_maskz_loadu_epi16(inside, low + c.first);
  if (both || high != nullptr) second = (U16s)_mm256_maskz_loadu_epi16(inside, high + c.first);
  return __builtin_convertvector(first, U32s) | __builtin_convertvector(second, U32s) << 16;
}

struct PairDot {
  using Unit = PairUnit;
  [[gnu::always_inline]] static F32s add(F32s a, F32s b, F32s sum) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
  }
};

// `height` as for Panels.
inline void multiply_dot(const MultiplyArgs& a, int height) {
  const Panels w = {.n = a.n, .units = (a.k + 1) / 2, .height = height};
  if (a.k % 2 == 0) {
    multiply_rows<PairDot>(rows_in_place<Bf16>(a), w, a.pairs);
    return;
  }
  // The last word of a row would reach into the next row.
  multiply_copies<Bf16>(
      a, w.units * 4,
      [&](const Bf16* from, char* to) {
        std::memcpy(to, from, a.k * sizeof(Bf16));
        std::memset(to + a.k * sizeof(Bf16), 0, sizeof(Bf16));
      },
      [&](const Rows& r, int rows) { multiply_rows<PairDot>(r, w, rows); });
}

// Row `pair` of an operand, null past the last pair.
struct PairRows {
  const void* data;
  int64_t stride;
  const int32_t* rows;
  int pairs;
  template <class T>
  const T* at(int pair) const {
    return pair < pairs ? static_cast<const T*>(data) + rows[pair] * stride : nullptr;
  }
};

inline void outer_dot(const OuterArgs& a) {
  Outer o = outer_in_place<Bf16>(a);
  const OuterCopies copies(a.k, a.n, a.scratch);
  copies.use(o);
  const PairRows x = {a.x, a.x_stride, a.x_rows, a.pairs};
  const PairRows dy = {a.dy, a.dy_stride, a.dy_rows, a.pairs};
  const auto copy = [](const PairRows& from, int pair, int count, float* to) {
    const Bf16* low = from.at<Bf16>(pair);
    const Bf16* high = from.at<Bf16>(pair + 1);
    for (int c = 0; c < count; c += lanes) store(to + c, words_of<false>(low, high, {c, count}));
  };
  for (int first = 0; first < a.pairs; first += 2 * copies.rows) {
    const int words = (a.pairs - first + 1) / 2;
    o.pairs = words < copies.rows ? words : copies.rows;
    for (int w = 0; w < o.pairs; ++w) {
      copy(x, first + 2 * w, a.k, copies.x_row(w));
      copy(dy, first + 2 * w, a.n, copies.dy_row(w));
    }
    outer_rows<PairDot>(o, a.k, a.n);
  }
}

#endif

}  // namespace
}  // namespace voxgemm::cpu::VOXGEMM_ISA
