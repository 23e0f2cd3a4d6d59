// SPDX-License-Identifier: Apache-2.0
#pragma once

// What becomes of the sums of a piece: they are written, or left for add_pieces() to add to those
// of other teams; see grad_weight_sm90.cuh.

#include "cuda/kernels/grad_weight_sm90_pieces.cuh"
#include "cuda/ptx/barrier.cuh"

namespace voxgemm::cuda::grad_weight_sm90 {

// Of one consumer thread. Those that go to Params::partials lie there as [own_blocks, columns / 8]
// [256 threads] [4], four consecutive sums of a thread together.
template <class C>
using Sums = float[C::own_blocks][C::columns / 2];

// Where d[m][4 * j] of a consumer thread belongs, in no tap where that is negative. Sum 2 * h + e
// behind it belongs to input channel in + 8 * h and output channel out + e.
struct Four {
  int thread;  // of 256
  int m;
  int j;
};
template <class C>
__device__ __forceinline__ WeightPlace place_of(const Params& p,
                                                const Piece& piece,
                                                const Four& four) {
  const int row = four.thread % 128 / 32 * 16 + four.thread % 32 / 4;
  const int block = four.thread / 128 * C::own_blocks + four.m;
  return {p.tap_of<C>(piece.group, block / C::in_blocks * C::block_taps + row / C::width),
          piece.block / p.out_blocks * C::ins + block % C::in_blocks * 64 + row % C::width,
          piece.block % p.out_blocks * C::columns + 8 * four.j + four.thread % 4 * 2};
}
__device__ __forceinline__ bool exists(const Params& p, const WeightPlace& at) {
  return at.tap >= 0 && at.in < p.c_in && at.out < p.c_out;
}

// Writes sums of a thread, of which d[0][0] is that of `first`, and those that are NaN again.
template <class C, int blocks, int count>
__device__ __forceinline__ void write_sums(const Params& p,
                                           const Piece& piece,
                                           const Four& first,
                                           const float (&d)[blocks][count]) {
  using T = typename C::Source;
  const auto place = [&](int row, int column) {
    WeightPlace at = place_of<C>(p, piece, {first.thread, first.m + row / 2, first.j + column / 2});
    at.in += row % 2 * 8;
    at.out += column % 2;
    return at;
  };
  uint32_t broken = 0;  // of columns 8 * j + e, bit 2 * j + e
  const auto write = [&]<class Out>(Out* w) {
#pragma unroll
    for (int row = 0; row < 2 * blocks; ++row) {
      const WeightPlace at = place(row, 0);
      if (!exists(p, at)) continue;
      Out* const to = w + p.place_of(at);
#pragma unroll
      for (int i = 0; i < count / 2; ++i) {
        const int out = i / 2 * 8 + i % 2;
        const float sum = d[row / 2][i / 2 * 4 + row % 2 * 2 + i % 2];
        if (at.out + out < p.c_out) {
          to[out * p.w.out_stride] = Out(sum);
          broken |= static_cast<uint32_t>(isnan(sum)) << i;
        }
      }
    }
  };
  p.w.dtype == Dtype::f32 ? write(static_cast<float*>(p.w.data)) : write(static_cast<T*>(p.w.data));
  if constexpr (!C::has_absent) return;
  broken = __reduce_or_sync(0xffffffff, broken);
  for (; broken != 0; broken &= broken - 1) {
    for (int row = 0; row < 2 * blocks; ++row) {
      const WeightPlace at = place(row, __ffs(broken) - 1);
      if (exists(p, at)) p.store_gradient<T>(at, p.gradient_again<T>(at));
    }
  }
}

template <class C>
__device__ __forceinline__ float* partials_of(const Params& p, int slot, int member) {
  return p.partials + (static_cast<int64_t>(slot) * p.members + member) * C::piece_size;
}

template <class C>
__device__ __forceinline__ void finish_piece(const Params& p,
                                             const Piece& piece,
                                             const Sums<C>& d) {
  const int thread = static_cast<int>(threadIdx.x) - 256;
  if (piece.whole) return write_sums<C>(p, piece, {thread, 0, 0}, d);
  float* to = partials_of<C>(p, piece.slot, static_cast<int>(blockIdx.x) % p.members) + 4 * thread;
#pragma unroll
  for (int m = 0; m < C::own_blocks; ++m) {
#pragma unroll
    for (int j = 0; j < C::columns / 8; ++j) {
      *reinterpret_cast<float4*>(to + (m * C::columns / 8 + j) * 1024) =
          make_float4(d[m][4 * j], d[m][4 * j + 1], d[m][4 * j + 2], d[m][4 * j + 3]);
    }
  }
}

// Pieces that a thread reads at once.
constexpr int adds = 8;
constexpr int add_threads = 256;

// Row y of the grid: the member or, of one tap a group, (entry, member) or, where those are many,
// (boundary of two teams, member), the first boundary within an entry standing for it. Column x:
// four sums of all consumer threads.
template <class C>
__global__ void __launch_bounds__(add_threads) add_pieces(const __grid_constant__ Params p) {
  extern __shared__ AxisPlace starts[];
  if (!C::scheduled && threadIdx.x < 32) place_taps(p, starts);
  __syncthreads();
  ptx::wait_for_last_launch();
  const int member = static_cast<int>(blockIdx.y) % p.members;
  Piece piece = {.group = member / p.blocks, .block = member % p.blocks};
  // Of the first piece's place among the partial sums, and of the others'.
  int first = 0;
  int step = 1;
  int count = p.teams;
  if constexpr (!C::scheduled) {
    const int number = static_cast<int>(blockIdx.y) / p.members;
    const Axis axis = {p, starts};
    const bool few_entries = p.taps * p.parts < p.teams;
    const Entry entry = few_entries ? axis.entry(number / p.parts, number % p.parts)
                                    : axis.at(axis.team_begin(number + 1));
    const int first_team = axis.team_of(entry.begin);
    const int last_team = axis.team_of(entry.end - 1);
    piece.group = entry.tap;
    piece.block = entry.part * p.members + member;
    if (first_team == last_team || piece.block >= p.blocks) return;
    if (!few_entries && number != first_team) return;
    first = 2 * first_team + 1;
    count = last_team - first_team + 1;
    step = 2;
  }
  const int m = static_cast<int>(blockIdx.x) / (C::columns / 8);
  const int j = static_cast<int>(blockIdx.x) % (C::columns / 8);
  // The first team's piece is its last, those of the others are their first.
  const auto load = [&](int i) {
    const int slot = first + i * step - (i > 0 ? step - 1 : 0);
    const float* from = partials_of<C>(p, slot, member) + 1024 * blockIdx.x + 4 * threadIdx.x;
    return __ldcg(reinterpret_cast<const float4*>(from));
  };
  const float4 own = load(0);
  float sums[1][4] = {{own.x, own.y, own.z, own.w}};
  for (int i = 1; i < count; i += adds) {
    float4 more[adds];
#pragma unroll
    for (int t = 0; t < adds; ++t) more[t] = i + t < count ? load(i + t) : make_float4(0, 0, 0, 0);
#pragma unroll
    for (int t = 0; t < adds; ++t) {
      sums[0][0] += more[t].x;
      sums[0][1] += more[t].y;
      sums[0][2] += more[t].z;
      sums[0][3] += more[t].w;
    }
  }
  write_sums<C>(p, piece, {static_cast<int>(threadIdx.x), m, j}, sums);
}

}  // namespace voxgemm::cuda::grad_weight_sm90
