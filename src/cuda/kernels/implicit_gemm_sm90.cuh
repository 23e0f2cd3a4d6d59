// SPDX-License-Identifier: Apache-2.0
#pragma once

// Convolution on Hopper: y[o] = bias + sum over taps of x[in(o, t)] W[t], 16-bit operands or f32
// ones in the form of split_sm90.cu, f32 sums, over the tiles of a masked schedule (schedule.h).
//
// A CTA takes items in turn (implicit_gemm_sm90_items.cuh): a tile, a block of its columns and a
// slice of its steps, a step being one tap and `depth` input channels, of split operands as many
// 16-bit units. Column blocks of a tile go to neighbouring CTAs, which share its rows in the
// second-level cache. Warpgroup 0 fills a ring of stages, one a step; 1 and 2 multiply. A stage:
//   A [rows, depth]: rows of x, gathered by cp.async, depth / 8 lanes a row; absent rows are zeros
//   B [depth, columns] of W[tap], by one tensor copy (one per 64 columns where the output channels
//   are contiguous)
// Both swizzled over the bytes of a row, 128 or 64: 16-byte piece p of row r lies at p ^ (r & 7) or
// p ^ (r / 2 & 3). f32 pieces of one channel stand in one stage, which serves all their products.
//
// The consumers share a tile, each with half of its rows, or, where a tile is short in steps (few
// channels), take turns with whole ones (`pingpong`): one writes while the other multiplies. Taps
// that no row of half a tile has are neither gathered nor multiplied for it.
//
// Teams of 1, 2 or 4 of the producer's warps fill stages in turn. Beside its copies a step costs a
// warp about a hundred instructions one behind the other: where steps are small teams do it for
// several at once, where they are large all warps fill one, or it would come too late.
//
// Synchronisation: `full` of a stage gets one arrival from every lane that fills it when its copies
// have landed and one with the bytes of the weights; `free` one from every warp that multiplies it.
// cp.async writes through the generic proxy and wgmma reads through the asynchronous one, so
// consumers fence after `full`. A consumer that skips a tap first drains what it still multiplies,
// or a run of skips would stop the ring. With pingpong `turn` of a consumer says that the other has
// issued all of its tile: a stage may be several phases away, which its parity does not tell.
//
// Each of several groups has a launch, which begins while the one before ends and waits before it
// reads that one's partial sums (implicit_gemm_sm90_sums.cuh), which it adds to its own. Several
// slices: all write partial sums, finish() adds. What was tried and lost: docs/performance.md.

#include <cuda.h>

#include <type_traits>

#include "cuda/kernels/families_sm90.h"
#include "cuda/kernels/implicit_gemm_sm90_items.cuh"
#include "cuda/kernels/implicit_gemm_sm90_sums.cuh"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/copy.cuh"
#include "cuda/ptx/wgmma.cuh"

