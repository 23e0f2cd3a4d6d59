// SPDX-License-Identifier: Apache-2.0
//
// Depthwise convolution moves memory and computes little: 2 operations an element that is read.
//
// Forward and grad_input are a gather (gather.cuh) whose op multiplies by the tap's weights; these
// are loaded once for four rows.
//
// grad_weight: a block owns a slice of the rows, a group of taps and as many columns as its lanes
// hold; a thread owns `width` columns of these taps and every so many-th row of the slice,
// with one f32 sum per tap and column in registers. At the end the threads of the same columns add
// up in shared memory, in order, and the block writes its sums; a second kernel adds the slices in
// order. The slices depend on the number of rows only. Blocks of one slice follow each other, so
// that the rows they share are in L2.
#include "conv/operators.h"
#include "cuda/gather.cuh"
#include "cuda/voxel_index.cuh"

namespace voxgemm::cuda {
namespace {

template <class T, int n>
struct Depthwise {
  using Element = T;
  static constexpr int width = n;
  static constexpr int rows = 4;
  static constexpr int blocks = 4;
  struct Arguments {
    const T* w;        // [taps, cols]
    uint32_t w_bytes;  // between taps
    int last_tap;      // what is mirrored about, or -1: taps as they are
    const T* bias;     // [cols] or null
    T* y;
    int64_t y_stride;
  };
  struct State {
    Sum<T> sum[n];
  };

  struct Tap {
    Sum<T> w[n];
  };

