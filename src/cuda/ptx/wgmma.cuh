// SPDX-License-Identifier: Apache-2.0
#pragma once

// The warpgroup matrix instructions of sm_90a: d [64, columns] += A [64, k] B [k, columns], where k
// is 32 bytes of either operand, both in shared memory, f32 sums in registers. Thread t of the
// warpgroup holds, for j in [0, columns / 8) and h, e in {0, 1}, element
// (16 * (t / 32) + 8 * h + t % 32 / 4, 8 * j + 2 * (t % 4) + e) in d[4 * j + 2 * h + e].
// transposed_a / transposed_b: the operand lies with its rows / columns contiguous ("MN-major").

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/ptx/mma.cuh"

namespace voxgemm::cuda::ptx {

// Shared-memory operand with a swizzle of 128 or 64 bytes: 8 rows of so many are an atom. For a
// K-major operand `stride` is the distance of groups of 8 rows (1024 or 512) and `leading` unused;
// for an MN-major one `leading` is the distance of blocks of 64 columns and `stride` of groups of 8
// k rows. `address` is a multiple of 16 bytes.
template <int swizzle = 128>
__device__ inline uint64_t swizzled_operand(uint32_t address, uint32_t leading, uint32_t stride) {
  static_assert(swizzle == 128 || swizzle == 64);
  return uint64_t{128 / swizzle} << 62 | (address & 0x3ffff) >> 4 | uint64_t{leading >> 4} << 16 |
         uint64_t{stride >> 4} << 32;
}

__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Returns when at most `pending` committed groups are unfinished.
template <int pending>
__device__ inline void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}
// Keeps the compiler from moving uses of the sums across a fence or wait.
template <int count>
__device__ inline void pin(float (&d)[count]) {
  unroll<count>([&](int i) { asm volatile("" : "+f"(d[i])::"memory"); });
}

// The beginning of a comment inside of an instruction, or spaces.
template <bool begins>
constexpr char comment[] = {begins ? '/' : ' ', begins ? '*' : ' ', 0};

// One statement for all numbers of columns: a comment hides the sums that an instruction does not
// have. tf32 operands are K-major, and their instruction does not say so.
template <class T, int columns, bool transposed_a, bool transposed_b>
__device__ inline void wgmma(float (&d)[columns / 2], uint64_t a, uint64_t b) {
  constexpr bool says_layout = sizeof(T) == 2;
  static_assert(says_layout || !(transposed_a || transposed_b));
  float none = 0;
  const auto s = [&](int i) -> float& { return i < columns / 2 ? d[i] : none; };
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n%130k%131.f32.%132.%132 {"
      "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15%133"
      ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31%134"
      ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,"
      "%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63%135"
      ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,"
      "%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,%96,%97,%98,%99,%100,%101,%102,%103,%104,"
      "%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,"
      "%122,%123,%124,%125,%126,%127%136"
      "*/}, %128, %129, 1, 1, 1%137, %138, %139%140*/;"
      : "+f"(s(0)), "+f"(s(1)), "+f"(s(2)), "+f"(s(3)), "+f"(s(4)), "+f"(s(5)), "+f"(s(6)),
        "+f"(s(7)), "+f"(s(8)), "+f"(s(9)), "+f"(s(10)), "+f"(s(11)), "+f"(s(12)), "+f"(s(13)),
        "+f"(s(14)), "+f"(s(15)), "+f"(s(16)), "+f"(s(17)), "+f"(s(18)), "+f"(s(19)), "+f"(s(20)),
        "+f"(s(21)), "+f"(s(22)), "+f"(s(23)), "+f"(s(24)), "+f"(s(25)), "+f"(s(26)), "+f"(s(27)),
        "+f"(s(28)), "+f"(s(29)), "+f"(s(30)), "+f"(s(31)), "+f"(s(32)), "+f"(s(33)), "+f"(s(34)),
        "+f"(s(35)), "+f"(s(36)), "+f"(s(37)), "+f"(s(38)), "+f"(s(39)), "+f"(s(40)), "+f"(s(41)),
        "+f"(s(42)), "+f"(s(43)), "+f"(s(44)), "+f"(s(45)), "+f"(s(46)), "+f"(s(47)), "+f"(s(48)),
        "+f"(s(49)), "+f"(s(50)), "+f"(s(51)), "+f"(s(52)), "+f"(s(53)), "+f"(s(54)), "+f"(s(55)),
        "+f"(s(56)), "+f"(s(57)), "+f"(s(58)), "+f"(s(59)), "+f"(s(60)), "+f"(s(61)), "+f"(s(62)),
        "+f"(s(63)), "+f"(s(64)), "+f"(s(65)), "+f"(s(66)), "+f"(s(67)), "+f"(s(68)), "+f"(s(69)),
        "+f"(s(70)), "+f"(s(71)), "+f"(s(72)), "+f"(s(73)), "+f"(s(74)), "+f"(s(75)), "+f"(s(76)),
        "+f"(s(77)), "+f"(s(78)), "+f"(s(79)), "+f"(s(80)), "+f"(s(81)), "+f"(s(82)), "+f"(s(83)),
        "+f"(s(84)), "+f"(s(85)), "+f"(s(86)), "+f"(s(87)), "+f"(s(88)), "+f"(s(89)), "+f"(s(90)),
        "+f"(s(91)), "+f"(s(92)), "+f"(s(93)), "+f"(s(94)), "+f"(s(95)), "+f"(s(96)), "+f"(s(97)),
        "+f"(s(98)), "+f"(s(99)), "+f"(s(100)), "+f"(s(101)), "+f"(s(102)), "+f"(s(103)),
        "+f"(s(104)), "+f"(s(105)), "+f"(s(106)), "+f"(s(107)), "+f"(s(108)), "+f"(s(109)),
        "+f"(s(110)), "+f"(s(111)), "+f"(s(112)), "+f"(s(113)), "+f"(s(114)), "+f"(s(115)),
        "+f"(s(116)), "+f"(s(117)), "+f"(s(118)), "+f"(s(119)), "+f"(s(120)), "+f"(s(121)),
        "+f"(s(122)), "+f"(s(123)), "+f"(s(124)), "+f"(s(125)), "+f"(s(126)), "+f"(s(127))
      : "l"(a), "l"(b), "n"(columns), "n"(operand_depth<T>), "C"(operand_name<T>),
        "C"(comment<columns == 32>), "C"(comment<columns == 64>), "C"(comment<columns == 128>),
        "C"(comment<columns == 256>), "C"(comment<!says_layout>), "n"(transposed_a),
        "n"(transposed_b), "C"(comment<says_layout>));
}

}  // namespace voxgemm::cuda::ptx
