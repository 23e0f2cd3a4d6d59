// SPDX-License-Identifier: Apache-2.0
#pragma once

// What becomes of the sums of a piece: they are written, computed anew where they are NaN, and
// added to those of other teams; see grad_weight_sm90.cuh.

#include "cuda/kernels/grad_weight_sm90_pieces.cuh"
#include "cuda/ptx/barrier.cuh"

namespace voxgemm::cuda::grad_weight_sm90 {

template <class C>
using Sums = float[C::own_blocks][C::columns / 2];

// Where a lane's sums lie: of block m, h and (j, e), the tap `tap(m)` of the group, input channel
// in(m) + 8 * h and output channel out + 8 * j + e.
template <class C>
struct Place {
  int consumer = threadIdx.x / 128 - 1;
  int row = threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;  // of a block's 64, with h = 0
  __device__ __forceinline__ int tap(int m) const {
    return (consumer * C::own_blocks + m) / C::in_blocks * C::block_taps + row / C::width;
  }
  __device__ __forceinline__ int in(int m) const {
    return (consumer * C::own_blocks + m) % C::in_blocks * 64 + row % C::width;
  }
  __device__ __forceinline__ int out() const { return threadIdx.x % 4 * 2; }
};

// Where the sums of (m, h) begin, in `to`; null if they are outside of dw.
template <class C, class Out>
__device__ __forceinline__ Out* first_sum(
    const Params& p, const Piece& piece, const Target& to, int m, int h) {
  const Place<C> place;
  const int in = place.in(m) + h * 8;
  const bool inside = piece.group * C::taps + place.tap(m) < p.taps &&
                      piece.block / p.out_blocks * C::ins + in < p.c_in;
  return inside ? static_cast<Out*>(to.data) + place.tap(m) * to.tap_stride + in * to.in_stride +
                      place.out() * to.out_stride
                : nullptr;
}

// Whether one of them is NaN.
template <class C, class Out>
__device__ __forceinline__ bool store_sums(const Params& p,
                                           const Piece& piece,
                                           const float (&d)[C::columns / 4],
                                           Out* at,
                                           int64_t stride) {
  bool nan = false;
  if (at == nullptr) return nan;
  const int left = p.c_out - piece.block % p.out_blocks * C::columns - Place<C>().out();
#pragma unroll
  for (int j = 0; j < C::columns / 8; ++j) {
    if (j * 8 < left) {
      at[0] = Out(d[2 * j]);
      nan = nan || isnan(d[2 * j]);
    }
    if (j * 8 + 1 < left) {
      at[stride] = Out(d[2 * j + 1]);
      nan = nan || isnan(d[2 * j + 1]);
    }
    at += 8 * stride;
  }
  return nan;
}

// The sums of (m, h) once more, over present pairs only. By a whole warp.
template <class C>
__device__ __forceinline__ void repair(
    const Params& p, const Piece& piece, int m, int h, float (&d)[C::columns / 4]) {
  using T = typename C::T;
  const Place<C> place;
  const int in = piece.block / p.out_blocks * C::ins + place.in(m) + h * 8;
  const int out = piece.block % p.out_blocks * C::columns + place.out();
  const int tap = piece.group * C::taps + place.tap(m);
#pragma unroll
  for (int i = 0; i < C::columns / 4; ++i) d[i] = 0;
  Chunks chunks(p, piece);
  for (int chunk = chunks.next(); chunk >= 0; chunk = chunks.next()) {
    const int64_t first = static_cast<int64_t>(chunk) * chunk_rows;
    const int64_t end = min(p.rows, first + chunk_rows);
    for (int64_t row = first; row < end; ++row) {
      const int from = tap < p.taps ? p.neighbours[tap * p.rows + row] : -1;
      if (from < 0 || in >= p.c_in) continue;
      const auto* x = reinterpret_cast<const T*>(static_cast<const char*>(p.x) +
                                                 from * static_cast<int64_t>(p.x_row_bytes));
      const auto* dy = reinterpret_cast<const T*>(static_cast<const char*>(p.dy) +
                                                  row * static_cast<int64_t>(p.dy_row_bytes));
      const auto value = static_cast<float>(x[in]);
#pragma unroll
      for (int i = 0; i < C::columns / 4; ++i) {
        const int n = out + i / 2 * 8 + i % 2;
        if (n < p.c_out) d[i] += value * static_cast<float>(dy[n]);
      }
    }
  }
}

template <class C, class Out>
__device__ __forceinline__ void write_sums(const Params& p,
                                           const Piece& piece,
                                           const Target& to,
                                           const Sums<C>& d) {
  uint32_t broken = 0;
#pragma unroll
  for (int m = 0; m < C::own_blocks; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float row[C::columns / 4];
#pragma unroll
      for (int i = 0; i < C::columns / 4; ++i) row[i] = d[m][i / 2 * 4 + h * 2 + i % 2];
      const bool nan =
          store_sums<C>(p, piece, row, first_sum<C, Out>(p, piece, to, m, h), to.out_stride);
      broken |= static_cast<uint32_t>(nan) << (2 * m + h);
    }
  }
  if constexpr (C::taps > 1) {
    broken = __reduce_or_sync(0xffffffff, broken);
    for (; broken != 0; broken &= broken - 1) {
      const int at = __ffs(broken) - 1;
      float row[C::columns / 4];
      repair<C>(p, piece, at / 2, at % 2, row);
      store_sums<C>(p, piece, row, first_sum<C, Out>(p, piece, to, at / 2, at % 2), to.out_stride);
    }
  }
}