  Arguments a;
  int64_t col;
  const T* w;
  __device__ Depthwise(const Arguments& arguments, int64_t column)
      : a(arguments), col(column), w(kept(arguments.w + column)) {}
  __device__ void begin(State* state) const {
    for (int i = 0; i < n; ++i) {
      state->sum[i] = a.bias == nullptr ? Sum<T>(0) : Sum<T>(widen(a.bias[col + i]));
    }
  }
  __device__ Tap tap(int number) const {
    const int row = a.last_tap < 0 ? number : a.last_tap - number;
    const auto pack = *row_of<Pack<T, n>>(w, row, a.w_bytes);
    Tap tap;
    for (int i = 0; i < n; ++i) tap.w[i] = pack.get(i);
    return tap;
  }
  __device__ void add(State* state, const Pack<T, n>& x, const Tap& tap, int64_t, int32_t) const {
    for (int i = 0; i < n; ++i) state->sum[i] += tap.w[i] * x.get(i);
  }
  __device__ void finish(const State& state, int64_t row) const {
    Pack<T, n> y;
    for (int i = 0; i < n; ++i) y.set(i, state.sum[i]);
    *reinterpret_cast<Pack<T, n>*>(a.y + row * a.y_stride + col) = y;
  }
};

// 7 taps by 8 columns are 56 sums a thread; with the 7 packs that are read at once four blocks fit
// a multiprocessor.
constexpr int tap_group = 6;
// Row numbers of a row, in shared memory: two loads of 16 bytes.
constexpr int tap_pitch = 8;
// Row numbers of 2^3 rows a slot are in shared memory at a time.
constexpr int tile_steps = 3;

struct Slices {
  Gather g;
  int64_t dy_stride;
  int64_t slice_rows;
  int groups;  // of taps
};

// A thread's sums of a row: every tap's row of x times the row of dy.
template <class T, int n>
__device__ void add_row(const Gather& g,
                        const int32_t* numbers,
                        const T* column,
                        const Pack<T, n>& dy,
                        Sum<T> (&sum)[tap_group][n]) {
  using X = Pack<T, n>;
  int32_t in[tap_pitch];
  reinterpret_cast<int4*>(in)[0] = reinterpret_cast<const int4*>(numbers)[0];
  reinterpret_cast<int4*>(in)[1] = reinterpret_cast<const int4*>(numbers)[1];
  X values[tap_group];
#pragma unroll
  for (int t = 0; t < tap_group; ++t) {
    if (in[t] < 0) continue;
    values[t] = *row_of<X>(column, in[t], g.x_bytes);
  }
#pragma unroll
  for (int t = 0; t < tap_group; ++t) {
    if (in[t] < 0) continue;
    for (int i = 0; i < n; ++i) sum[t][i] += values[t].get(i) * dy.get(i);
  }
}

template <class T, int n>
__global__ __launch_bounds__(gather_threads,
                             4) void sum_slices(Slices s, const T* x, const T* dy, Sum<T>* sums) {
  // [block_rows, pitch], then what the threads exchange at the end
  extern __shared__ __align__(16) int32_t numbers[];
  const Gather& g = s.g;
  const int lanes = 1 << g.lane_bits;
  const int slots = gather_threads >> g.lane_bits;
  const int lane = static_cast<int>(threadIdx.x) & (lanes - 1);
  const int slot = static_cast<int>(threadIdx.x) >> g.lane_bits;
  const int64_t col = (static_cast<int64_t>(blockIdx.y) * lanes + lane) * n;
  const int64_t slice = blockIdx.x / s.groups;
  const int first_tap = static_cast<int>(blockIdx.x % s.groups) * tap_group;
  Sum<T> sum[tap_group][n] = {};
  const int64_t last = min(g.rows_out, (slice + 1) * s.slice_rows);
  const T* column = kept(x + (col < g.cols ? col : 0));
  for (int64_t tile = slice * s.slice_rows; tile < last; tile += int64_t{1} << g.row_bits) {
    __syncthreads();
    fetch_numbers(g, first_tap, tap_group, tile, numbers);
    __syncthreads();
    const int rows = static_cast<int>(min(int64_t{1} << g.row_bits, last - tile));
    for (int row = slot; row < rows && col < g.cols; row += slots) {
      const auto gradient =
          *reinterpret_cast<const Pack<T, n>*>(dy + (tile + row) * s.dy_stride + col);
      add_row<T, n>(g, numbers + row * g.pitch, column, gradient, sum);
    }
  }
  auto* exchange = reinterpret_cast<Sum<T>*>(numbers);  // [n, threads]
#pragma unroll
  for (int t = 0; t < tap_group; ++t) {
    __syncthreads();
    for (int i = 0; i < n; ++i) exchange[i * gather_threads + threadIdx.x] = sum[t][i];
    __syncthreads();
    // The columns of the block, one thread each.
    for (int c = static_cast<int>(threadIdx.x); c < lanes * n; c += gather_threads) {
      const int64_t column = static_cast<int64_t>(blockIdx.y) * lanes * n + c;
      if (first_tap + t >= g.taps || column >= g.cols) continue;
      Sum<T> total = 0;
      for (int other = 0; other < slots; ++other) {
        total += exchange[c % n * gather_threads + other * lanes + c / n];
      }
      sums[(slice * g.taps + first_tap + t) * g.cols + column] = total;
    }
  }
}

template <class S, class D>
__global__ void add_slices(const S* sums, int64_t slices, Gather g, D* dw, int64_t dw_stride) {
  const int64_t count = g.taps * g.cols;
  for (int64_t i = thread_index(); i < count; i += thread_count()) {
    S total = 0;
#pragma unroll 4
    for (int64_t slice = 0; slice < slices; ++slice) total += sums[slice * count + i];
    store(total, &dw[i / g.cols * dw_stride + i % g.cols]);
  }
}

// What a gather multiplies with.
struct Factors {
  const MatrixRef& w;
  const void* bias;
  int last_tap;
};

void multiply(const Context& ctx,
              const KernelMap& map,
              const MatrixRef& x,
              const Factors& factors,
              const MatrixRef& y) {
  const Gather g = gather_of(map, x);
  const bool wide = is_wide(x) && is_wide(factors.w) && is_wide(y);
  dispatch_packs(x.dtype, wide, [&]<class T, class W>(Type<T>, W) {
    gather<Depthwise<T, W::n>>(ctx, g, x,
                               {factors.w.as<T>(), row_bytes(factors.w), factors.last_tap,
                                static_cast<const T*>(factors.bias), y.as<T>(), y.stride});
  });
}

}  // namespace

void depthwise_forward(const Context& ctx,
                       const KernelMap& map,
                       const DepthwiseForward& operands,
                       const MatrixRef& y) {
  const DeviceGuard guard(ctx.device);
  const void* bias = operands.bias ? operands.bias->data : nullptr;
  multiply(ctx, map, operands.x, {operands.w, bias, -1}, y);
}

void depthwise_grad_input(const Context& ctx,
                          const KernelMap& map,
                          const DepthwiseGradInput& operands,
                          const MatrixRef& dx) {
  const DeviceGuard guard(ctx.device);
  const int last_tap = map.symmetric ? map.taps() - 1 : -1;
  multiply(ctx, *operands.transposed, operands.dy, {operands.w, nullptr, last_tap}, dx);
}

void depthwise_grad_weight(const Context& ctx,
                           const KernelMap& map,
                           const MatrixRef& x,
                           const MatrixRef& dy,
                           const MatrixRef& dw) {
  const DeviceGuard guard(ctx.device);
  if (map.n_in == 0 || map.n_out == 0) return fill_zero_rows(ctx, dw);
  dispatch_packs(x.dtype, is_wide(x) && is_wide(dy), [&]<class T, class W>(Type<T>, W) {
    // Slices for several blocks on every multiprocessor there is, of rows enough to be worth their
    // sums.
    constexpr int64_t most_slices = 512;
    constexpr int64_t fewest_rows = 256;
    Slices s = {.g = gather_of(map, x),
                .dy_stride = dy.stride,
                .slice_rows = std::max(ceil_div(map.n_out, most_slices), fewest_rows),
                .groups = static_cast<int>(ceil_div(map.taps(), tap_group))};
    const int64_t packs = ceil_div(x.cols, W::n);
    cut(&s.g, packs, tile_steps);
    s.g.pitch = tap_pitch;
    const int64_t slices = ceil_div(map.n_out, s.slice_rows);
    const std::shared_ptr<void> memory =
        ctx.allocate(sizeof(Sum<T>) * slices * map.taps() * x.cols);
    auto* sums = static_cast<Sum<T>*>(memory.get());
    launch(ctx,
           {.blocks = slices * s.groups,
            .columns = ceil_div(packs, int64_t{1} << s.g.lane_bits),
            .threads = gather_threads,
            .shared_bytes = std::max(sizeof(int32_t) * s.g.block_rows() * s.g.pitch,
                                     sizeof(Sum<T>) * gather_threads * W::n)},
           sum_slices<T, W::n>, s, x.as<T>(), dy.as<T>(), sums);
    const auto add = [&]<class D>(Type<D>) {
      launch(ctx, over(ctx, map.taps() * x.cols), add_slices<Sum<T>, D>, sums, slices, s.g,
             dw.as<D>(), dw.stride);
    };
    dw.dtype == x.dtype ? add(Type<T>{}) : add(Type<float>{});
  });
}

}  // namespace voxgemm::cuda
