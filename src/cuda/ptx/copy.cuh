// SPDX-License-Identifier: Apache-2.0
#pragma once

// Copies from global to shared memory that run beside the thread (sm_80; the tensor copies sm_90),
// and 16 bytes at a time to registers and from them.

#include <cstdint>

#include "cuda/unroll.cuh"

namespace voxgemm::cuda::ptx {

// What lies at an address in shared memory.
template <class T>
__device__ inline T& shared(uint32_t address) {
  return *static_cast<T*>(__cvta_shared_to_generic(address));
}

// 16 bytes, or 16 zero bytes without reading `from` where `present` is false. sm_75 copies through
// registers, and its copies are done when the thread is.
__device__ inline void copy_16(uint32_t to, const void* from, bool present) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  shared<int4>(to) = present ? __ldg(static_cast<const int4*>(from)) : int4{};
#else
  asm volatile(
      "{\n"
      ".reg .pred absent;\n"
      "setp.eq.s32 absent, %2, 0;\n"
      "cp.async.cg.shared.global.L2::128B [%0], [%1], 16, absent;\n"
      "}\n" ::"r"(to),
      "l"(from), "r"(static_cast<int>(present))
      : "memory");
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

// Arrives once at the barrier, when this thread's copies so far have landed.
__device__ inline void copies_arrive(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

// A box of a three-dimensional tensor; its bytes count towards the barrier.
__device__ inline void copy_box(uint32_t to,
                                const void* tensor_map,
                                uint32_t barrier,
                                int3 origin) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5}], [%2];" ::"r"(to),
      "l"(tensor_map), "r"(barrier), "r"(origin.x), "r"(origin.y), "r"(origin.z)
      : "memory");
}

// Orders what stores and cp.async wrote to shared memory before reads by wgmma or tensor copies.
__device__ inline void proxy_fence() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// 16 bytes of row `row` of rows of `row_bytes` bytes at `from`; zeros, without a read, where row is
// negative or `outside` is not 0. With `pieces`, 1 to 3, more of them `step` bytes apart in the row
// and `to_step` apart in shared memory. Its instructions bind a gather: one a piece, two a row.
template <int pieces = 1, int step = 0, int to_step = 0>
__device__ inline void gather_16(
    uint32_t to, const void* from, int row, uint32_t row_bytes, int outside = 0) {
  static_assert(pieces >= 1 && pieces <= 3);
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  const uint64_t offset = uint64_t{static_cast<uint32_t>(row)} * row_bytes;
  copy_16(to, static_cast<const char*>(from) + offset, row >= 0);
#else
  asm volatile(
      "{\n"
      ".reg .pred out, absent, second, third;\n"
      ".reg .b64 at;\n"
      "setp.ne.s32 out, %4, 0;\n"
      "setp.lt.or.s32 absent, %2, 0, out;\n"
      "setp.gt.s32 second, %9, 1;\n"
      "setp.gt.s32 third, %9, 2;\n"
      "mad.wide.u32 at, %2, %3, %1;\n"
      "cp.async.cg.shared.global.L2::128B [%0], [at], 16, absent;\n"
      "@second cp.async.cg.shared.global.L2::128B [%0 + %5], [at + %6], 16, absent;\n"
      "@third cp.async.cg.shared.global.L2::128B [%0 + %7], [at + %8], 16, absent;\n"
      "}\n" ::"r"(to),
      "l"(from), "r"(row), "r"(row_bytes), "r"(outside), "n"(to_step), "n"(step), "n"(2 * to_step),
      "n"(2 * step), "n"(pieces)
      : "memory");
#endif
}

// As statements, which the compiler does not look for far and wide: among wgmma that takes minutes.
__device__ inline int4 load_shared_16(uint32_t from) {
  int4 v;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(from)
               : "memory");
  return v;
}
__device__ inline void store_shared_16(uint32_t to, const int4& v) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(v.x), "r"(v.y), "r"(v.z),
               "r"(v.w)
               : "memory");
}

// 16 bytes by way of the second-level cache, or zeros without a read; and 16 bytes to memory, or
// none. No branches, so that several are under way at a time.
__device__ inline uint4 load_16(const void* from, bool present) {
  uint4 v = {};
  asm volatile(
      "{\n"
      ".reg .pred present;\n"
      "setp.ne.s32 present, %5, 0;\n"
      "@present ld.global.cg.v4.b32 {%0, %1, %2, %3}, [%4];\n"
      "}\n"
      : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)
      : "l"(from), "r"(static_cast<int>(present))
      : "memory");
  return v;
}
__device__ inline void store_16(void* to, const uint4& v, bool present) {
  asm volatile(
      "{\n"
      ".reg .pred present;\n"
      "setp.ne.s32 present, %5, 0;\n"
      "@present st.global.v4.b32 [%4], {%0, %1, %2, %3};\n"
      "}\n" ::"r"(v.x),
      "r"(v.y), "r"(v.z), "r"(v.w), "l"(to), "r"(static_cast<int>(present))
      : "memory");
}

}  // namespace voxgemm::cuda::ptx
