// SPDX-License-Identifier: Apache-2.0
#pragma once

// bf16 by vdpbf16ps: a word of the operands is two consecutive k of a row (multiply) or one k of
// two consecutive pairs (outer), and each step adds both products to an f32 sum. The instruction
// takes subnormal operands for zeros and gives zeros for subnormal sums, whatever the
// floating-point environment.

#include "cpu/simd/outer.h"

namespace voxgemm::cpu::VOXGEMM_ISA {
namespace {

#if defined(__AVX512BF16__)

using U16w [[gnu::vector_size(vector_bytes)]] = uint16_t;
constexpr int wide_lanes = 2 * lanes;

// Elements [first, first + wide_lanes) of a row of `count`, zeros past its end. Unless rows are
// always there, null stands for a row of zeros.
struct Columns {
  int first;
  int count;
};
template <bool always, class T>
[[gnu::always_inline]] inline U16w load_columns(const T* row, Columns c) {
  if (!always && row == nullptr) return U16w{};
  const int rest = c.count - c.first;
  const __mmask32 inside = rest >= wide_lanes ? ~0U : (1U << rest) - 1;
  return (U16w)_mm512_maskz_loadu_epi16(inside, row + c.first);
}

// Words of the same column of two rows, low first: of columns 0 to 3 or 4 to 7 of each 128-bit
// lane.
[[gnu::always_inline]] inline U32s low_words(U16w low, U16w high) {
  return (U32s)__builtin_shufflevector(low, high, 0, 32, 1, 33, 2, 34, 3, 35, 8, 40, 9, 41, 10, 42,
                                       11, 43, 16, 48, 17, 49, 18, 50, 19, 51, 24, 56, 25, 57, 26,
                                       58, 27, 59);
}
[[gnu::always_inline]] inline U32s high_words(U16w low, U16w high) {
  return (U32s)__builtin_shufflevector(low, high, 4, 36, 5, 37, 6, 38, 7, 39, 12, 44, 13, 45, 14,
                                       46, 15, 47, 20, 52, 21, 53, 22, 54, 23, 55, 28, 60, 29, 61,
                                       30, 62, 31, 63);
}

// Words of two rows of `count` elements, in order, zeros up to whole vectors.
template <bool always, class T>
[[gnu::always_inline]] inline void interleave(const T* low, const T* high, int count, void* words) {
  auto* to = static_cast<char*>(words);
  for (int c = 0; c < count; c += wide_lanes, to += int64_t{2} * vector_bytes) {
    const U16w low_cols = load_columns<always>(low, {c, count});
    const U16w high_cols = load_columns<always>(high, {c, count});
    const auto low_part = (U64s)low_words(low_cols, high_cols);
    const auto high_part = (U64s)high_words(low_cols, high_cols);
    store(to, __builtin_shufflevector(low_part, high_part, 0, 1, 8, 9, 2, 3, 10, 11));
    if (c + lanes >= count) break;
    store(to + vector_bytes,
          __builtin_shufflevector(low_part, high_part, 4, 5, 12, 13, 6, 7, 14, 15));
  }
}

struct PairDot {
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

// The rows of an operand of `outer` by pair; null past the last pair.
template <class T>
struct PairRows {
  const T* data;
  int64_t stride;
  const int32_t* rows;
  int pairs;
  int count;  // elements of a row
  const T* at(int pair) const { return pair < pairs ? data + rows[pair] * stride : nullptr; }
  void fetch(int pair) const {
    if (pair >= pairs) return;
    const T* row = data + rows[pair] * stride;
    for (int c = 0; c < count; c += cache_line / 2) __builtin_prefetch(row + c);
  }
  void interleave_to(int pair, void* words) const {
    if (pair + 1 < pairs) {
      interleave<true>(at(pair), at(pair + 1), count, words);
    } else {
      interleave<false>(at(pair), at(pair + 1), count, words);
    }
  }
};
template <class T>
PairRows<T> x_pairs(const OuterArgs& a) {
  return {static_cast<const T*>(a.x), a.x_stride, a.x_rows, a.pairs, a.k};
}
template <class T>
PairRows<T> dy_pairs(const OuterArgs& a) {
  return {static_cast<const T*>(a.dy), a.dy_stride, a.dy_rows, a.pairs, a.n};
}

inline void outer_dot(const OuterArgs& a) {
  Outer o = outer_in_place<Bf16>(a);
  const OuterCopies copies(a.k, a.n, a.scratch);
  copies.use(o);
  const auto x = x_pairs<Bf16>(a);
  const auto dy = dy_pairs<Bf16>(a);
  // Rows that a third-level cache holds arrive in time; narrow ones are copied too fast for it to
  // pay.
  const int ahead = a.k + a.n >= 64 ? 8 : a.pairs;
  for (int first = 0; first < a.pairs; first += 2 * copies.rows) {
    const int words = (a.pairs - first + 1) / 2;
    o.pairs = words < copies.rows ? words : copies.rows;
    for (int w = 0; w < o.pairs; ++w) {
      const int pair = first + 2 * w;
      for (int i = pair + ahead; i < pair + ahead + 2; ++i) {
        x.fetch(i);
        dy.fetch(i);
      }
      x.interleave_to(pair, copies.x_row(w));
      dy.interleave_to(pair, copies.dy_row(w));
    }
    outer_rows<PairDot>(o, a.k, a.n);
  }
}

#endif

}  // namespace
}  // namespace voxgemm::cpu::VOXGEMM_ISA