namespace voxgemm::cuda::sm90 {

// The products of a stage: which 32 bytes of a row of A with which of a column of B.
struct Products {
  int count = 4;
  int a[6] = {0, 1, 2, 3};
  int b[6] = {0, 1, 2, 3};
};
// Of pieces the smallest products first.
__device__ constexpr Products products_of(Math math, int depth) {
  if (math == Math::bf16x3) return {6, {2, 3, 0, 1, 0, 1}, {0, 1, 2, 3, 0, 1}};
  if (math == Math::bf16x6) return {6, {2, 1, 0, 1, 0, 0}, {0, 1, 2, 0, 1, 0}};
  return {.count = depth / 16};
}

// in_contiguous: layout of the weights.
template <Math math_, Shape shape, bool in_contiguous_>
struct Config {
  static constexpr Math math = math_;
  // What the instructions multiply, and the type of y and bias.
  using Operand =
      std::conditional_t<math == Math::f16,
                         __half,
                         std::conditional_t<math == Math::tf32, ptx::Tf32, __nv_bfloat16>>;
  using Result = std::conditional_t<!sm80::is_16bit(math), float, Operand>;
  static constexpr bool in_contiguous = in_contiguous_;
  static constexpr bool pingpong = shape.pingpong;
  static constexpr int rows = shape.rows;
  static constexpr int columns = shape.columns;
  static constexpr int depth = shape.depth;
  static constexpr int stages = shape.stages;
  static constexpr int team = shape.team;
  static constexpr int teams = 4 / team;
  // What a warp waits for must be less than two phases away. Where stages are freed in turn it is;
  // with pingpong it is if the same team fills the stage every time.
  static_assert(stages >= teams && (!pingpong || stages % teams == 0));
  static constexpr int row_blocks = rows / (pingpong ? 64 : 128);  // of 64 rows, a consumer's
  static constexpr int row_bytes = 2 * depth;
  static constexpr int a_bytes = rows * row_bytes;
  static constexpr int b_bytes = columns * row_bytes;
  static constexpr int stage_bytes = a_bytes + b_bytes;
  // Stages start at a multiple of 1024, the swizzle's period.
  static constexpr int shared_bytes =
      1024 + stages * stage_bytes + 16 * stages + 32 + (16 + item_bytes) * item_slots;
  static constexpr int threads = 384;
  static constexpr int producer_registers = shape.team == 1 ? 72 : 56;
  static constexpr int consumer_registers = shape.team == 1 ? 216 : 224;
  // Of the 168 a thread starts with; one more, and a consumer waits for ever.
  static_assert(128 * producer_registers + 256 * consumer_registers <= 384 * 168);
  // Lanes a row, rows a copy, copies of a stage that a warp makes and their rows.
  static constexpr int lanes = depth / 8;
  static constexpr int rows_of_copy = 32 / lanes;
  static constexpr int copies = rows / rows_of_copy / team;
  static constexpr int rows_of_warp = rows / team;
  // Columns of a box of MN-major weights.
  static constexpr int box_columns = columns < 64 ? columns : 64;
};

// What the producer's warps do.
template <class C>
struct Producer {
  const ConvParams& p;
  const CUtensorMap* weight_map;
  const Shared& shared;
  int team = uniform(static_cast<int>(threadIdx.x) / 32 / C::team);
  int member = uniform(static_cast<int>(threadIdx.x) / 32 % C::team);
  int lane = threadIdx.x % 32;
  int piece = lane % C::lanes;  // 16 bytes of a row
  int k_blocks = p.k_blocks(C::depth);
  uint32_t first_place = place();  // in stage 0
  int turn = 0;                    // the team that fills the next stage
  ptx::Ring<C::stages> ring = {};
  int rows[C::rows_of_warp / 32] = {};

  __device__ void run() {
    Items<C> items{p, shared};
    Dealer<C> dealer{p, shared};
    dealer.load();
    dealer.hand_out();
    Item item = items.next();
    while (item.valid) {
      dealer.load();
      Item next;
      bool looked = false;
      const auto look_ahead = [&] {
        if (looked) return;
        looked = true;
        dealer.hand_out();
        next = items.next();
      };
      const int first_tap = item.group * p.taps / p.groups;
      Walk walk(item, k_blocks);
      const int32_t* block = p.indices + (int64_t{item.first_block} + walk.blocks) * C::rows;
      while (walk.left > 0) {
        const int bit = __ffs(walk.taps) - 1;
        const int tap = p.mirror_taps ? p.taps - 1 - first_tap - bit : first_tap + bit;
        const int k_end = walk.k_end(k_blocks);
        // The first step of this tap that is this team's.
        int k = walk.k + ((team - turn) & (C::teams - 1));
        turn = (turn + k_end - walk.k) & (C::teams - 1);
        ring.skip_few(k - walk.k);
        if (k < k_end) load_rows(block);
        walk.next_tap(k_blocks);
        block += C::rows;
#pragma unroll 1
        for (; k < k_end; k += C::teams) {
          fill_stage(item, bit, make_int3(k * C::depth, tap, item.column));
          ring.skip_few(C::teams);
        }
        ring.skip_few(k_end - k);
        // By then the description of the next item has arrived.
        if (item.steps - walk.left >= 4) look_ahead();
      }
      look_ahead();
      item = next;
    }
  }

  // The place in the tile of this warp's n-th row: copies go around the team.
  __device__ int row_of(int n) const {
    return (n / C::rows_of_copy * C::team + member) * C::rows_of_copy + n % C::rows_of_copy;
  }

  __device__ uint32_t place() const {
    const int row = row_of(lane / C::lanes);
    const int swizzled = C::depth == 64 ? piece ^ (row & 7) : piece ^ (row / 2 & 3);
    return shared.stages + row * C::row_bytes + swizzled * 16;
  }

