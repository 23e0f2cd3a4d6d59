// SPDX-License-Identifier: Apache-2.0
#include "conv/operators.h"
#include "cuda/row_lists.cuh"
#include "cuda/voxel_index.cuh"

namespace voxgemm::cuda {
namespace {

template <class T, int n>
__device__ void write_pack(const Pack<T, n>& pack, T* matrix, int64_t at) {
  *reinterpret_cast<Pack<T, n>*>(matrix + at) = pack;
}

// What these have per tap.
struct NoTap {};

// What a sum is divided by: nothing, or the number of rows in it.
template <class T, int n>
struct SumState {
  Sum<T> sum[n] = {};
  int count = 0;

  __device__ void add(const Pack<T, n>& x) {
    for (int i = 0; i < n; ++i) sum[i] += x.get(i);
    ++count;
  }
  __device__ Pack<T, n> result(Sum<T> divisor) const {
    Pack<T, n> y;
    for (int i = 0; i < n; ++i) y.set(i, sum[i] / divisor);
    return y;
  }
};

// The best element so far and its row.
template <class T, int n, bool minimum>
struct BestState {
  Sum<T> best[n] = {};
  int32_t winner[n];

  __device__ BestState() {
    for (int32_t& row : winner) row = -1;
  }
  __device__ void take(int i, Sum<T> value, int32_t row) {
    const bool better = minimum ? value < best[i] : value > best[i];
    if (winner[i] < 0 || better || (value != value && best[i] == best[i])) {
      best[i] = value;
      winner[i] = row;
    }
  }
};

template <class T, int n>
struct PoolArguments {
  T* y;
  int64_t y_stride;
  int32_t* winners;  // [rows, cols], or null
  int64_t cols;
  bool mean;
  const T* x;  // of lists
  int64_t x_stride;

  template <bool minimum>
  __device__ void write(const BestState<T, n, minimum>& state, int64_t row, int64_t col) const {
    Pack<T, n> values;
    Pack<int32_t, n> rows;
    for (int i = 0; i < n; ++i) {
      values.set(i, state.best[i]);
      rows.v[i] = state.winner[i];
    }
    write_pack(values, y, row * y_stride + col);
    if (winners != nullptr) write_pack(rows, winners, row * cols + col);
  }
};

// Of the taps of a map.
template <class T, int n>
struct PoolSum {
  using Element = T;
  using Arguments = PoolArguments<T, n>;
  using State = SumState<T, n>;
  using Tap = NoTap;
  static constexpr int width = n;
  static constexpr int rows = 2;
  static constexpr int blocks = 6;

  Arguments a;
  int64_t col;
  __device__ PoolSum(const Arguments& arguments, int64_t column) : a(arguments), col(column) {}
  __device__ void begin(State*) const {}
  __device__ Tap tap(int) const { return {}; }
  __device__ void add(State* state, const Pack<T, n>& x, Tap, int64_t, int32_t) const {
    state->add(x);
  }
  __device__ void finish(const State& state, int64_t row) const {
    const int divisor = a.mean ? max(state.count, 1) : 1;
    write_pack(state.result(static_cast<Sum<T>>(divisor)), a.y, row * a.y_stride + col);
  }
};

template <class T, int n, bool minimum>
struct PoolBest {
  using Element = T;
  using Arguments = PoolArguments<T, n>;
  using State = BestState<T, n, minimum>;
  using Tap = NoTap;
  static constexpr int width = n;
  static constexpr int rows = 2;
  static constexpr int blocks = 6;

  Arguments a;
  int64_t col;
  __device__ PoolBest(const Arguments& arguments, int64_t column) : a(arguments), col(column) {}
  __device__ void begin(State*) const {}
  __device__ Tap tap(int) const { return {}; }
  __device__ void add(State* state, const Pack<T, n>& x, Tap, int64_t, int32_t in) const {
    for (int i = 0; i < n; ++i) state->take(i, x.get(i), in);
  }
  __device__ void finish(const State& state, int64_t row) const { a.write(state, row, col); }
};

// The gradient: of a row's results each gives it all, its share, or what it has won.
template <class T, int n>
struct PoolGradient {
  using Element = T;
  struct Arguments {
    T* dx;
    int64_t dx_stride;
    int64_t cols;
    const int32_t* winners;  // [n_out, cols], or null
    const int32_t* counts;   // [n_out], or null
  };
  using State = SumState<T, n>;
  using Tap = NoTap;
  static constexpr int width = n;
  static constexpr int rows = 2;
  static constexpr int blocks = 6;

  Arguments a;
  int64_t col;
  __device__ PoolGradient(const Arguments& arguments, int64_t column) : a(arguments), col(column) {}
  __device__ void begin(State*) const {}
  __device__ Tap tap(int) const { return {}; }
  __device__ void add(State* state, const Pack<T, n>& dy, Tap, int64_t row, int32_t out) const {
    if (a.winners != nullptr) {
      const auto won = *reinterpret_cast<const Pack<int32_t, n>*>(a.winners + out * a.cols + col);
      for (int i = 0; i < n; ++i) {
        if (won.v[i] == row) state->sum[i] += dy.get(i);
      }
      return;
    }
    const Sum<T> count = a.counts == nullptr ? 1 : static_cast<Sum<T>>(a.counts[out]);
    for (int i = 0; i < n; ++i) state->sum[i] += dy.get(i) / count;
  }
  __device__ void finish(const State& state, int64_t row) const {
    write_pack(state.result(1), a.dx, row * a.dx_stride + col);
  }
};

// Of the rows of a segment.
template <class T, int n>
struct SegmentSum {
  using Arguments = PoolArguments<T, n>;
  using State = SumState<T, n>;
  static constexpr int width = n;

