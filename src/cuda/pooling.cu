// SPDX-License-Identifier: Apache-2.0
#include "conv/operators.h"
#include "cuda/row_lists.cuh"
#include "cuda/voxel_index.cuh"

namespace voxgemm::cuda {
namespace {

template <class T>
struct PoolArguments {
  const T* x;
  int64_t x_stride;
  T* y;
  int64_t y_stride;
  int32_t* winners;  // [rows, cols], or null
  int64_t cols;
  bool mean;
};

template <class T, int n>
struct SumState {
  Sums<T, n> sums;
  int count = 0;

  __device__ void add(const Pack<T, n>& x, int32_t) {
    sums.add(x, 1);
    ++count;
  }
  __device__ void join(const SumState& later) {
    sums.join(later.sums);
    count += later.count;
  }
  __device__ void write(const PoolArguments<T>& a, int64_t row, int64_t col) const {
    sums.write(a.y + row * a.y_stride + col, static_cast<Sum<T>>(a.mean ? max(count, 1) : 1));
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
  __device__ void add(const Pack<T, n>& x, int32_t row) {
    for (int i = 0; i < n; ++i) take(i, x.get(i), row);
  }
  __device__ void join(const BestState& later) {
    for (int i = 0; i < n; ++i) {
      if (later.winner[i] >= 0) take(i, later.best[i], later.winner[i]);
    }
  }
  __device__ void write(const PoolArguments<T>& a, int64_t row, int64_t col) const {
    Pack<T, n> values;
    Pack<int32_t, n> rows;
    for (int i = 0; i < n; ++i) {
      values.set(i, best[i]);
      rows.v[i] = winner[i];
    }
    store_pack(values, a.y + row * a.y_stride + col);
    if (a.winners != nullptr) store_pack(rows, a.winners + row * a.cols + col);
  }
};

// Of a row's taps, or of the rows of a segment.
template <class T, int n, class S>
struct Pool : NoTaps {
  using Element = T;
  using Arguments = PoolArguments<T>;
  using State = S;
  static constexpr int width = n;
  static constexpr int rows = 2;
  static constexpr int blocks = 6;

  Arguments a;
  int64_t col;
  __device__ Pool(const Arguments& arguments, int64_t column) : a(arguments), col(column) {}
  __device__ void add(State* state, const Pack<T, n>& x, Tap, int64_t, int32_t in) const {
    state->add(x, in);
  }
  __device__ void add(State* state, uint32_t row) const {
    state->add(load_pack<T, n>(a.x + row * a.x_stride + col), static_cast<int32_t>(row));
  }
  __device__ void finish(const State& state, int64_t row) const { state.write(a, row, col); }
};

// The gradient: of a row's results each gives it all, its share, or what it has won.
template <class T, int n>
struct PoolGradient : NoTaps {
  using Element = T;
  struct Arguments {
    T* dx;
    int64_t dx_stride;
    int64_t cols;
    const int32_t* winners;  // [n_out, cols], or null
    const int32_t* counts;   // [n_out], or null
  };
  using State = Sums<T, n>;
  static constexpr int width = n;
  static constexpr int rows = 2;
  static constexpr int blocks = 6;

  Arguments a;
  int64_t col;
  __device__ PoolGradient(const Arguments& arguments, int64_t column) : a(arguments), col(column) {}
  __device__ void add(State* state, const Pack<T, n>& dy, Tap, int64_t row, int32_t out) const {
    if (a.winners != nullptr) {
      const auto won = load_pack<int32_t, n>(a.winners + out * a.cols + col);
      for (int i = 0; i < n; ++i) {
        if (won.v[i] == row) state->v[i] += dy.get(i);
      }
      return;
    }
    const Sum<T> count = a.counts == nullptr ? 1 : static_cast<Sum<T>>(a.counts[out]);
    for (int i = 0; i < n; ++i) state->v[i] += dy.get(i) / count;
  }
  __device__ void finish(const State& state, int64_t row) const {
    state.write(a.dx + row * a.dx_stride + col);
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

// body(Type<Pool<...>>, arguments) for what is pooled.
template <class Body>
void dispatch_pool(const MatrixRef& x,
                   Reduction reduction,
                   const Reduced& result,
                   const Body& body) {
  const bool wide =
      is_wide(x) && is_wide(result.y) && (!result.winners || is_wide(*result.winners));
  dispatch_packs(x.dtype, wide, [&]<class T, class W>(Type<T>, W) {
    constexpr int n = W::n;
    const PoolArguments<T> arguments = {x.as<T>(),
                                        x.stride,
                                        result.y.as<T>(),
                                        result.y.stride,
                                        result.winners ? result.winners->as<int32_t>() : nullptr,
                                        x.cols,
                                        reduction == Reduction::mean};
    if (reduction == Reduction::max) {
      body(Type<Pool<T, n, BestState<T, n, false>>>{}, arguments);
    } else if (reduction == Reduction::min) {
      body(Type<Pool<T, n, BestState<T, n, true>>>{}, arguments);
    } else {
      body(Type<Pool<T, n, SumState<T, n>>>{}, arguments);
    }
  });
}

}  // namespace

void pool(const Context& ctx,
          const KernelMap& map,
          const MatrixRef& x,
          Reduction reduction,
          const Reduced& result) {
  const DeviceGuard guard(ctx.device);
  dispatch_pool(x, reduction, result, [&]<class Op>(Type<Op>, const auto& arguments) {
    gather<Op>(ctx, gather_of(map, x), x, arguments);
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
  dispatch_pool(x, reduction, result, [&]<class Op>(Type<Op>, const auto& arguments) {
    reduce_lists<Op>(ctx, lists, x.cols, arguments);
  });
}

}  // namespace voxgemm::cuda
