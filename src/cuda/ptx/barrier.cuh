// SPDX-License-Identifier: Apache-2.0
#pragma once

// mbarriers in shared memory (sm_90). A barrier's phase ends when its expected arrivals and bytes
// are in; wait(parity) returns once the phase of that parity has ended, which is 0 of the first.

#include <cstdint>

namespace voxgemm::cuda::ptx {

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// `count` of them, one behind the other.
__device__ inline void barriers_init(uint32_t first, int count, uint32_t arrivals) {
  for (int i = 0; i < count; ++i) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(first + 8 * i), "r"(arrivals)
                 : "memory");
  }
}
// Makes initialised barriers visible to the asynchronous copies.
__device__ inline void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ inline void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ inline void barrier_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}
__device__ inline void barrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// Whether it has: asked early, the answer does not wait behind copies that the thread starts since.
__device__ inline bool barrier_test(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "mbarrier.test_wait.parity.shared::cta.b64 done, [%1], %2;\n"
      "selp.u32 %0, 1, 0, done;\n"
      "}\n"
      : "=r"(done)
      : "r"(barrier), "r"(parity)
      : "memory");
  return done != 0;
}

// A place among several with a barrier each, and the parity of their phase.
template <int places>
struct Ring {
  int at = 0;
  uint32_t parity = 0;
  __device__ void next() {
    if (++at == places) {
      at = 0;
      parity ^= 1;
    }
  }
  // Fewer than `places`, or as many; also back by what was skipped too far.
  __device__ void skip_few(int count) {
    at += count;
    if (at >= 0 && at < places) return;
    at += at < 0 ? places : -places;
    parity ^= 1;
  }
  __device__ void skip(int count) {
    const int place = at + count;
    parity ^= place / places & 1;
    at = place % places;
  }
};

// Named barrier among `threads` threads of the CTA.
__device__ inline void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Hands registers of the warpgroup back, or takes them.
template <int registers>
__device__ inline void registers_down() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
}
template <int registers>
__device__ inline void registers_up() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
}

// Programmatic dependence (sm_90): a launch that overlaps the one before it in the stream starts
// once every CTA of that one has said so or ended, and then waits until all its writes are visible;
// returns at once in a launch that does not overlap.
__device__ inline void let_next_launch_start() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}
__device__ inline void wait_for_last_launch() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

}  // namespace voxgemm::cuda::ptx
