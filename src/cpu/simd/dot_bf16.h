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

// Words of the same column of two rows, `low` in the low half; zeros past the end and for a null row.
template <class T>
[[gnu::always_inline]] inline U32s words_of(const T* low, const T* high, Columns c) {
  const int rest = c.count - c.first;
  const __mmask16 inside = rest >= lanes ? 0xffff : (1U << rest) - 1;
  U16s first = {};
  U16s second = {};
  if (low != nullptr) first = (U16s)_mm256_maskz_loadu_epi16(inside, low + c.first);
  if (high != nullptr) second = (U16s)_mm256_maskz_loadu_epi16(inside, high + c.first);
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

inline void outer_dot(const OuterArgs& a) {
  Outer o = outer_in_place<Bf16>(a);
  const OuterCopies copies(a.k, a.n, a.scratch);
  copies.use(o);
  const auto x_row = [&](int pair) {
    return pair < a.pairs ? static_cast<const Bf16*>(a.x) + a.x_rows[pair] * a.x_stride : nullptr;
  };
  const auto dy_row = [&](int pair) {
    return pair < a.pairs ? static_cast<const Bf16*>(a.dy) + a.dy_rows[pair] * a.dy_stride : nullptr;
  };
  for (int first = 0; first < a.pairs; first += 2 * copies.rows) {
    const int words = (a.pairs - first + 1) / 2;
    o.pairs = words < copies.rows ? words : copies.rows;
    for (int w = 0; w < o.pairs; ++w) {
      const int pair = first + 2 * w;
      for (int c = 0; c < a.k; c += lanes) {
        store(copies.x_row(w) + c, words_of(x_row(pair), x_row(pair + 1), {c, a.k}));
      }
      for (int c = 0; c < a.n; c += lanes) {
        store(copies.dy_row(w) + c, words_of(dy_row(pair), dy_row(pair + 1), {c, a.n}));
      }
    }
    outer_rows<PairDot>(o, a.k, a.n);
  }
}

#endif

}  // namespace
}  // namespace voxgemm::cpu::VOXGEMM_ISA
