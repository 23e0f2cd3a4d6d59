// SPDX-License-Identifier: Apache-2.0
#pragma once

// Convolution on Hopper: y[o] = bias + sum over taps of x[in(o, t)] W[t], 16-bit operands, f32
// sums, over the tiles of a masked schedule (schedule.h).
//
// A CTA takes (tile, column block) items in turn, column blocks of a tile by neighbouring CTAs,
// which then read the same rows at about the same time and share them in the second-level cache.
// Warpgroup 0 fills a ring of stages; warpgroups 1 and 2 multiply. A stage is one tap and 64 input
// channels:
//   A [rows, 64]: rows of x, gathered by cp.async, eight lanes a row of 128 bytes; absent rows are
//   zero-filled B [64, columns] of W[tap], by one tensor copy (or one per 64 columns where the
//   output channels are contiguous)
// both with the 128-byte swizzle: 16-byte piece p of row r lies at piece p ^ (r & 7). Weights are
// used in place in either layout: contiguous input channels make B K-major, contiguous output
// channels MN-major.
//
// Each consumer owns half of the rows, with its own mask of taps: where none of its rows has a tap,
// it multiplies nothing and the producer gathers nothing for it; only the weights are shared.
//
// Synchronisation: `full` of a stage gets one arrival from every producer thread when its copies
// have landed and one with the bytes of the weights; `free` one from every consumer warp. cp.async
// writes through the generic proxy and wgmma reads through the asynchronous one, so consumers fence
// after `full` (measured: free). A consumer that skips a tap first drains what it still multiplies,
// or the ring would stop once a run of skips is longer than it.
//
// Several groups: all but the last write f32 partial sums [rows, c_out] of their own, the last adds
// them in order, so the bits do not depend on timing. It is launched after the others.
//
// A zero-filled row times an infinite weight is NaN, which an absent neighbour must not make. Sums
// that come out NaN are therefore computed once more, only over present rows (repair()); finite
// weights never get there.
//
// Lost against this in measurement (one H200): clusters with multicast weights (1.4 to 1.7 times
// slower; the hardware merges equal reads of neighbouring CTAs), one-row tensor copies for the
// gather (60% against 90%), an index load per copy instead of batches of eight (7 to 18% slower).

#include <cuda.h>

#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/copy.cuh"
#include "cuda/ptx/wgmma.cuh"

