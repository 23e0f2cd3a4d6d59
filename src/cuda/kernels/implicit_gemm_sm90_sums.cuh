// SPDX-License-Identifier: Apache-2.0
#pragma once

// What becomes of the f32 sums of implicit_gemm_sm90.cuh: rounded rows of y, or partial sums for a
// later launch to add.
//
// A warpgroup's matrix instruction leaves two rows to every four lanes (a quad), and in both lane c
// columns 8 j + 2 c and the next for every j. Written like that, f32 sums and results are stored 8
// bytes at a time and 16-bit results 4, at a third of the speed of 16 bytes; so the lanes of a quad
// exchange what they hold first.
//
// Partial sums lie in buffers [rows, partial_stride], one for every group and slice; whoever
// finishes a row adds them in the order of the buffers, so the bits do not depend on timing.
//
// A zero-filled row times an infinite weight is NaN, which an absent neighbour must not make. Sums
// that come out NaN are therefore computed once more, only over present rows; finite
// weights never get there. The same puts right what splitting f32 operands makes of infinite ones.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/kernels/pass.cuh"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/copy.cuh"

namespace voxgemm::cuda::sm90 {

// Of the operands as they were given, but y as it is written.
struct ConvParams : PassArgs {
  const void* operand = nullptr;    // x as it is gathered: [n_in, units]
  uint32_t operand_bytes = 0;       // from row to row
  int units = 0;                    // input channels as the kernels take them, 16 bits each
  const int4* tiles = nullptr;      // see ScheduleParts
  const uint32_t* masks = nullptr;  // [.., rows of a tile / 64]
  const int32_t* order = nullptr;
  const int32_t* indices = nullptr;  // [.., rows of a tile]
  int tile_count = 0;                // of this launch, which takes consecutive groups
  int group_tiles = 0;               // of each group
  int chunk_tiles = 0;               // of each group in a whole chunk
  int first_group = 0;
  int launched_groups = 0;
  int column_blocks = 0;
  int slices = 1;            // of the steps of a tile
  int* next_item = nullptr;  // how many items were asked for; null: they are dealt in turn
  bool tiles_first = false;  // items of neighbours are tiles, else column blocks
  int groups = 0;
  float* partials = nullptr;  // [buffers, rows, partial_stride]
  int partial_stride = 0;     // c_out rounded up to 8
  int added = 0;              // the first so many buffers are added to the sums of this launch
  bool finish = true;         // rows of y are written, else buffer group * group_buffers + slice
  int group_buffers = 0;
};

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

// Two lanes c and c ^ 1 each hold `low` and `high`, two columns of the eight that begin at 2 c and
// of the eight behind those. Afterwards the even one has four columns of the first eight and the
// odd one four of the second, from even_column(c) on.
__device__ __forceinline__ float4 exchange_pair(float2 low, float2 high, int c) {
  const bool odd = (c & 1) != 0;
  float2 got;
  got.x = __shfl_xor_sync(0xffffffff, odd ? low.x : high.x, 1);
  got.y = __shfl_xor_sync(0xffffffff, odd ? low.y : high.y, 1);
  return odd ? make_float4(got.x, got.y, high.x, high.y) : make_float4(low.x, low.y, got.x, got.y);
}
// The other way round.
__device__ __forceinline__ void exchange_back(float4 v, int c, float2* low, float2* high) {
  const bool odd = (c & 1) != 0;
  float2 got;
  got.x = __shfl_xor_sync(0xffffffff, odd ? v.x : v.z, 1);
  got.y = __shfl_xor_sync(0xffffffff, odd ? v.y : v.w, 1);
  *low = odd ? got : make_float2(v.x, v.y);
  *high = odd ? make_float2(v.z, v.w) : got;
}
__device__ __forceinline__ int even_column(int c) { return (c & 1) != 0 ? 8 + 2 * (c - 1) : 2 * c; }

__device__ __forceinline__ uint32_t pack_two(float low, float high, __half) {
  const __half2 two = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(two);
}
__device__ __forceinline__ uint32_t pack_two(float low, float high, __nv_bfloat16) {
  const __nv_bfloat162 two = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(two);
}

template <class T>
__device__ __forceinline__ float bias_at(const ConvParams& p, int n) {
  return n < p.c_out ? float(static_cast<const T*>(p.bias)[n]) : 0.0f;
}

// Adds it to a consumer's sums: all at once, since the stores of them are one long stretch without
// a branch, in which the exchanges of lanes wait for each other as little as they can.
template <class C>
__device__ __forceinline__ void add_bias(const ConvParams& p,
                                         float (&d)[C::row_blocks][C::columns / 2],
                                         int column) {
#pragma unroll
  for (int j = 0; j < C::columns / 8; ++j) {
    const int n = column + j * 8 + threadIdx.x % 4 * 2;
    const float low = bias_at<typename C::Result>(p, n);
    const float high = bias_at<typename C::Result>(p, n + 1);
#pragma unroll
    for (int b = 0; b < C::row_blocks; ++b) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        d[b][j * 4 + h * 2] += low;
        d[b][j * 4 + h * 2 + 1] += high;
      }
    }
  }
}

