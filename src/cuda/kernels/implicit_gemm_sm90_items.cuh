// SPDX-License-Identifier: Apache-2.0
#pragma once

// What the CTAs of implicit_gemm_sm90.cuh work on, and how they come by it.
//
// All warps of a CTA go through the same items. Thread 0 draws their numbers, loads what is to be
// known of them and hands it on through a ring of `item_slots` slots in shared memory, an item
// ahead of the producer. `item_full` of a slot gets one arrival from thread 0, `item_free` one from
// the lane of every warp that reads it. Tiles come longest first, and the first two turns go forth
// and back over the CTAs, so that who has the longest item gets the shortest next. A few turns go
// on like that; more of them draw from a counter of the launch, which another has to clear.
//
// The compiler keeps what it knows to be the same for a whole warp in uniform registers, which
// barriers and tensor copies ask for; what it does not is brought there by a loop at every use, for
// 5 to 10% of the time. It takes constants, loads from such addresses and what follows from them to
// be uniform, but nothing behind a loop that only some threads of a warp enter. Hence everybody
// waits where thread 0 must, and prefetching has no loop.

#include "cuda/kernels/pass.cuh"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/copy.cuh"

namespace voxgemm::cuda::sm90 {

// Of the operands as they were given, but y as it is written.
struct ConvParams : PassArgs {
  const void* operand = nullptr;  // x as it is gathered: [n_in, units]
  uint32_t operand_bytes = 0;     // from row to row
  int units = 0;                  // input channels as the kernels take them, 16 bits each
  int group_tiles = 0;
  int chunk_tiles = 0;  // of a group in a whole chunk
  int groups = 0;
  int group = 0;       // of this launch, unless split
  int added = 0;       // buffers that this launch adds to its sums
  bool split = false;  // the launch takes all groups, and all sums are partial
  int slices = 1;      // of the steps of a tile
  int column_blocks = 0;
  int* next_item = nullptr;   // how many items were asked for; null: they are dealt in turn
  float* partials = nullptr;  // [1 or groups * slices, rows, partial_stride]
  int partial_stride = 0;     // c_out rounded up to 8

  __device__ int k_blocks(int depth) const { return (units + depth - 1) / depth; }
  __host__ __device__ int tile_count() const { return group_tiles * (split ? groups : 1); }
};

// Items that are known to the CTA and not yet to all of its warps.
constexpr int item_slots = 4;
constexpr int item_bytes = 32;  // its tile; column, slice, masks of its halves; no column: the end

// Lane 0's value. Nothing that is computed from it is moved up from here.
template <class T>
__device__ inline T uniform(T value) {
  return __shfl_sync(0xffffffff, value, 0);
}

// A tile, the columns of it and the steps of it that one CTA computes.
struct Item {
  bool valid = false;
  int group = 0;
  int rows = 0;
  int column = 0;
  int slice = 0;
  int first = 0;
  int first_block = 0;
  int first_step = 0;
  int steps = 0;
  uint32_t mask_0 = 0;  // of the rows of each half
  uint32_t mask_1 = 0;
  __device__ uint32_t mask() const { return mask_0 | mask_1; }
};

// Where in an item's steps: a tap of its mask, a block of input channels, steps left.
struct Walk {
  uint32_t taps = 0;  // the lowest bit is the tap at hand
  int k = 0;
  int left = 0;
  int blocks = 0;  // index blocks before the tap
  __device__ Walk(const Item& item, int k_blocks) : taps(item.mask()), left(item.steps) {
    if (item.first_step == 0) return;
    blocks = item.first_step / k_blocks;
    k = item.first_step % k_blocks;
    for (int i = 0; i < blocks; ++i) taps &= taps - 1;
  }
  __device__ int k_end(int k_blocks) const { return min(k_blocks, k + left); }
  __device__ void next_tap(int k_blocks) {
    left -= k_end(k_blocks) - k;
    k = 0;
    taps &= taps - 1;
  }
};

struct Shared {
  uint32_t stages;  // addresses in shared memory
  uint32_t full;
  uint32_t free;
  uint32_t turn;
  uint32_t item_full;
  uint32_t item_free;
  uint32_t items;
};

// The items of a CTA in turn, as every warp sees them.
template <class C>
struct Items {
  const ConvParams& p;
  const Shared& shared;
  ptx::Ring<item_slots> ring = {};