namespace voxgemm::cuda::sm90 {

struct ConvParams {
  const void* x = nullptr;   // [n_in, c_in]
  uint32_t x_row_bytes = 0;  // from row to row
  int c_in = 0;
  void* y = nullptr;  // [rows, c_out]
  int64_t y_stride = 0;
  int c_out = 0;
  const void* bias = nullptr;       // [c_out] or null
  const int4* tiles = nullptr;      // see ScheduleParts
  const uint32_t* masks = nullptr;  // [.., rows of a tile / 64]
  const int32_t* order = nullptr;
  const int32_t* indices = nullptr;  // [.., rows of a tile]
  int tile_count = 0;
  int column_blocks = 0;
  int taps = 0;
  int groups = 0;
  bool mirror_taps = false;
  bool last_group = true;
  float* partials = nullptr;  // [groups - 1, rows, c_out]
  int64_t rows = 0;
  // For repair() only.
  const int32_t* neighbours = nullptr;  // [taps, rows]
  const void* weights = nullptr;
  int64_t tap_stride = 0;
  int64_t in_stride = 0;
  int64_t out_stride = 0;
};

// row_blocks: blocks of 64 rows a consumer owns. in_contiguous: layout of the weights.
template <class Element, int row_blocks_, int columns_, int stages_, bool in_contiguous_>
struct Config {
  using T = Element;
  static constexpr int row_blocks = row_blocks_;
  static constexpr int columns = columns_;
  static constexpr int stages = stages_;
  static constexpr bool in_contiguous = in_contiguous_;
  static constexpr int rows = 128 * row_blocks;
  static constexpr int depth = 64;  // input channels a stage: 128 bytes a row
  static constexpr int a_bytes = rows * 128;
  static constexpr int b_bytes = columns * 128;
  static constexpr int stage_bytes = a_bytes + b_bytes;
  // Stages start at a multiple of 1024, the swizzle's period.
  static constexpr int shared_bytes = 1024 + stages * stage_bytes + 16 * stages;
  static constexpr int threads = 384;
  // 56 spill in the producer.
  static constexpr int producer_registers = 72;
  static constexpr int consumer_registers = 216;
};

// A tile and the columns of it that one CTA computes.
struct Item {
  bool valid = false;
  int group = 0;
  int rows = 0;
  int column = 0;
  int first = 0;
  int first_block = 0;
  uint32_t mask_0 = 0;  // of the rows of each consumer
  uint32_t mask_1 = 0;
  // Selected, not indexed: an indexed pair would live in memory.
  __device__ __forceinline__ uint32_t mask(int consumer) const {
    return consumer == 0 ? mask_0 : mask_1;
  }
};

template <class C>
__device__ __forceinline__ Item load_item(const ConvParams& p, int number) {
  Item item;
  item.valid = number < p.tile_count * p.column_blocks;
  if (!item.valid) return item;
  const int t = number / p.column_blocks;
  item.column = number % p.column_blocks * C::columns;
  const int4 tile = __ldg(p.tiles + t);
  item.first = tile.x;
  item.first_block = tile.y;
  item.rows = tile.z;
  item.group = tile.w;
  const uint32_t* masks = p.masks + int64_t{2 * C::row_blocks} * t;
#pragma unroll
  for (int b = 0; b < C::row_blocks; ++b) {
    item.mask_0 |= __ldg(masks + b);
    item.mask_1 |= __ldg(masks + C::row_blocks + b);
  }
  return item;
}

// The stage at hand and the parity of its barriers' phase.
template <int stages>
struct Ring {
  int stage = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void next() {
    if (++stage == stages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

struct Shared {
  uint32_t stages;  // addresses in shared memory
  uint32_t full;
  uint32_t free;
};

template <class C>
__device__ __forceinline__ void copy_weights(const CUtensorMap* map,
                                             uint32_t to,
                                             uint32_t barrier,
                                             int3 place) {
  // place: (input channel, tap, output channel)
  if constexpr (C::in_contiguous) {
    ptx::copy_box(to, map, barrier, place);
  } else {
#pragma unroll
    for (int block = 0; block < C::columns / 64; ++block) {
      ptx::copy_box(to + block * 8192, map, barrier,
                    make_int3(place.z + block * 64, place.y, place.x));
    }
  }
}

// Eight rows of a thread's index block.
struct EightRows {
  int4 low;
  int4 high;
  __device__ __forceinline__ int operator[](int i) const {
    const int4& half = i < 4 ? low : high;
    return i % 4 == 0 ? half.x : i % 4 == 1 ? half.y : i % 4 == 2 ? half.z : half.w;
  }
};

template <class C>
__device__ __forceinline__ void produce(const ConvParams& p,
                                        const CUtensorMap* weight_map,
                                        const Shared& shared) {
  const int thread = threadIdx.x;
  const int piece = thread % 8;          // 16 bytes of the 128 of a row
  const int first_row = thread / 8 * 8;  // of each block of 128 rows
  const auto* x = static_cast<const char*>(p.x) + piece * 16;
  const uint32_t row_bytes = p.x_row_bytes;
  const int k_blocks = (p.c_in + C::depth - 1) / C::depth;
  Ring<C::stages> ring;
  Item item = load_item<C>(p, blockIdx.x);
  for (int number = blockIdx.x; item.valid; number += gridDim.x) {
    const Item next = load_item<C>(p, number + gridDim.x);
    const int first_tap = item.group * p.taps / p.groups;
    const int32_t* block = p.indices + static_cast<int64_t>(item.first_block) * C::rows + first_row;
    EightRows upcoming[C::row_blocks];
    const auto load_rows = [&] {
#pragma unroll
      for (int b = 0; b < C::row_blocks; ++b) {
        const auto* from = reinterpret_cast<const int4*>(block + b * 128);
        upcoming[b] = {__ldg(from), __ldg(from + 1)};
      }
      block += C::rows;
    };
    uint32_t taps = item.mask_0 | item.mask_1;
    if (taps != 0) load_rows();
    while (taps != 0) {
      const int bit = __ffs(taps) - 1;
      taps &= taps - 1;
      const int tap = first_tap + bit;
      // The index block of the next tap is on its way while this one's rows are.
      EightRows rows[C::row_blocks];
#pragma unroll
      for (int b = 0; b < C::row_blocks; ++b) rows[b] = upcoming[b];
      if (taps != 0) load_rows();
      for (int kb = 0; kb < k_blocks; ++kb) {
        const uint32_t a = shared.stages + ring.stage * C::stage_bytes;
        const uint32_t full = shared.full + 8 * ring.stage;
        ptx::barrier_wait(shared.free + 8 * ring.stage, ring.parity ^ 1);
        if (thread == 0) {
          ptx::barrier_expect(full, C::b_bytes);
          const int source = p.mirror_taps ? p.taps - 1 - tap : tap;
          copy_weights<C>(weight_map, a + C::a_bytes, full,
                          make_int3(kb * C::depth, source, item.column));
        }
        const char* x_k = x + kb * 128;
        const bool inside = kb * C::depth + piece * 8 < p.c_in;
#pragma unroll
        for (int b = 0; b < C::row_blocks; ++b) {
          // The consumer that owns these rows.
          const int owner = C::row_blocks == 1 ? thread / 64 : b;
          if ((item.mask(owner) >> bit & 1) == 0) continue;
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            const uint32_t to = a + (b * 128 + first_row + i) * 128 + ((piece ^ i) << 4);
            const int row = rows[b][i];
            ptx::copy_16(
                to, x_k + static_cast<uint64_t>(static_cast<uint32_t>(max(row, 0))) * row_bytes,
                inside && row >= 0);
          }
        }
        ptx::copies_arrive(full);
        ring.next();
      }
    }
    item = next;
  }
}

// Four lanes each hold four words, word q of lane c being entry (q, c); afterwards (c, q).
__device__ __forceinline__ void transpose_quad(uint32_t (&v)[4], int c) {
  const uint32_t a = __shfl_xor_sync(0xffffffff, (c & 1) != 0 ? v[0] : v[1], 1);
  const uint32_t b = __shfl_xor_sync(0xffffffff, (c & 1) != 0 ? v[2] : v[3], 1);
  if ((c & 1) != 0) {
    v[0] = a;
    v[2] = b;
  } else {
    v[1] = a;
    v[3] = b;
  }
  const uint32_t d = __shfl_xor_sync(0xffffffff, (c & 2) != 0 ? v[0] : v[2], 2);
  const uint32_t e = __shfl_xor_sync(0xffffffff, (c & 2) != 0 ? v[1] : v[3], 2);
  if ((c & 2) != 0) {
    v[0] = d;
    v[1] = e;
  } else {
    v[2] = d;
    v[3] = e;
  }
}

__device__ __forceinline__ uint32_t pack_two(float low, float high, __half) {
  const __half2 two = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(two);
}
__device__ __forceinline__ uint32_t pack_two(float low, float high, __nv_bfloat16) {
  const __nv_bfloat162 two = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(two);
}

// The elements of a row that this lane held, computed once more over present rows only.
template <class C>
__device__ __forceinline__ void repair(const ConvParams& p, int64_t row, int column) {
  using T = typename C::T;
  for (int e = 0; e < C::columns / 4; ++e) {
    const int n = column + e / 2 * 8 + threadIdx.x % 4 * 2 + e % 2;
    if (n >= p.c_out) continue;
    float sum = 0;
    for (int tap = 0; tap < p.taps; ++tap) {
      const int in = p.neighbours[tap * p.rows + row];
      if (in < 0) continue;
      const T* x = reinterpret_cast<const T*>(static_cast<const char*>(p.x) +
                                              static_cast<uint64_t>(in) * p.x_row_bytes);
      const T* w = static_cast<const T*>(p.weights) +
                   (p.mirror_taps ? p.taps - 1 - tap : tap) * p.tap_stride + n * p.out_stride;
      for (int k = 0; k < p.c_in; ++k) sum += float(x[k]) * float(w[k * p.in_stride]);
    }
    if (p.bias != nullptr) sum += float(static_cast<const T*>(p.bias)[n]);
    static_cast<T*>(p.y)[row * p.y_stride + n] = T(sum);
  }
}

// Rounds and writes one of the two rows of a block that this lane's quad holds (h); row < 0: past
// the tile's end. Whether one of its sums was NaN.
template <class C>
__device__ __forceinline__ bool store_row(
    const ConvParams& p, const float (&d)[C::columns / 2], int h, int64_t row, int column) {
  using T = typename C::T;
  const int c = threadIdx.x % 4;
  bool broken = false;
#pragma unroll
  for (int j4 = 0; j4 < C::columns / 32; ++j4) {
    uint32_t word[4];
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const int n = column + j4 * 32 + q * 8 + c * 2;
      float2 sum = make_float2(d[(j4 * 4 + q) * 4 + h * 2], d[(j4 * 4 + q) * 4 + h * 2 + 1]);
      broken |= isnan(sum.x) || isnan(sum.y);
      if (p.bias != nullptr && n < p.c_out) {
        sum.x += float(static_cast<const T*>(p.bias)[n]);
        sum.y += float(static_cast<const T*>(p.bias)[n + 1]);
      }
      word[q] = pack_two(sum.x, sum.y, T());
    }
    transpose_quad(word, c);
    const int n = column + j4 * 32 + c * 8;
    if (row >= 0 && n < p.c_out) {
      *reinterpret_cast<uint4*>(static_cast<T*>(p.y) + row * p.y_stride + n) =
          make_uint4(word[0], word[1], word[2], word[3]);
    }
  }
  return broken && row >= 0;
}

// Adds what the other groups left for one of the rows.
template <class C>
__device__ __forceinline__ void add_partials(
    const ConvParams& p, float (&d)[C::columns / 2], int h, int64_t row, int column) {
  if (row < 0) return;
  for (int g = 0; g < p.groups - 1; ++g) {
    const float* part = p.partials + (g * p.rows + row) * p.c_out + column + threadIdx.x % 4 * 2;
#pragma unroll
    for (int j = 0; j < C::columns / 8; ++j) {
      if (column + j * 8 >= p.c_out) continue;
      const float2 sum = __ldcg(reinterpret_cast<const float2*>(part + j * 8));
      d[j * 4 + h * 2] += sum.x;
      d[j * 4 + h * 2 + 1] += sum.y;
    }
  }
}

template <class C>
__device__ __forceinline__ void store_partial(
    const ConvParams& p, const float (&d)[C::columns / 2], int h, int64_t place, int column) {
  const int c = threadIdx.x % 4;
#pragma unroll
  for (int j = 0; j < C::columns / 8; ++j) {
    const int n = column + j * 8 + c * 2;
    if (n >= p.c_out) continue;
    *reinterpret_cast<float2*>(p.partials + place * p.c_out + n) =
        make_float2(d[j * 4 + h * 2], d[j * 4 + h * 2 + 1]);
  }
}

// Adds one stage to the consumer's sums.
template <class C>
__device__ __forceinline__ void multiply(float (&d)[C::row_blocks][C::columns / 2],
                                         uint32_t a,
                                         uint32_t b) {
  using Multiply = ptx::Wgmma<typename C::T, C::columns, false, !C::in_contiguous>;
#pragma unroll
  for (int k = 0; k < C::depth / 16; ++k) {
    const uint64_t weights = C::in_contiguous ? ptx::swizzled_operand(b + k * 32, 16, 1024)
                                              : ptx::swizzled_operand(b + k * 2048, 8192, 1024);
#pragma unroll
    for (int block = 0; block < C::row_blocks; ++block) {
      Multiply::add(d[block], ptx::swizzled_operand(a + block * 8192 + k * 32, 16, 1024), weights);
    }
  }
}

// Writes a consumer's part of an item: partial sums, or the finished rows.
template <class C>
__device__ __forceinline__ void write_item(const ConvParams& p,
                                           const Item& item,
                                           float (&d)[C::row_blocks][C::columns / 2],
                                           const int (&row)[C::row_blocks][2]) {
  uint32_t broken = 0;
#pragma unroll
  for (int b = 0; b < C::row_blocks; ++b) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (p.last_group) {
        if (p.groups > 1) add_partials<C>(p, d[b], h, row[b][h], item.column);
        const bool nan = store_row<C>(p, d[b], h, row[b][h], item.column);
        broken |= static_cast<uint32_t>(nan) << (2 * b + h);
      } else if (row[b][h] >= 0) {
        store_partial<C>(p, d[b], h, item.group * p.rows + row[b][h], item.column);
      }
    }
  }
  // Another lane of the quad stored the elements that this one repairs.
  __syncwarp();
  for (; broken != 0; broken &= broken - 1) {
    const int at = __ffs(broken) - 1;
    const int block = (threadIdx.x / 128 - 1) * C::row_blocks + at / 2;
    const int place = block * 64 + threadIdx.x % 128 / 32 * 16 + at % 2 * 8;
    repair<C>(p, p.order[item.first + place + threadIdx.x % 32 / 4], item.column);
  }
}

