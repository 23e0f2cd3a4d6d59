// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cpu/simd/vector.h"

namespace voxgemm::cpu::VOXGEMM_ISA {
namespace {

#if defined(__AVX512F__)

using U64s [[gnu::vector_size(vector_bytes)]] = uint64_t;

// Words, and pairs of words, of the low and the high halves of each 128-bit lane of two rows.
[[gnu::always_inline]] inline U32s low_halves(U32s a, U32s b) {
  return __builtin_shufflevector(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29);
}
[[gnu::always_inline]] inline U32s high_halves(U32s a, U32s b) {
  return __builtin_shufflevector(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
}
[[gnu::always_inline]] inline U64s low_pairs(U32s a, U32s b) {
  return __builtin_shufflevector((U64s)a, (U64s)b, 0, 8, 2, 10, 4, 12, 6, 14);
}
[[gnu::always_inline]] inline U64s high_pairs(U32s a, U32s b) {
  return __builtin_shufflevector((U64s)a, (U64s)b, 1, 9, 3, 11, 5, 13, 7, 15);
}
// Lanes 0 and 2, or 1 and 3, of two rows.
[[gnu::always_inline]] inline U64s even_lanes(U64s a, U64s b) {
  return __builtin_shufflevector(a, b, 0, 1, 4, 5, 8, 9, 12, 13);
}
[[gnu::always_inline]] inline U64s odd_lanes(U64s a, U64s b) {
  return __builtin_shufflevector(a, b, 2, 3, 6, 7, 10, 11, 14, 15);
}

// 16 x 16 words, in place.
[[gnu::always_inline]] inline void transpose(U32s (&r)[16]) {
  U32s t[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 2) {
    t[i] = low_halves(r[i], r[i + 1]);
    t[i + 1] = high_halves(r[i], r[i + 1]);
  }
  // q[4 g + c]: in each lane l, column 4 l + c of rows 4 g to 4 g + 3.
  U64s q[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 4) {
    q[i] = low_pairs(t[i], t[i + 2]);
    q[i + 1] = high_pairs(t[i], t[i + 2]);
    q[i + 2] = low_pairs(t[i + 1], t[i + 3]);
    q[i + 3] = high_pairs(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 16
  for (int c = 0; c < 4; ++c) {
    const U64s even_top = even_lanes(q[c], q[4 + c]);
    const U64s odd_top = odd_lanes(q[c], q[4 + c]);
    const U64s even_bottom = even_lanes(q[8 + c], q[12 + c]);
    const U64s odd_bottom = odd_lanes(q[8 + c], q[12 + c]);
    r[c] = (U32s)even_lanes(even_top, even_bottom);
    r[4 + c] = (U32s)even_lanes(odd_top, odd_bottom);
    r[8 + c] = (U32s)odd_lanes(even_top, even_bottom);
    r[12 + c] = (U32s)odd_lanes(odd_top, odd_bottom);
  }
}

#endif

}  // namespace
}  // namespace voxgemm::cpu::VOXGEMM_ISA
