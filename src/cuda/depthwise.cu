// SPDX-License-Identifier: Apache-2.0
//
// Depthwise convolution moves memory and computes little: 2 operations an element that is read.
//
// Forward and grad_input are a gather (gather.cuh) whose op multiplies by the tap's weights, which
// are in L1.
//
// grad_weight: a block owns a slice of the rows, a group of taps and as many columns as its lanes
// hold; a thread owns `width` columns of these taps and every so many-th row of the slice,
// with one f32 sum per tap and column in registers. At the end the threads of the same columns add
// up in shared memory, in order, and the block writes its sums; a second kernel adds the slices in
// order. The slices depend on the number of rows only. Blocks of one slice follow each other, so
// that the rows they share are in L2.
#include "conv/operators.h"
#include "cuda/depthwise_sm80.cuh"
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
  using State = Sums<T, n>;
  using Tap = Pack<T, n>;

  Arguments a;
  int64_t col;
  const T* w;
  __device__ Depthwise(const Arguments& arguments, int64_t column)
      : a(arguments), col(column), w(kept(arguments.w + column)) {}
  __device__ Tap tap(int number) const {
    return *row_of<Tap>(w, a.last_tap < 0 ? number : a.last_tap - number, a.w_bytes);
  }
  __device__ void add(State* state, const Pack<T, n>& x, const Tap& tap, const Step&) const {
    state->add(x, tap);
  }
  __device__ void finish(State state, int64_t row) const {
    // The bias may begin anywhere.
    for (int i = 0; i < n && a.bias != nullptr; ++i) state.v[i] += widen(a.bias[col + i]);
    state.write(a.y + row * a.y_stride + col);
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
                             4) void sum_rows(Slices s, const T* x, const T* dy, Sum<T>* sums) {
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

// Adds the slices of an element, [slices, count]: `adders` threads take consecutive slices, and
// their sums are added in order.
constexpr int adders = 8;
template <class S, class D>
__global__ __launch_bounds__(256) void add_slices(
    const S* sums, int64_t slices, int64_t count, int64_t cols, D* dw, int64_t dw_stride) {
  __shared__ S parts[adders][32];
  const int part = static_cast<int>(threadIdx.x) / 32;
  const int place = static_cast<int>(threadIdx.x) % 32;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * 32 + place;
  S total = 0;
#pragma unroll 8
  for (int64_t slice = part * slices / adders; slice < (part + 1) * slices / adders; ++slice) {
    total += i < count ? sums[slice * count + i] : 0;
  }
  parts[part][place] = total;
  __syncthreads();
  if (part != 0 || i >= count) return;
  for (int other = 1; other < adders; ++other) total += parts[other][place];
  store(total, &dw[i / cols * dw_stride + i % cols]);
}

template <class T>
void convolve(const Context& ctx, depthwise_sm80::Convolution c) {
  using namespace depthwise_sm80;
  const std::shared_ptr<void> memory = convolve_near<T>(ctx, &c);
  const auto run = [&](auto* kernel, int64_t cols) {
    Grid grid = {.blocks = ceil_div(c.g.rows_out, block_tiles * tile_rows),
                 .columns = ceil_div(c.g.cols, cols),
                 .threads = convolve_warps * 32};
    // Blocks that look for their work: those that run at a time.
    const int64_t few = ceil_div(int64_t{blocks_at_once} * multiprocessors(ctx), grid.columns);
    if (c.left != nullptr) grid.blocks = std::min(grid.blocks, few);
    launch(ctx, grid, kernel, c);
  };
  c.g.cols <= chunk_cols ? run(depthwise_sm80::convolve<T, 1>, chunk_cols)
                         : run(depthwise_sm80::convolve<T, 2>, 2 * chunk_cols);
}

// last_tap: what the weights are mirrored about, or -1.
void multiply(const Context& ctx,
              const KernelMap& map,
              const DepthwiseForward& operands,
              int last_tap,
              const MatrixRef& y) {
  const MatrixRef& x = operands.x;
  const MatrixRef& w = operands.w;
  const void* bias = operands.bias ? operands.bias->data : nullptr;
  const Gather g = gather_of(map, x);
  const bool wide = is_wide(x) && is_wide(w) && is_wide(y);
  dispatch_packs(x.dtype, wide, [&]<class T, class W>(Type<T>, W) {
    if constexpr (sizeof(T) == 2 && W::n == 8) {
      if (architecture(ctx.device) >= 80) {
        return convolve<T>(ctx, {.g = g,
                                 .x = x.data,
                                 .w = w.data,
                                 .w_bytes = row_bytes(w),
                                 .last_tap = last_tap,
                                 .bias = bias,
                                 .y = y.data,
                                 .y_bytes = row_bytes(y)});
      }
    }
    gather<Depthwise<T, W::n>>(
        ctx, g, x,
        {w.as<T>(), row_bytes(w), last_tap, static_cast<const T*>(bias), y.as<T>(), y.stride});
  });
}

}  // namespace

void depthwise_forward(const Context& ctx,
                       const KernelMap& map,
                       const DepthwiseForward& operands,
                       const MatrixRef& y) {
  multiply(ctx, map, operands, -1, y);
}

void depthwise_grad_input(const Context& ctx,
                          const KernelMap& map,
                          const DepthwiseGradInput& operands,
                          const MatrixRef& dx) {
  const int last_tap = map.symmetric ? map.taps() - 1 : -1;
  multiply(ctx, *operands.transposed, {operands.dy, operands.w}, last_tap, dx);
}

void depthwise_grad_weight(const Context& ctx,
                           const KernelMap& map,
                           const MatrixRef& x,
                           const MatrixRef& dy,
                           const MatrixRef& dw) {
  if (map.n_in == 0 || map.n_out == 0) return fill_zero(ctx, one_tap(dw));
  dispatch_packs(x.dtype, is_wide(x) && is_wide(dy), [&]<class T, class W>(Type<T>, W) {
    // Slices for several blocks on every multiprocessor there is, of rows enough to be worth their
    // sums.
    const int64_t rows = std::max(ceil_div(map.n_out, int64_t{512}), int64_t{256});
    const int64_t slices = ceil_div(map.n_out, rows);
    const int64_t count = map.taps() * x.cols;
    const std::shared_ptr<void> memory = ctx.allocate(sizeof(Sum<T>) * slices * count);
    auto* sums = static_cast<Sum<T>*>(memory.get());
    Gather g = gather_of(map, x);
    const int64_t packs = ceil_div(g.cols, W::n);
    cut(&g, packs, tile_steps);
    g.pitch = tap_pitch;
    const Slices s = {g, dy.stride, rows, static_cast<int>(ceil_div(g.taps, tap_group))};
    launch(ctx,
           {.blocks = slices * s.groups,
            .columns = ceil_div(packs, int64_t{1} << g.lane_bits),
            .threads = gather_threads,
            .shared_bytes = std::max(sizeof(int32_t) * g.block_rows() * g.pitch,
                                     sizeof(Sum<T>) * gather_threads * W::n)},
           sum_rows<T, W::n>, s, x.as<T>(), dy.as<T>(), sums);
    const auto add = [&]<class D>(Type<D>) {
      launch(ctx, {.blocks = ceil_div(count, 32)}, add_slices<Sum<T>, D>, sums, slices, count,
             x.cols, dw.as<D>(), dw.stride);
    };
    dw.dtype == x.dtype ? add(Type<T>{}) : add(Type<float>{});
  });
}

}  // namespace voxgemm::cuda