template <class C>
__device__ __forceinline__ void consume(const ConvParams& p, const Shared& shared) {
  const int consumer = threadIdx.x / 128 - 1;
  const int warp = threadIdx.x % 128 / 32;
  const int lane = threadIdx.x % 32;
  const int k_blocks = (p.c_in + C::depth - 1) / C::depth;
  const auto release = [&](int stage) {
    if (lane == 0) ptx::barrier_arrive(shared.free + 8 * stage);
  };
  Ring<C::stages> ring;
  Item item = load_item<C>(p, blockIdx.x);
  for (int number = blockIdx.x; item.valid; number += gridDim.x) {
    const Item next = load_item<C>(p, number + gridDim.x);
    int row[C::row_blocks][2];
#pragma unroll
    for (int b = 0; b < C::row_blocks; ++b) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int at = (consumer * C::row_blocks + b) * 64 + warp * 16 + h * 8 + lane / 4;
        row[b][h] = at < item.rows ? __ldg(p.order + item.first + at) : -1;
      }
    }
    float d[C::row_blocks][C::columns / 2];
#pragma unroll
    for (int b = 0; b < C::row_blocks; ++b) {
#pragma unroll
      for (int i = 0; i < C::columns / 2; ++i) d[b][i] = 0;
    }
    const uint32_t mine = item.mask(consumer);
    int multiplying = -1;  // the stage whose products may be unfinished
    const auto drain = [&] {
      ptx::wgmma_wait<0>();
#pragma unroll
      for (int b = 0; b < C::row_blocks; ++b) ptx::pin(d[b]);
      if (multiplying >= 0) release(multiplying);
      multiplying = -1;
    };
    for (uint32_t taps = item.mask_0 | item.mask_1; taps != 0; taps &= taps - 1) {
      const bool active = (mine & (taps & -taps)) != 0;
      if (!active) drain();
      for (int kb = 0; kb < k_blocks; ++kb) {
        ptx::barrier_wait(shared.full + 8 * ring.stage, ring.parity);
        if (active) {
          const uint32_t a = shared.stages + ring.stage * C::stage_bytes;
          ptx::proxy_fence();
#pragma unroll
          for (int b = 0; b < C::row_blocks; ++b) ptx::pin(d[b]);
          ptx::wgmma_fence();
          multiply<C>(d, a + consumer * C::row_blocks * 8192, a + C::a_bytes);
          ptx::wgmma_commit();
          ptx::wgmma_wait<1>();
#pragma unroll
          for (int b = 0; b < C::row_blocks; ++b) ptx::pin(d[b]);
          if (multiplying >= 0) release(multiplying);
          multiplying = ring.stage;
        } else {
          release(ring.stage);
        }
        ring.next();
      }
    }
    drain();
    write_item<C>(p, item, d, row);
    item = next;
  }
}

template <class C>
__global__ void __launch_bounds__(C::threads, 1)
    implicit_gemm(const __grid_constant__ CUtensorMap weight_map,
                  const __grid_constant__ ConvParams p) {
  extern __shared__ unsigned char memory[];
  Shared shared;
  shared.stages = (ptx::shared_address(memory) + 1023) & ~1023u;
  shared.full = shared.stages + C::stages * C::stage_bytes;
  shared.free = shared.full + 8 * C::stages;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < C::stages; ++stage) {
      ptx::barrier_init(shared.full + 8 * stage, 128 + 1);  // producer threads, weights
      ptx::barrier_init(shared.free + 8 * stage, 8);        // consumer warps
    }
    ptx::barrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    ptx::registers_down<C::producer_registers>();
    produce<C>(p, &weight_map, shared);
  } else {
    ptx::registers_up<C::consumer_registers>();
    consume<C>(p, shared);
  }
}

}  // namespace voxgemm::cuda::sm90