  Arguments a;
  int64_t col;
  __device__ SegmentSum(const Arguments& arguments, int64_t column) : a(arguments), col(column) {}
  __device__ void add(State* state, uint32_t row) const {
    state->add(*reinterpret_cast<const Pack<T, n>*>(a.x + row * a.x_stride + col));
  }
  __device__ void join(State* state, const State& later) const {
    for (int i = 0; i < n; ++i) state->sum[i] += later.sum[i];
  }
  __device__ void finish(const State& state, uint32_t row, int64_t count) const {
    const auto divisor = static_cast<Sum<T>>(a.mean && count > 0 ? count : 1);
    write_pack(state.result(divisor), a.y, row * a.y_stride + col);
  }
};

template <class T, int n, bool minimum>
struct SegmentBest {
  using Arguments = PoolArguments<T, n>;
  using State = BestState<T, n, minimum>;
  static constexpr int width = n;

  Arguments a;
  int64_t col;
  __device__ SegmentBest(const Arguments& arguments, int64_t column) : a(arguments), col(column) {}
  __device__ void add(State* state, uint32_t row) const {
    const auto x = *reinterpret_cast<const Pack<T, n>*>(a.x + row * a.x_stride + col);
    for (int i = 0; i < n; ++i) state->take(i, x.get(i), static_cast<int32_t>(row));
  }
  __device__ void join(State* state, const State& later) const {
    for (int i = 0; i < n; ++i) {
      if (later.winner[i] >= 0) state->take(i, later.best[i], later.winner[i]);
    }
  }
  __device__ void finish(const State& state, uint32_t row, int64_t) const {
    a.write(state, row, col);
  }
};

__global__ void count_taps(Gather g, int32_t* counts) {
  for (int64_t r = thread_index(); r < g.rows_out; r += thread_count()) {
    int32_t count = 0;
    for (int tap = 0; tap < g.taps; ++tap) {
      count += static_cast<uint32_t>(g.rows[tap * g.tap_stride + r]) < g.rows_in ? 1 : 0;
    }
    counts[r] = count;
  }
}

template <class T, int n>
PoolArguments<T, n> arguments_of(const MatrixRef& x, Reduction reduction, const Reduced& result) {
  return {result.y.as<T>(),
          result.y.stride,
          result.winners ? result.winners->as<int32_t>() : nullptr,
          x.cols,
          reduction == Reduction::mean,
          x.as<T>(),
          x.stride};
}

bool are_wide(const MatrixRef& x, const Reduced& result) {
  return is_wide(x) && is_wide(result.y) && (!result.winners || is_wide(*result.winners));
}

}  // namespace

void pool(const Context& ctx,
          const KernelMap& map,
          const MatrixRef& x,
          Reduction reduction,
          const Reduced& result) {
  const DeviceGuard guard(ctx.device);
  const Gather g = gather_of(map, x);
  dispatch_packs(x.dtype, are_wide(x, result), [&]<class T, class W>(Type<T>, W) {
    const auto arguments = arguments_of<T, W::n>(x, reduction, result);
    if (reduction == Reduction::max) {
      gather<PoolBest<T, W::n, false>>(ctx, g, x, arguments);
    } else if (reduction == Reduction::min) {
      gather<PoolBest<T, W::n, true>>(ctx, g, x, arguments);
    } else {
      gather<PoolSum<T, W::n>>(ctx, g, x, arguments);
    }
  });
}

void pool_grad(const Context& ctx,
               const KernelMap& map,
               Reduction reduction,
               const PoolGrad& grad,
               const MatrixRef& dx) {
  const DeviceGuard guard(ctx.device);
  std::shared_ptr<void> counts;
  if (reduction == Reduction::mean) {
    counts = ctx.allocate(sizeof(int32_t) * map.n_out);
    launch(ctx, over(ctx, map.n_out), count_taps, gather_of(map, grad.dy),
           static_cast<int32_t*>(counts.get()));
  }
  const int32_t* winners = grad.winners ? grad.winners->as<int32_t>() : nullptr;
  const bool wide = is_wide(grad.dy) && is_wide(dx) && (!grad.winners || is_wide(*grad.winners));
  const Gather g = gather_of(*grad.transposed, grad.dy);
  dispatch_packs(dx.dtype, wide, [&]<class T, class W>(Type<T>, W) {
    gather<PoolGradient<T, W::n>>(
        ctx, g, grad.dy,
        {dx.as<T>(), dx.stride, dx.cols, winners, static_cast<const int32_t*>(counts.get())});
  });
}

void segment_reduce(const Context& ctx,
                    const MatrixRef& x,
                    const MatrixRef& segments,
                    Reduction reduction,
                    const Reduced& result) {
  const DeviceGuard guard(ctx.device);
  const RowLists lists = make_row_lists(ctx, segments.as<int32_t>(), segments.rows, result.y.rows);
  dispatch_packs(x.dtype, are_wide(x, result), [&]<class T, class W>(Type<T>, W) {
    const auto arguments = arguments_of<T, W::n>(x, reduction, result);
    if (reduction == Reduction::max) {
      reduce_lists<SegmentBest<T, W::n, false>>(ctx, lists, x.cols, arguments);
    } else if (reduction == Reduction::min) {
      reduce_lists<SegmentBest<T, W::n, true>>(ctx, lists, x.cols, arguments);
    } else {
      reduce_lists<SegmentSum<T, W::n>>(ctx, lists, x.cols, arguments);
    }
  });
}

}  // namespace voxgemm::cuda
