// SPDX-License-Identifier: Apache-2.0
#pragma once

// The warp's matrix instructions, from sm_75 on. d [16, 8] += A [16, k] B [k, 8] with f32 sums:
// lane l, with g = l / 4 and t = l % 4, holds
//   d: (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)
//   16-bit operands, k = 16, words of two neighbours along k: A (g, 2t), (g + 8, 2t), (g, 2t + 8),
//   (g + 8, 2t + 8);
//     B (2t, g), (2t + 8, g)
//   tf32, k = 8: A (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4); B (t, g), (t + 4, g)

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/ptx/copy.cuh"
#include "cuda/unroll.cuh"

namespace voxgemm::cuda::ptx {

// Four 8 x 8 matrices of 16-bit elements (or 8 x 4 of 32-bit ones): lane l gives the address of row
// l % 8 of matrix l / 8, 16 bytes, and gets word l % 4 of row l / 4 of each.
__device__ inline void load_matrices(uint32_t (&d)[4], uint32_t from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(from));
}
// Each matrix transposed, 16-bit elements.
__device__ inline void load_matrices_transposed(uint32_t (&d)[4], uint32_t from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(from));
}

// A tag, for operands of 32 bits.
struct Tf32 {};

// What instructions call the operands' type.
template <class T>
constexpr char operand_name[] = "f16";
template <>
constexpr char operand_name<__nv_bfloat16>[5] = "bf16";
template <>
constexpr char operand_name<Tf32>[5] = "tf32";
// Along the sum, of one instruction: 32 bytes.
template <class T>
constexpr int operand_depth = sizeof(T) == 2 ? 16 : 8;

// sm_75 has an instruction for half as deep f16 operands.
template <class T>
__device__ inline void add_product(
    float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, T) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  unroll<2>([&](int half) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.%7.%7.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[2 * half]), "r"(a[2 * half + 1]), "r"(half == 0 ? b0 : b1), "C"(operand_name<T>));
  });
#else
  asm("mma.sync.aligned.m16n8k%10.row.col.f32.%11.%11.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "n"(operand_depth<T>),
        "C"(operand_name<T>));
#endif
}

// d += a b, a [16, 32] with two elements of every four that are side by side: a has these, `meta`
// says which (sm_80). 16-bit floats.
template <class T>
__device__ inline void add_sparse_product(
    float (&d)[4], const uint32_t (&a)[4], uint4 b, uint32_t meta, T) {
  asm("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.%13.%13.f32 {%0, %1, %2, %3}, "
      "{%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, 0x0;"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b.x), "r"(b.y), "r"(b.z), "r"(b.w),
        "r"(meta), "C"(operand_name<T>));
}

// The bits of an f32 rounded to tf32, ties away from zero.
__device__ inline uint32_t to_tf32(uint32_t bits) {
  uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(__uint_as_float(bits)));
  return rounded;
}
// Two f32 rounded to bf16, the first in the low half.
__device__ inline uint32_t to_bf16(float first, float second) {
  uint32_t both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
  return both;
}

}  // namespace voxgemm::cuda::ptx
