// SPDX-License-Identifier: Apache-2.0
#include "conv/operators.h"
#include "cuda/row_lists.cuh"

namespace voxgemm::cuda {
namespace {

template <class T>
struct PoolArguments {
  View<T> x;
  View<T> y;
  View<int32_t> winners;  // [rows, cols], or of nothing
  Reduction reduction;
  const int32_t* counts = nullptr;  // [rows of x] of the gradient of means

  PoolArguments(const MatrixRef& from, const Reduced& result, Reduction how)
      : x(from), y(result.y), winners(result.winners.value_or(MatrixRef{})), reduction(how) {}
  __device__ Step step(uint32_t place) const { return {0, place, place}; }
};
template <class T, int n, class State>
using PoolOp = StateOp<T, n, PoolArguments<T>, State>;

template <class T, int n>
struct SumState : Sums<T, n> {
  int count = 0;

  __device__ void add(const PoolArguments<T>&, const Pack<T, n>& x, const Step&, int64_t) {
    Sums<T, n>::add(x, 1);
    ++count;
  }
  __device__ void join(const SumState& later) {
    Sums<T, n>::join(later);
    count += later.count;
  }
  __device__ void write(const PoolArguments<T>& a, int64_t row, int64_t col) const {
    const int divisor = a.reduction == Reduction::mean ? max(count, 1) : 1;
    Sums<T, n>::write(a.y.at(row, col), static_cast<Sum<T>>(divisor));
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
  __device__ void add(const PoolArguments<T>&, const Pack<T, n>& x, const Step& step, int64_t) {
    for (int i = 0; i < n; ++i) take(i, x.get(i), static_cast<int32_t>(step.in));
  }
  __device__ void join(const BestState& later) {
    for (int i = 0; i < n; ++i) {
      // Of none it takes what it has: a branch for each would cost sm_80 more barriers than it has.
      const bool none = later.winner[i] < 0;
      take(i, none ? best[i] : later.best[i], none ? winner[i] : later.winner[i]);
    }
  }
  __device__ void write(const PoolArguments<T>& a, int64_t row, int64_t col) const {
    Pack<T, n> values;
    Pack<int32_t, n> rows;
    for (int i = 0; i < n; ++i) {
      values.set(i, best[i]);
      rows.v[i] = winner[i];
    }
    store_pack(values, a.y.at(row, col));
    if (a.winners.data != nullptr) store_pack(rows, a.winners.at(row, col));
  }
};

// Of a gradient: of a row of x, which is dy here, y gets it all, its share, or what it has won.
template <class T, int n>
struct GradientState : Sums<T, n> {
  __device__ void add(const PoolArguments<T>& a,
                      const Pack<T, n>& dy,
                      const Step& step,
                      int64_t col) {
    if (a.winners.data != nullptr) {
      const auto won = load_pack<int32_t, n>(a.winners.at(step.in, col));
      for (int i = 0; i < n; ++i) {
        if (won.v[i] == step.out) this->v[i] += dy.get(i);
      }
      return;
    }
    const Sum<T> count = a.counts == nullptr ? 1 : static_cast<Sum<T>>(a.counts[step.in]);
    for (int i = 0; i < n; ++i) this->v[i] += dy.get(i) / count;
  }
};

bool are_wide(const MatrixRef& x, const Reduced& result) {
  return is_wide(x) && is_wide(result.y) && is_wide(result.winners.value_or(MatrixRef{}));
}

// body(Type<an op>, arguments) for what is pooled.
template <class Body>
void dispatch_pool(const MatrixRef& x,
                   Reduction reduction,
                   const Reduced& result,
                   const Body& body) {
  dispatch_packs(x.dtype, are_wide(x, result), [&]<class T, class W>(Type<T>, W) {
    constexpr int n = W::n;
    const PoolArguments<T> arguments(x, result, reduction);
    if (reduction == Reduction::max) {
      body(Type<PoolOp<T, n, BestState<T, n, false>>>{}, arguments);
    } else if (reduction == Reduction::min) {
      body(Type<PoolOp<T, n, BestState<T, n, true>>>{}, arguments);
    } else {
      body(Type<PoolOp<T, n, SumState<T, n>>>{}, arguments);
    }
  });
}

}  // namespace

void pool(const Context& ctx,
          const KernelMap& map,
          const MatrixRef& x,
          Reduction reduction,
          const Reduced& result) {
  dispatch_pool(x, reduction, result, [&]<class Op>(Type<Op>, const auto& arguments) {
    gather<Op>(ctx, gather_of(map, x), x, arguments);
  });
}

void pool_grad(const Context& ctx, const PoolBack& grad, const MatrixRef& dx) {
  const Reduced result = {dx, grad.winners};
  dispatch_packs(dx.dtype, are_wide(grad.dy, result), [&]<class T, class W>(Type<T>, W) {
    PoolArguments<T> arguments(grad.dy, result, Reduction::sum);
    arguments.counts = grad.counts.as<int32_t>();
    gather<PoolOp<T, W::n, GradientState<T, W::n>>>(ctx, gather_of(*grad.transposed, grad.dy),
                                                    grad.dy, arguments);
  });
}

void segment_reduce(const Context& ctx,
                    const MatrixRef& x,
                    const MatrixRef& segments,
                    Reduction reduction,
                    const Reduced& result) {
  const RowLists lists = make_row_lists(ctx, segments, result.y.rows);
  dispatch_pool(x, reduction, result, [&]<class Op>(Type<Op>, const auto& arguments) {
    reduce_lists<Op, 4>(ctx, lists, x.cols, arguments);
  });
}

}  // namespace voxgemm::cuda