// Writes eight (16-bit) or four columns.
__device__ __forceinline__ void store_16(void* to, const uint32_t (&word)[4]) {
  *static_cast<uint4*>(to) = make_uint4(word[0], word[1], word[2], word[3]);
}

// Rounds and writes one of the two rows (h) of a block of 64 that this lane's quad holds; row < 0:
// past the tile's end. Whether one of its sums is NaN.
template <class C>
__device__ __forceinline__ bool store_row(
    const ConvParams& p, const float (&d)[C::columns / 2], int h, int64_t row, int column) {
  using T = typename C::Result;
  const int c = threadIdx.x % 4;
  T* const y = static_cast<T*>(p.y) + row * p.y_stride;
  bool broken = false;
  const auto sum_of = [&](int j) {
    const float2 sum = make_float2(d[j * 4 + h * 2], d[j * 4 + h * 2 + 1]);
    broken |= !(sum.x < sum.y || sum.x >= sum.y);  // neither where one is NaN: one instruction
    return sum;
  };
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int j = 0; j < C::columns / 8; j += 2) {
      const float4 v = exchange_pair(sum_of(j), sum_of(j + 1), c);
      const int n = column + j * 8 + even_column(c);
      if (row >= 0 && n < p.c_out) *reinterpret_cast<float4*>(y + n) = v;
    }
  } else {
#pragma unroll
    for (int j4 = 0; j4 < C::columns / 32; ++j4) {
      uint32_t word[4];
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        const float2 sum = sum_of(j4 * 4 + q);
        word[q] = pack_two(sum.x, sum.y, T());
      }
      transpose_quad(word, c);
      const int n = column + j4 * 32 + c * 8;
      if (row >= 0 && n < p.c_out) store_16(y + n, word);
    }
  }
  return broken && row >= 0;
}

// Asks for what other launches left for such a row, while the last products are made.
template <class C>
__device__ __forceinline__ void prefetch_partials(const ConvParams& p, int64_t row, int column) {
  if (row < 0) return;
  constexpr int line = 32;  // floats
  for (int buffer = 0; buffer < p.added; ++buffer) {
    const float* part = p.partials + (buffer * p.rows + row) * p.partial_stride;
#pragma unroll
    for (int at = 0; at < C::columns; at += 4 * line) {
      const int n = column + at + static_cast<int>(threadIdx.x) % 4 * line;
      if (n < p.partial_stride) ptx::prefetch(part + n);
    }
  }
}

// Adds what other launches left for such a row.
template <class C>
__device__ __forceinline__ void add_partials(
    const ConvParams& p, float (&d)[C::columns / 2], int h, int64_t row, int column) {
  const int c = threadIdx.x % 4;
  const int first = column + even_column(c);
  for (int buffer = 0; buffer < p.added; ++buffer) {
    const float* part = p.partials + (buffer * p.rows + max(row, int64_t{0})) * p.partial_stride;
    // Eight loads are under way at a time.
    constexpr int batch = C::columns / 16 < 8 ? C::columns / 16 : 8;
#pragma unroll
    for (int j0 = 0; j0 < C::columns / 8; j0 += 2 * batch) {
      float4 v[batch];
#pragma unroll
      for (int i = 0; i < batch; ++i) {
        const int n = first + (j0 + 2 * i) * 8;
        v[i] = row >= 0 && n < p.partial_stride ? __ldcg(reinterpret_cast<const float4*>(part + n))
                                                : make_float4(0, 0, 0, 0);
      }
#pragma unroll
      for (int i = 0; i < batch; ++i) {
        const int j = j0 + 2 * i;
        float2 low;
        float2 high;
        exchange_back(v[i], c, &low, &high);
        d[j * 4 + h * 2] += low.x;
        d[j * 4 + h * 2 + 1] += low.y;
        d[j * 4 + 4 + h * 2] += high.x;
        d[j * 4 + 4 + h * 2 + 1] += high.y;
      }
    }
  }
}

// place: buffer * rows + row; < 0: past the tile's end.
template <class C>
__device__ __forceinline__ void store_partial(
    const ConvParams& p, const float (&d)[C::columns / 2], int h, int64_t place, int column) {
  const int c = threadIdx.x % 4;
#pragma unroll
  for (int j = 0; j < C::columns / 8; j += 2) {
    const float4 v = exchange_pair(make_float2(d[j * 4 + h * 2], d[j * 4 + h * 2 + 1]),
                                   make_float2(d[j * 4 + 4 + h * 2], d[j * 4 + 4 + h * 2 + 1]), c);
    const int n = column + j * 8 + even_column(c);
    if (place >= 0 && n < p.partial_stride) {
      *reinterpret_cast<float4*>(p.partials + place * p.partial_stride + n) = v;
    }
  }
}

}  // namespace voxgemm::cuda::sm90
