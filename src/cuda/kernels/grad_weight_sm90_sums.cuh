// SPDX-License-Identifier: Apache-2.0
#pragma once

// What becomes of the sums of a piece: they are written, computed anew where they are NaN, and
// added to those of other teams; see grad_weight_sm90.cuh.

#include "cuda/kernels/grad_weight_sm90_pieces.cuh"
#include "cuda/ptx/barrier.cuh"

namespace voxgemm::cuda::grad_weight_sm90 {

// Of one consumer thread. Those that go to Params::partials lie there as [own_blocks, columns / 8]
// [256 threads] [4], four consecutive sums of a thread together.
template <class C>
using Sums = float[C::own_blocks][C::columns / 2];

// Where a thread's sums belong: d[m][4 * j + 2 * h + e] to tap tap(m) of the group, input channel
// in(m) + 8 * h and output channel out() + 8 * j + e of the tile.
template <class C>
struct Place {
  int thread;  // of the consumers' 256

  __device__ __forceinline__ int row() const { return thread % 128 / 32 * 16 + thread % 32 / 4; }
  __device__ __forceinline__ int block(int m) const { return thread / 128 * C::own_blocks + m; }
  __device__ __forceinline__ int tap(int m) const {
    return block(m) / C::in_blocks * C::block_taps + row() / C::width;
  }
  __device__ __forceinline__ int in(int m) const {
    return block(m) % C::in_blocks * 64 + row() % C::width;
  }
  __device__ __forceinline__ int out() const { return thread % 4 * 2; }
};

// A thread's sums (m, h) of an entry of dw.
struct SumRow {
  int tap;
  int in;
  int out;  // of (j, e) = (0, 0)
  bool exists;
};
template <class C>
__device__ __forceinline__ SumRow
sum_row(const Params& p, const Piece& piece, const Place<C>& place, int m, int h) {
  const int tap = piece.tap(place.tap(m));
  const int in = piece.block / p.out_blocks * C::ins + place.in(m) + h * 8;
  const int out = piece.block % p.out_blocks * C::columns + place.out();
  return {tap, in, out, tap >= 0 && in < p.c_in};
}

// The element of dw.
template <class Out>
__device__ __forceinline__ Out* element(const Params& p, const SumRow& row) {
  return static_cast<Out*>(p.w) + p.place_of({row.tap, row.in, row.out});
}

// Element (j, e) of (m, h) is at[j * eight + e * one].
template <class Out>
struct Goal {
  Out* at;
  int64_t one;
  int64_t eight;
};

template <class C, class Out>
__device__ __forceinline__ void store_sums(const Params& p,
                                           const SumRow& row,
                                           const Goal<Out>& goal,
                                           const float (&d)[C::columns / 4]) {
  if (!row.exists) return;
#pragma unroll
  for (int i = 0; i < C::columns / 4; ++i) {
    if (row.out + i / 2 * 8 + i % 2 < p.c_out)
      goal.at[i / 2 * goal.eight + i % 2 * goal.one] = Out(d[i]);
  }
}

// The sums of a row once more, over present pairs only. By a whole warp, each lane for its own row.
template <class C>
__device__ __forceinline__ void repair(const Params& p,
                                       const Piece& piece,
                                       const SumRow& to,
                                       float (&d)[C::columns / 4]) {
  using T = typename C::Source;
#pragma unroll
  for (int i = 0; i < C::columns / 4; ++i) d[i] = 0;
  Batches batches(p, piece);
  for (int batch = batches.next(); batch >= 0; batch = batches.next()) {
    const BatchRows rows(p, batch);
    for (int r = 0; r < rows.count; ++r) {
      const int64_t row = rows.row(r);
      const int from = to.exists ? p.neighbours[to.tap * p.rows + row] : -1;
      if (from < 0) continue;
      const T* x = static_cast<const T*>(p.x) + from * p.x_stride;
      const T* dy = static_cast<const T*>(p.y) + row * p.y_stride;
      const auto value = static_cast<float>(x[to.in]);
#pragma unroll
      for (int i = 0; i < C::columns / 4; ++i) {
        const int n = to.out + i / 2 * 8 + i % 2;
        if (n < p.c_out) d[i] += value * static_cast<float>(dy[n]);
      }
    }
  }
}

// Stores every (m, h) at goal(m, h), unless that was done, and what is NaN again.
template <class C, class Out, class GoalOf>
__device__ __forceinline__ void write_sums(
    const Params& p, const Piece& piece, const Sums<C>& d, bool stored, const GoalOf& goal) {
  const Place<C> place = {static_cast<int>(threadIdx.x) - 256};
  uint32_t broken = 0;
#pragma unroll
  for (int m = 0; m < C::own_blocks; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const SumRow row = sum_row<C>(p, piece, place, m, h);
      float sums[C::columns / 4];
      bool nan = false;
#pragma unroll
      for (int i = 0; i < C::columns / 4; ++i) {
        sums[i] = d[m][i / 2 * 4 + h * 2 + i % 2];
        nan = nan || (row.out + i / 2 * 8 + i % 2 < p.c_out && isnan(sums[i]));
      }
      if (!stored) store_sums<C, Out>(p, row, goal(row, m, h), sums);
      broken |= static_cast<uint32_t>(row.exists && nan) << (2 * m + h);
    }
  }
  if constexpr (C::taps > 1 || C::terms > 1) {
    broken = __reduce_or_sync(0xffffffff, broken);
    for (; broken != 0; broken &= broken - 1) {
      const int m = (__ffs(broken) - 1) / 2;
      const int h = (__ffs(broken) - 1) % 2;
      const SumRow row = sum_row<C>(p, piece, place, m, h);
      float sums[C::columns / 4];
      repair<C>(p, piece, row, sums);
      store_sums<C, Out>(p, row, goal(row, m, h), sums);
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
  if (!piece.whole) {
    float* to = partials_of<C>(p, piece.slot, static_cast<int>(blockIdx.x) % p.members) +
                4 * (static_cast<int>(threadIdx.x) - 256);
#pragma unroll
    for (int m = 0; m < C::own_blocks; ++m) {
#pragma unroll
      for (int j = 0; j < C::columns / 8; ++j) {
        *reinterpret_cast<float4*>(to + (m * C::columns / 8 + j) * 1024) =
            make_float4(d[m][4 * j], d[m][4 * j + 1], d[m][4 * j + 2], d[m][4 * j + 3]);
      }
    }
    return write_sums<C, float>(p, piece, d, true, [&](const SumRow&, int m, int h) {
      return Goal<float>{to + m * C::columns / 8 * 1024 + 2 * h, 1, 1024};
    });
  }
  if (p.w_is_f32) {
    return write_sums<C, float>(p, piece, d, false, [&](const SumRow& row, int, int) {
      return Goal<float>{element<float>(p, row), p.out_stride, 8 * p.out_stride};
    });
  }
  using T = typename C::Source;
  write_sums<C, T>(p, piece, d, false, [&](const SumRow& row, int, int) {
    return Goal<T>{element<T>(p, row), p.out_stride, 8 * p.out_stride};
  });
}

// Pieces that a thread reads at once.
constexpr int adds = 8;
constexpr int add_threads = 256;

// Row y of the grid: without a schedule (entry, member) or, where those are many, (boundary of two
// teams, member), the first boundary within an entry standing for it; with one, the member. Column
// x: four sums of all consumer threads.
template <class C, class Out>
__global__ void __launch_bounds__(add_threads) add_pieces(const __grid_constant__ Params p) {
  extern __shared__ AxisPlace starts[];
  ptx::wait_for_last_launch();
  Piece piece = {};
  int member = static_cast<int>(blockIdx.y);
  // Of the first piece's place among the partial sums, and of the others'.
  int first = 0;
  int step = 1;
  int count = p.teams;
  if constexpr (C::scheduled) {
    int* taps = reinterpret_cast<int*>(starts);
    if (threadIdx.x < 32) deal_taps<C>(p, taps);
    __syncthreads();
    piece.group = member / p.blocks;
    piece.block = member % p.blocks;
    piece.taps = taps + piece.group * C::taps;
  } else {
    for (int g = threadIdx.x; g <= p.groups; g += add_threads) starts[g] = p.starts[g];
    __syncthreads();
    const int number = member / p.members;
    member %= p.members;
    const Entry entry = p.few_entries
                            ? entry_of(p, starts, number / p.parts, number % p.parts)
                            : entry_at(p, starts, static_cast<AxisPlace>(number + 1) << team_bits);
    const int first_team = static_cast<int>(entry.begin >> team_bits);
    const int last_team = static_cast<int>((entry.end - 1) >> team_bits);
    piece.group = entry.group;
    piece.block = entry.part * p.members + member;
    if (first_team == last_team || piece.block >= p.blocks) return;
    if (!p.few_entries && number != first_team) return;
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
  float4 sum = load(0);
  for (int i = 1; i < count; i += adds) {
    float4 more[adds];
#pragma unroll
    for (int t = 0; t < adds; ++t) more[t] = i + t < count ? load(i + t) : make_float4(0, 0, 0, 0);
#pragma unroll
    for (int t = 0; t < adds; ++t) {
      sum.x += more[t].x;
      sum.y += more[t].y;
      sum.z += more[t].z;
      sum.w += more[t].w;
    }
  }
  const Place<C> place = {static_cast<int>(threadIdx.x)};
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    SumRow row = sum_row<C>(p, piece, place, m, h);
    row.out += 8 * j;
    if (!row.exists) continue;
    Out* to = element<Out>(p, row);
    if (row.out < p.c_out) to[0] = Out(h == 0 ? sum.x : sum.z);
    if (row.out + 1 < p.c_out) to[p.out_stride] = Out(h == 0 ? sum.y : sum.w);
  }
}

}  // namespace voxgemm::cuda::grad_weight_sm90
