// SPDX-License-Identifier: Apache-2.0
//
// Depthwise convolution moves memory and computes little: 2 operations an element that is read.
//
// Forward and grad_input are a gather (gather.cuh) whose op multiplies by the tap's weights; these
// are loaded once for four rows.
//
// grad_weight: a block owns a slice of the rows, a group of taps and as many columns as its
// lanes hold; a thread owns `width` columns of these taps and every so many-th row of the slice,
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
  struct Arguments {
    const T* w;  // [taps, cols]
    int64_t w_stride;
    int last_tap;   // what is mirrored about, or -1: taps as they are
    const T* bias;  // [cols] or null
    T* y;
    int64_t y_stride;
  };
  struct State {
    Sum<T> sum[n];
  };

  Arguments a;
  int64_t col;
  Sum<T> w[n];
  __device__ Depthwise(const Arguments& arguments, int64_t column) : a(arguments), col(column) {}
  __device__ void begin(State* state, int64_t) const {
    for (int i = 0; i < n; ++i) {
      state->sum[i] = a.bias == nullptr ? Sum<T>(0) : Sum<T>(widen(a.bias[col + i]));
    }
  }
  __device__ void begin_tap(int tap) {
    const int64_t row = a.last_tap < 0 ? tap : a.last_tap - tap;
    const auto pack = *reinterpret_cast<const Pack<T, n>*>(a.w + row * a.w_stride + col);
    for (int i = 0; i < n; ++i) w[i] = widen(pack.v[i]);
  }
  __device__ void add(State* state, const Pack<T, n>& x, int64_t, int32_t) const {
    for (int i = 0; i < n; ++i) state->sum[i] += w[i] * widen(x.v[i]);
  }
  __device__ void finish(const State& state, int64_t row) const {
    Pack<T, n> y;
    for (int i = 0; i < n; ++i) store(state.sum[i], &y.v[i]);
    *reinterpret_cast<Pack<T, n>*>(a.y + row * a.y_stride + col) = y;
  }
};

// 9 taps by 8 columns are 72 sums a thread, and two blocks fit a multiprocessor. f64 would spill.
template <class T>
constexpr int tap_group = sizeof(T) == sizeof(double) ? 3 : 9;

struct Slices {
  Gather g;
  int64_t dy_stride;
  int64_t slice_rows;
  int groups;  // of taps
};

template <class T, int n>
__global__ __launch_bounds__(gather_threads,
                             2) void sum_slices(Slices s, const T* x, const T* dy, Sum<T>* sums) {
  using X = Pack<T, n>;
  constexpr int group = tap_group<T>;
  __shared__ Sum<T> exchange[gather_threads * n];
  const Gather& g = s.g;
  const int lanes = 1 << g.lane_bits;
  const int slots = gather_threads >> g.lane_bits;
  const int lane = static_cast<int>(threadIdx.x) & (lanes - 1);
  const int slot = static_cast<int>(threadIdx.x) >> g.lane_bits;
  const int64_t col = (static_cast<int64_t>(blockIdx.y) * lanes + lane) * n;
  const int64_t slice = blockIdx.x / s.groups;
  const int first_tap = static_cast<int>(blockIdx.x % s.groups) * group;
  const int taps = min(group, g.taps - first_tap);
  Sum<T> sum[group][n] = {};
  const int64_t last = min(g.rows_out, (slice + 1) * s.slice_rows);
  for (int64_t row = slice * s.slice_rows + slot; row < last && col < g.cols; row += slots) {
    int32_t in[group];
#pragma unroll
    for (int t = 0; t < group; ++t) in[t] = t < taps ? g.row(first_tap + t, row) : -1;
    const X gradient = *reinterpret_cast<const X*>(dy + row * s.dy_stride + col);
#pragma unroll
    for (int t = 0; t < group; ++t) {
      if (!g.has(in[t])) continue;
      const X value = *reinterpret_cast<const X*>(x + in[t] * g.x_stride + col);
      for (int i = 0; i < n; ++i) sum[t][i] += widen(value.v[i]) * widen(gradient.v[i]);
    }
  }
#pragma unroll
  for (int t = 0; t < group; ++t) {
    for (int i = 0; i < n; ++i) exchange[i * gather_threads + threadIdx.x] = sum[t][i];
    __syncthreads();
    // The columns of the block, one thread each.
    for (int c = static_cast<int>(threadIdx.x); c < lanes * n; c += gather_threads) {
      const int64_t column = static_cast<int64_t>(blockIdx.y) * lanes * n + c;
      if (t >= taps || column >= g.cols) continue;
      Sum<T> total = 0;
      for (int other = 0; other < slots; ++other) {
        total += exchange[c % n * gather_threads + other * lanes + c / n];
      }
      sums[(slice * g.taps + first_tap + t) * g.cols + column] = total;
    }
    __syncthreads();
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
  const Gather g = gather_of(map, y.cols, x.stride);
  const bool wide = is_wide(x) && is_wide(factors.w) && is_wide(y);
  dispatch_packs(x.dtype, wide, [&]<class T, class W>(Type<T>, W) {
    gather<Depthwise<T, W::n>>(ctx, g, x.data,
                               {factors.w.as<T>(), factors.w.stride, factors.last_tap,
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
    Slices s = {.g = gather_of(map, x.cols, x.stride),
                .dy_stride = dy.stride,
                .slice_rows = std::max(ceil_div(map.n_out, most_slices), fewest_rows),
                .groups = static_cast<int>(ceil_div(map.taps(), tap_group<T>))};
    const int64_t packs = ceil_div(x.cols, W::n);
    while (s.g.lane_bits < 5 && (int64_t{1} << s.g.lane_bits) < packs) ++s.g.lane_bits;
    const int64_t slices = ceil_div(map.n_out, s.slice_rows);
    const std::shared_ptr<void> memory =
        ctx.allocate(sizeof(Sum<T>) * slices * map.taps() * x.cols);
    auto* sums = static_cast<Sum<T>*>(memory.get());
    launch(ctx,
           {.blocks = slices * s.groups,
            .columns = ceil_div(packs, int64_t{1} << s.g.lane_bits),
            .threads = gather_threads},
           sum_slices<T, W::n>, s, x.as<T>(), dy.as<T>(), sums);
    const auto add = [&]<class D>(Type<D>) {
      launch(ctx, over(ctx, map.taps() * x.cols), add_slices<Sum<T>, D>, sums, slices, s.g,
             dw.as<D>(), dw.stride);
    };
    dw.dtype == x.dtype ? add(Type<T>{}) : add(Type<float>{});
  });
}

}  // namespace voxgemm::cuda
