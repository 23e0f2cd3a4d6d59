// SPDX-License-Identifier: Apache-2.0
//
// Results that are combinations of a few rows of a matrix: y[r] = op over taps t of x[rows(t, r)].
// A thread owns `Op::width` columns (16 bytes where everything is aligned to that, else one) of
// `Op::rows` result rows, and keeps their state in registers; what an op has per tap, such as
// weights, is loaded once for all of them. Neighbouring lanes own neighbouring columns, then
// neighbouring rows: a warp reads whole lines of x, and the row numbers of a tap lie side by side.
// The row numbers of the next tap are loaded before the rows of this one are waited for. Absent
// rows are not read. Nothing is shared, nothing synchronises; limited by what L1 and L2 give.
#pragma once

#include "cuda/float.cuh"
#include "cuda/launch.cuh"
#include "voxgemm/kernel_map.h"

namespace voxgemm::cuda {

template <class T, int n>
struct alignas(sizeof(T) * n < 16 ? sizeof(T) * n : 16) Pack {
  T v[n];
};

// Where the row numbers are, and the shapes. Numbers outside [0, rows_in) are absent.
struct Gather {
  const int32_t* rows;  // of (tap, r) at tap * tap_stride + r * row_stride
  int64_t tap_stride;
  int64_t row_stride;
  int taps;
  int64_t rows_in;
  int64_t rows_out;
  int64_t cols;
  int64_t x_stride;
  int lane_bits = 0;  // 2^lane_bits lanes share a row

  __device__ int32_t row(int tap, int64_t r) const {
    return r < rows_out ? rows[tap * tap_stride + r * row_stride] : -1;
  }
  __device__ bool has(int32_t row) const { return static_cast<uint32_t>(row) < rows_in; }
};

// Of a kernel map's table; cols and x_stride of the matrix that is read.
inline Gather gather_of(const KernelMap& map, int64_t cols, int64_t x_stride) {
  return {.rows = map.neighbours.as<int32_t>(),
          .tap_stride = map.n_out,
          .row_stride = 1,
          .taps = map.taps(),
          .rows_in = map.n_in,
          .rows_out = map.n_out,
          .cols = cols,
          .x_stride = x_stride};
}

constexpr int gather_threads = 256;

template <class Op>
__global__ __launch_bounds__(gather_threads) void gather_rows(Gather g,
                                                              const typename Op::Element* x,
                                                              typename Op::Arguments arguments) {
  using X = Pack<typename Op::Element, Op::width>;
  const int slots = gather_threads >> g.lane_bits;
  const int64_t lane = threadIdx.x & ((1 << g.lane_bits) - 1);
  const int64_t col = (static_cast<int64_t>(blockIdx.y) << g.lane_bits | lane) * Op::width;
  if (col >= g.cols) return;
  const int64_t first =
      static_cast<int64_t>(blockIdx.x) * slots * Op::rows + (threadIdx.x >> g.lane_bits);
  Op op(arguments, col);
  typename Op::State states[Op::rows];
  int32_t next[Op::rows];
#pragma unroll
  for (int i = 0; i < Op::rows; ++i) {
    op.begin(&states[i], first + i * slots);
    next[i] = g.row(0, first + i * slots);
  }
  for (int tap = 0; tap < g.taps; ++tap) {
    int32_t in[Op::rows];
    X values[Op::rows];
#pragma unroll
    for (int i = 0; i < Op::rows; ++i) {
      in[i] = next[i];
      if (g.has(in[i])) values[i] = *reinterpret_cast<const X*>(x + in[i] * g.x_stride + col);
    }
    op.begin_tap(tap);
    if (tap + 1 < g.taps) {
#pragma unroll
      for (int i = 0; i < Op::rows; ++i) next[i] = g.row(tap + 1, first + i * slots);
    }
#pragma unroll
    for (int i = 0; i < Op::rows; ++i) {
      if (g.has(in[i])) op.add(&states[i], values[i], first + i * slots, in[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < Op::rows; ++i) {
    const int64_t row = first + i * slots;
    if (row < g.rows_out) op.finish(states[i], row);
  }
}

// Launches an op for all rows and columns.
template <class Op>
void gather(const Context& ctx, Gather g, const void* x, const typename Op::Arguments& arguments) {
  if (g.taps == 0 || g.rows_out == 0) return;
  const int64_t packs = ceil_div(g.cols, Op::width);
  while (g.lane_bits < 5 && (int64_t{1} << g.lane_bits) < packs) ++g.lane_bits;
  const int64_t rows_per_block = static_cast<int64_t>(gather_threads >> g.lane_bits) * Op::rows;
  launch(ctx,
         {.blocks = ceil_div(g.rows_out, rows_per_block),
          .columns = ceil_div(packs, int64_t{1} << g.lane_bits),
          .threads = gather_threads},
         gather_rows<Op>, g, static_cast<const typename Op::Element*>(x), arguments);
}

// Whether all rows of a matrix can be moved 16 bytes at a time.
inline bool is_wide(const MatrixRef& m) {
  const auto size = static_cast<int64_t>(size_of(m.dtype));
  return reinterpret_cast<uintptr_t>(m.data) % 16 == 0 && m.cols * size % 16 == 0 &&
         (m.stride * size % 16 == 0 || m.rows <= 1);
}

// Sets a matrix to zero.
inline void fill_zero_rows(const Context& ctx, const MatrixRef& m) {
  if (m.rows == 0 || m.cols == 0) return;
  const size_t size = size_of(m.dtype);
  check_cuda(cudaMemset2DAsync(m.data, m.stride * size, 0, m.cols * size, m.rows, stream_of(ctx)),
             "cudaMemset2DAsync");
}

template <int value>
struct Width {
  static constexpr int n = value;
};

// body(Type<T>, Width<n>): packs of 16 bytes, or single elements.
template <class Body>
void dispatch_packs(Dtype dtype, bool wide, const Body& body) {
  dispatch_device_float(dtype, [&]<class T>(Type<T> type) {
    if (wide) return body(type, Width<16 / static_cast<int>(sizeof(T))>{});
    body(type, Width<1>{});
  });
}

}  // namespace voxgemm::cuda