template <class C>
__device__ __forceinline__ void finish_piece(const Params& p,
                                             const Piece& piece,
                                             const Sums<C>& d) {
  if (!piece.whole) {
    const int64_t number = static_cast<int64_t>(piece.slot) * p.members + blockIdx.x % p.members;
    Target to = p.piece;
    to.data = p.partials + number * C::piece_size;
    return write_sums<C, float>(p, piece, to, d);
  }
  const int64_t at = piece.group * C::taps * p.dw.tap_stride +
                     piece.block / p.out_blocks * C::ins * p.dw.in_stride +
                     piece.block % p.out_blocks * C::columns * p.dw.out_stride;
  Target to = p.dw;
  if (p.dw_is_f32) {
    to.data = static_cast<float*>(p.dw.data) + at;
    write_sums<C, float>(p, piece, to, d);
  } else {
    to.data = static_cast<typename C::T*>(p.dw.data) + at;
    write_sums<C, typename C::T>(p, piece, to, d);
  }
}

// A thread adds this many elements of a piece, this many pieces at once.
constexpr int adds = 2;
constexpr int add_pieces_at_once = 8;
constexpr int add_threads = 256;

// Row y of the grid: (entry, member), or where those are many (boundary of two teams, member), the
// first boundary within an entry standing for it.
template <class C, class Out>
__global__ void __launch_bounds__(add_threads) add_pieces(const __grid_constant__ Params p) {
  extern __shared__ AxisPlace starts[];
  ptx::wait_for_last_launch();
  for (int g = threadIdx.x; g <= p.groups; g += add_threads) starts[g] = p.starts[g];
  __syncthreads();
  const int number = static_cast<int>(blockIdx.y) / p.members;
  const int member = static_cast<int>(blockIdx.y) % p.members;
  const Entry entry = p.few_entries
                          ? entry_of(p, starts, number / p.parts, number % p.parts)
                          : entry_at(p, starts, static_cast<AxisPlace>(number + 1) << team_bits);
  const int first = static_cast<int>(entry.begin >> team_bits);
  const int last = static_cast<int>((entry.end - 1) >> team_bits);
  const int block = entry.part * p.members + member;
  if (first == last || block >= p.blocks || (!p.few_entries && number != first)) return;
  const int base = blockIdx.x * adds * add_threads + threadIdx.x;
  const auto load = [&](int slot, int i) {
    return __ldcg(p.partials + (static_cast<int64_t>(slot) * p.members + member) * C::piece_size +
                  base + i * add_threads);
  };
  float sums[adds];
#pragma unroll
  for (int i = 0; i < adds; ++i) sums[i] = load(2 * first + 1, i);
  for (int team = first + 1; team <= last; team += add_pieces_at_once) {
    float more[add_pieces_at_once][adds];
#pragma unroll
    for (int t = 0; t < add_pieces_at_once; ++t) {
#pragma unroll
      for (int i = 0; i < adds; ++i) more[t][i] = team + t <= last ? load(2 * (team + t), i) : 0.f;
    }
#pragma unroll
    for (int t = 0; t < add_pieces_at_once; ++t) {
#pragma unroll
      for (int i = 0; i < adds; ++i) sums[i] += more[t][i];
    }
  }
#pragma unroll
  for (int i = 0; i < adds; ++i) {
    const int at = base + i * add_threads;
    const int tap = entry.group * C::taps + at / (C::ins * C::columns);
    const int inner = at % (C::ins * C::columns);
    const bool ins_inner = p.piece.in_stride == 1;
    const int in =
        block / p.out_blocks * C::ins + (ins_inner ? inner % C::ins : inner / C::columns);
    const int out =
        block % p.out_blocks * C::columns + (ins_inner ? inner / C::ins : inner % C::columns);
    if (tap >= p.taps || in >= p.c_in || out >= p.c_out) continue;
    static_cast<Out*>(
        p.dw.data)[tap * p.dw.tap_stride + in * p.dw.in_stride + out * p.dw.out_stride] =
        Out(sums[i]);
  }
}

}  // namespace voxgemm::cuda::grad_weight_sm90