  // This lane's of the warp's rows, every 32nd.
  __device__ void load_rows(const int32_t* block) {
    unroll<C::rows_of_warp / 32>([&](int i) { rows[i] = __ldg(block + row_of(i * 32 + lane)); });
  }
  __device__ int row_of_copy(int i) const {
    const int n = i * C::rows_of_copy;
    return __shfl_sync(0xffffffff, rows[n / 32], n % 32 + lane / C::lanes);
  }

  // place: (input channel, tap, output channel); bit: of the tap in the masks.
  __device__ void fill_stage(const Item& item, int bit, int3 place) {
    const uint32_t full = shared.full + 8 * ring.at;
    const uint32_t stage = ring.at * C::stage_bytes;
    ptx::barrier_wait(shared.free + 8 * ring.at, ring.parity ^ 1);
    if (lane == 0 && member == ring.at % C::team) {
      ptx::barrier_expect(full, C::b_bytes);
      copy_weights(shared.stages + stage + C::a_bytes, full, place);
    }
    const int channel = place.x + piece * 8;
    const bool unused = C::math == Math::bf16x6 && piece >= 6;
    const int outside = channel < p.units && !unused ? 0 : 1;
    const char* x = static_cast<const char*>(p.operand) + 2 * channel;
    unroll<2>([&](int half) {
      if (((half == 0 ? item.mask_0 : item.mask_1) >> bit & 1) == 0) return;
      unroll<C::copies / 2>([&](int j) {
        const int i = half * C::copies / 2 + j;
        // Rows four apart differ in one bit of the swizzle.
        const uint32_t to =
            C::depth == 64 && C::team == 1 && i % 2 == 1 ? first_place ^ 64 : first_place;
        ptx::gather_16(to + stage + i * C::rows_of_copy * C::team * C::row_bytes, x, row_of_copy(i),
                       p.operand_bytes, outside);
      });
    });
    ptx::copies_arrive(full);
  }

  __device__ void copy_weights(uint32_t to, uint32_t barrier, int3 place) const {
    if constexpr (C::in_contiguous) {
      ptx::copy_box(to, weight_map, barrier, place);
    } else {
      unroll<C::columns / C::box_columns>([&](int i) {
        ptx::copy_box(to + i * C::box_columns * C::row_bytes, weight_map, barrier,
                      make_int3(place.z + i * C::box_columns, place.y, place.x));
      });
    }
  }
};

// What a consumer's warps do.
template <class C>
struct Consumer {
  const ConvParams& p;
  const Shared& shared;
  int consumer = threadIdx.x / 128 - 1;
  int k_blocks = p.k_blocks(C::depth);
  Items<C> items = {p, shared};
  Sums<C> sums{p};
  ptx::Ring<C::stages> ring = {};
  int multiplying = -1;  // the stage whose products may be unfinished

  __device__ void run() {
    uint32_t turn_parity = consumer ^ 1;  // the first turn is nobody's to give
    Item item = items.next();
    for (int turn = 0; item.valid; ++turn, item = items.next()) {
      if (C::pingpong && turn % 2 != consumer) {
        ring.skip(item.steps);
        continue;
      }
      sums.clear(item);
      if (C::pingpong) {
        ptx::barrier_wait(shared.turn + 8 * consumer, turn_parity);
        turn_parity ^= 1;
      }
      multiply_item(item);
      // The other one's products may go on behind these.
      if (C::pingpong && threadIdx.x % 32 == 0) {
        ptx::barrier_arrive(shared.turn + 8 * (consumer ^ 1));
      }
      ptx::wait_for_last_launch();
      drain();
      sums.write(item);
    }
    // This launch must not end before the last one.
    ptx::wait_for_last_launch();
  }

  // Issues the products of all steps.
  __device__ void multiply_item(const Item& item) {
    const uint32_t mine = C::pingpong || consumer == 0 ? item.mask_0 : item.mask_1;
    for (Walk walk(item, k_blocks); walk.left > 0; walk.next_tap(k_blocks)) {
      const uint32_t tap = walk.taps & -walk.taps;
      const bool low = (mine & tap) != 0;
      const bool high = C::pingpong && (item.mask_1 & tap) != 0;
      if (!low && !high) drain();
      const int k_end = walk.k_end(k_blocks);
      for (int k = walk.k; k < k_end; ++k) {
        ptx::barrier_wait(shared.full + 8 * ring.at, ring.parity);
        if (low || high) {
          multiply_stage(low, high);
          ptx::wgmma_wait<1>();
          release_multiplied();
          multiplying = ring.at;
        } else {
          release(ring.at);
        }
        ring.next();
      }
    }
  }