  __device__ Item next() {
    ptx::barrier_wait(shared.item_full + 8 * ring.at, ring.parity);
    const uint32_t slot = shared.items + item_bytes * ring.at;
    int4 tile = {};
    int4 rest = {};
    if (threadIdx.x % 32 == 0) {
      tile = ptx::load_shared_16(slot);
      rest = ptx::load_shared_16(slot + 16);
      ptx::barrier_arrive(shared.item_free + 8 * ring.at);
    }
    Item item;
    item.first = uniform(tile.x);
    item.first_block = uniform(tile.y);
    item.rows = uniform(tile.z);
    item.group = uniform(tile.w);
    item.column = uniform(rest.x);
    item.slice = uniform(rest.y);
    item.mask_0 = uniform(rest.z);
    item.mask_1 = uniform(rest.w);
    ring.next();
    item.valid = item.column >= 0;
    const int all = __popc(item.mask()) * p.k_blocks(C::depth);
    item.first_step = item.slice * all / p.slices;
    item.steps = (item.slice + 1) * all / p.slices - item.first_step;
    return item;
  }
};

// Of the producer, thread 0: loads an item, later hands it out and draws the number of the next.
template <class C>
struct Dealer {
  const ConvParams& p;
  const Shared& shared;
  ptx::Ring<item_slots> ring = {};
  int turn = 0;
  int number = static_cast<int>(blockIdx.x);
  int4 tile = {};
  int4 rest = {};

  __device__ void load() {
    if (threadIdx.x != 0) return;
    rest = make_int4(-1, 0, 0, 0);
    const int tiles = p.tile_count();
    if (number >= tiles * p.column_blocks * p.slices) return;
    // Neighbours share what costs more: rows, or the weights where tiles are few.
    int t;
    if (p.split) {
      t = number % tiles;
      rest.x = number / tiles % p.column_blocks * C::columns;
      rest.y = number / tiles / p.column_blocks;
    } else {
      t = number / p.column_blocks;
      rest.x = number % p.column_blocks * C::columns;
      // Tiles lie chunk by chunk, in a chunk group by group.
      const int before = t / p.chunk_tiles * p.chunk_tiles;  // of a group
      t += before * (p.groups - 1) + p.group * min(p.chunk_tiles, p.group_tiles - before);
    }
    tile = __ldg(p.tiles + t);
    unroll<C::rows / 128>([&](int i) {
      rest.z |= __ldg(p.masks + t * (C::rows / 64) + i);
      rest.w |= __ldg(p.masks + t * (C::rows / 64) + C::rows / 128 + i);
    });
  }
  __device__ void hand_out() {
    ptx::barrier_wait(shared.item_free + 8 * ring.at, ring.parity ^ 1);
    if (threadIdx.x == 0) {
      ptx::store_shared_16(shared.items + item_bytes * ring.at, tile);
      ptx::store_shared_16(shared.items + item_bytes * ring.at + 16, rest);
      ptx::barrier_arrive(shared.item_full + 8 * ring.at);
      const auto ctas = static_cast<int>(gridDim.x);
      const auto cta = static_cast<int>(blockIdx.x);
      ++turn;
      number = turn > 1 && p.next_item != nullptr
                   ? 2 * ctas + atomicAdd(p.next_item, 1)
                   : turn * ctas + (turn % 2 == 0 ? cta : ctas - 1 - cta);
    }
    ring.next();
  }
};

}  // namespace voxgemm::cuda::sm90
