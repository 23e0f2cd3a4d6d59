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
__device__ inline uint32_t load_word(uint32_t from) {
  uint32_t word;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(word) : "r"(from));
  return word;
}
__device__ inline void load_four(float (&v)[4], uint32_t from) {
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v[0]), "=f"(v[1]), "=f"(v[2]), "=f"(v[3])
               : "r"(from));
}

// A tag, for operands of 32 bits.
struct Tf32 {};

// What the names of instructions say of the operands' type.
template <class T>
struct OperandWords;
template <>
struct OperandWords<__half> {
  static constexpr int depth = 16;
  static constexpr char type[] = "f16";
};
template <>
struct OperandWords<__nv_bfloat16> {
  static constexpr int depth = 16;
  static constexpr char type[] = "bf16";
};
template <>
struct OperandWords<Tf32> {
  static constexpr int depth = 8;
  static constexpr char type[] = "tf32";
};

// sm_75 has an instruction for half as deep f16 operands.
template <class T>
__device__ inline void add_product(
    float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, T) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  unroll<2>([&](int half) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.%7.%7.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[2 * half]), "r"(a[2 * half + 1]), "r"(half == 0 ? b0 : b1),
          "C"(OperandWords<T>::type));
  });
#else
  asm("mma.sync.aligned.m16n8k%10.row.col.f32.%11.%11.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "n"(OperandWords<T>::depth),
        "C"(OperandWords<T>::type));
#endif
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

// copy_16 for every architecture: sm_75 copies through registers, and its copies are done when the
// thread is.
__device__ inline void copy_or_zero(uint32_t to, const void* from, bool present) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  store_shared_16(to, present ? __ldg(static_cast<const int4*>(from)) : make_int4(0, 0, 0, 0));
#else
  copy_16(to, from, present);
#endif
}
// 16 bytes of a row at `from` of rows of `row_bytes` bytes; zeros where row is negative.
__device__ inline void gather_or_zero(uint32_t to, const void* from, int row, uint32_t row_bytes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  const uint64_t offset = static_cast<uint64_t>(static_cast<uint32_t>(max(row, 0))) * row_bytes;
  copy_or_zero(to, static_cast<const char*>(from) + offset, row >= 0);
#else
  gather_16(to, from, row, row_bytes);
#endif
}
// Closes the group of this thread's copies since the last one.
__device__ inline void copies_commit() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Returns when at most `pending` groups of this thread are unfinished.
template <int pending>
__device__ inline void copies_wait() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
#endif
}

}  // namespace voxgemm::cuda::ptx