  __device__ void multiply_stage(bool low, bool high) {
    const uint32_t b = shared.stages + ring.at * C::stage_bytes + C::a_bytes;
    const int first = C::pingpong ? 0 : consumer * C::row_blocks;
    const uint32_t a = b - C::a_bytes + first * 64 * C::row_bytes;
    ptx::proxy_fence();
    if constexpr (C::pingpong) {
      // A condition inside one group of products would put them one behind the other.
      constexpr int half = C::row_blocks / 2;
      if (low && high) {
        multiply<0, 2 * half>(a, b);
      } else if (low) {
        multiply<0, half>(a, b);
      } else {
        multiply<half, 2 * half>(a, b);
      }
    } else {
      multiply<0, C::row_blocks>(a, b);
    }
  }

  // Adds one stage to the sums of blocks [first, last) of 64 rows; a: of block 0.
  template <int first, int last>
  __device__ void multiply(uint32_t a, uint32_t b) {
    // Further on, descriptors differ by 16ths of the distance.
    const uint64_t rows = ptx::swizzled_operand<C::row_bytes>(a, 16, 8 * C::row_bytes);
    unroll<last - first>([&](int i) { ptx::pin(sums.d[first + i]); });
    ptx::wgmma_fence();
    constexpr int line = C::in_contiguous ? C::row_bytes : 2 * C::box_columns;  // bytes
    constexpr int k_bytes = C::in_contiguous ? 32 : 16 * line;
    const uint64_t weights =
        ptx::swizzled_operand<line>(b, C::in_contiguous ? 16 : C::depth * line, 8 * line);
    constexpr Products products = products_of(C::math, C::depth);
    unroll<products.count>([&](int i) {
      unroll<last - first>([&](int j) {
        ptx::wgmma<typename C::Operand, C::columns, false, !C::in_contiguous>(
            sums.d[first + j], rows + ((first + j) * 64 * C::row_bytes + products.a[i] * 32) / 16,
            weights + products.b[i] * k_bytes / 16);
      });
    });
    ptx::wgmma_commit();
  }

  __device__ void drain() {
    ptx::wgmma_wait<0>();
    release_multiplied();
  }
  __device__ void release_multiplied() {
    unroll<C::row_blocks>([&](int b) { ptx::pin(sums.d[b]); });
    if (multiplying >= 0) release(multiplying);
    multiplying = -1;
  }
  __device__ void release(int stage) const {
    if (threadIdx.x % 32 == 0) ptx::barrier_arrive(shared.free + 8 * stage);
  }
};

template <class C>
__global__ void __launch_bounds__(C::threads, 1)
    implicit_gemm(const __grid_constant__ CUtensorMap weight_map,
                  const __grid_constant__ ConvParams p) {
  extern __shared__ unsigned char memory[];
  Shared shared;
  shared.stages = (ptx::shared_address(memory) + 1023) & ~1023u;
  shared.full = shared.stages + C::stages * C::stage_bytes;
  shared.free = shared.full + 8 * C::stages;
  shared.turn = shared.free + 8 * C::stages;
  shared.item_full = shared.turn + 16;
  shared.item_free = shared.item_full + 8 * item_slots;
  shared.items = (shared.item_free + 8 * item_slots + 15) & ~15u;
  ptx::let_next_launch_start();
  if (threadIdx.x == 0) {
    ptx::barriers_init(shared.full, C::stages, 32 * C::team + 1);     // a team's lanes, weights
    ptx::barriers_init(shared.free, C::stages, C::pingpong ? 4 : 8);  // consumer warps
    ptx::barriers_init(shared.turn, 2, 4);
    ptx::barriers_init(shared.item_full, item_slots, 1);
    ptx::barriers_init(shared.item_free, item_slots, C::threads / 32);
    ptx::barrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    ptx::registers_down<C::producer_registers>();
    Producer<C>{p, &weight_map, shared}.run();
  } else {
    ptx::registers_up<C::consumer_registers>();
    Consumer<C>{p, shared}.run();
  }
}

}  // namespace voxgemm::cuda::sm90
