// SPDX-License-Identifier: Apache-2.0
#include "conv/operators.h"
#include "conv/sample_point.h"
#include "cuda/row_lists.cuh"
#include "cuda/voxel_index.cuh"

namespace voxgemm::cuda {
namespace {

template <SampleMode mode, class T>
void write_map(const Context& ctx,
               const BlockSet& set,
               const SampleRule& rule,
               const Points<T>& points) {
  const int taps = sample_taps(mode);
  const SetHead* head = set.head;
  for_each(ctx, points.count, [=] __device__(int64_t p) {
    const Status status = head->status;
    // Among padding alone nothing is found; a failure must show in what is computed with this.
    if (status != Status::fine && status != Status::empty) {
      for (int64_t t = taps * p; t < taps * (p + 1); ++t) {
        points.rows[t] = 0;
        points.weights[t] = static_cast<T>(nan(""));
      }
      return;
    }
    sample_point<mode>(rule, points, p, [&](int32_t batch, int32_t x, int32_t y, int32_t z) {
      return status == Status::fine ? find_row(set, head->frame, make_int4(batch, x, y, z)) : -1;
    });
  });
}

template <class T>
struct WeightedRows {
  View<T> x;
  const Sum<T>* weights;  // [places, taps]
  uint32_t taps;
  View<T> y;

  __device__ Step step(uint32_t place) const { return {0, place / taps, place}; }
};

// Both ways: sums of a place over its taps, or of a row of x over a list of places that read it.
template <class T, int n>
struct WeightedState : Sums<T, n> {
  __device__ void add(const WeightedRows<T>& a, const Pack<T, n>& x, const Step& step, int64_t) {
    Sums<T, n>::add(x, a.weights[step.place]);
  }
};

// body(Type<an op>, its arguments) for sums of rows of x.
template <class Body>
void dispatch_weighted(const MatrixRef& x,
                       const RowWeights& sums,
                       const MatrixRef& y,
                       const Body& body) {
  const auto taps = static_cast<uint32_t>(std::max<int64_t>(sums.rows.cols, 1));
  dispatch_packs(x.dtype, is_wide(x) && is_wide(y), [&]<class T, class W>(Type<T>, W) {
    using Arguments = WeightedRows<T>;
    body(Type<StateOp<T, W::n, Arguments, WeightedState<T, W::n>>>{},
         Arguments{View<T>(x), sums.weights.as<Sum<T>>(), taps, View<T>(y)});
  });
}

// Eight lanes, of a warp that stays together, share a dot product: each takes every eighth pack.
constexpr int dot_lanes = 8;
template <class T, int n>
struct Dots {
  View<T> x;
  View<T> dy;
  const int32_t* rows;  // [dots]
  Sum<T>* dots;         // [dots]
  int64_t count;
  int64_t taps;

  __device__ void operator()(int64_t i) const {
    const int64_t lane = i % dot_lanes;
    const int64_t dot = i / dot_lanes;
    const int32_t row = dot < count ? rows[dot] : -1;
    Sum<T> sum = 0;
    if (static_cast<uint32_t>(row) < x.rows) {
      for (int64_t c = lane * n; c < x.cols; c += dot_lanes * n) {
        const auto a = load_pack<T, n>(x.at(row, c));
        const auto b = load_pack<T, n>(dy.at(dot / taps, c));
        for (int j = 0; j < n; ++j) sum += a.get(j) * b.get(j);
      }
    }
    for (int step = dot_lanes / 2; step > 0; step /= 2) {
      sum += __shfl_xor_sync(0xffffffff, sum, step);
    }
    if (lane == 0 && dot < count) dots[dot] = sum;
  }
};

}  // namespace

void fill_sample_map(const Context& ctx,
                     const VoxelIndex::State& index,
                     const PointsRef& points,
                     const SampleOptions& options,
                     const SampleMap& map) {
  dispatch_points(points.points.dtype, [&]<class T>(Type<T>) {
    const auto write = options.mode == SampleMode::nearest ? write_map<SampleMode::nearest, T>
                                                           : write_map<SampleMode::trilinear, T>;
    write(ctx, static_cast<const BlockIndex&>(index).set(), SampleRule(options),
          Points<T>(points, map));
  });
}

void weighted_sum(const Context& ctx,
                  const MatrixRef& x,
                  const RowWeights& sums,
                  const MatrixRef& y) {
  const int64_t taps = sums.rows.cols;
  const Gather g = {.rows = sums.rows.as<int32_t>(),
                    .tap_stride = 1,
                    .row_stride = taps,
                    .taps = static_cast<int>(taps),
                    .rows_in = static_cast<uint32_t>(x.rows),
                    .rows_out = y.rows,
                    .cols = y.cols,
                    .x_bytes = row_bytes(x)};
  dispatch_weighted(x, sums, y, [&]<class Op>(Type<Op>, const auto& arguments) {
    gather<Op>(ctx, g, x, arguments);
  });
}

void weighted_sum_grad_input(const Context& ctx,
                             const MatrixRef& dy,
                             const RowWeights& sums,
                             const MatrixRef& dx) {
  const RowLists lists = make_row_lists(ctx, sums.rows, dx.rows);
  // Lists are short: several places at once would mostly be those of several lists.
  dispatch_weighted(dy, sums, dx, [&]<class Op>(Type<Op>, const auto& arguments) {
    reduce_lists<Op, 1>(ctx, lists, dy.cols, arguments);
  });
}

void weighted_sum_grad_weights(const Context& ctx,
                               const MatrixRef& x,
                               const MatrixRef& dy,
                               const RowWeights& sums) {
  const int64_t count = sums.rows.rows * sums.rows.cols;
  dispatch_packs(x.dtype, is_wide(x) && is_wide(dy), [&]<class T, class W>(Type<T>, W) {
    for_each(ctx, ceil_div(count * dot_lanes, 32) * 32,
             Dots<T, W::n>{View<T>(x), View<T>(dy), sums.rows.as<int32_t>(),
                           sums.weights.as<Sum<T>>(), count, std::max<int64_t>(sums.rows.cols, 1)});
  });
}

}  // namespace voxgemm::cuda
