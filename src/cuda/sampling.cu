// SPDX-License-Identifier: Apache-2.0
#include "conv/operators.h"
#include "conv/sample_point.h"
#include "cuda/row_lists.cuh"
#include "cuda/voxel_index.cuh"

namespace voxgemm::cuda {
namespace {

// The row of a voxel of one batch.
struct Finder {
  const IndexView& index;
  const Frame& frame;
  int64_t batch;

  __device__ int32_t operator()(const int64_t* voxel) const {
    const int64_t place[4] = {batch, voxel[0], voxel[1], voxel[2]};
    for (int axis = 0; axis < 4; ++axis) {
      const int64_t offset = place[axis] - frame.origin[axis];
      if (offset < 0 || offset > frame.last[axis]) return -1;
    }
    const Place at =
        place_of(frame, make_int4(static_cast<int32_t>(batch), static_cast<int32_t>(voxel[0]),
                                  static_cast<int32_t>(voxel[1]), static_cast<int32_t>(voxel[2])));
    const Block block = find_block(index.set, at.key);
    return block.has(at.bit) ? index.row(block, at.bit) : -1;
  }
};

template <class T, SampleMode mode>
__global__ void write_map(IndexView index, SampleRule rule, Points<T> points) {
  constexpr int taps = mode == SampleMode::trilinear ? 8 : 1;
  const Status status = index.set.head->counters.status;
  for (int64_t p = thread_index(); p < points.count; p += thread_count()) {
    int32_t* rows = points.rows + taps * p;
    T* weights = points.weights + taps * p;
    if (status != Status::fine) {
      // Where there are padding rows only, nothing is found; a failure must show in what is
      // computed with this.
      const bool empty = status == Status::empty;
      for (int t = 0; t < taps; ++t) {
        rows[t] = empty ? -1 : 0;
        weights[t] = empty ? T(0) : static_cast<T>(nan(""));
      }
      continue;
    }
    const Finder find{index, index.set.head->frame, points.batch_of(p)};
    const T point[3] = {points.points[3 * p], points.points[3 * p + 1], points.points[3 * p + 2]};
    if constexpr (mode == SampleMode::nearest) {
      sample_nearest(rule, point, find, rows, weights);
    } else {
      int32_t found[8];
      T shares[8];
      sample_trilinear(rule, point, find, found, shares);
      for (int t = 0; t < 8; ++t) {
        rows[t] = found[t];
        weights[t] = shares[t];
      }
    }
  }
}

template <class T>
__global__ void write_point_gradients(
    const T* points, const int32_t* rows, const T* dweights, T* dpoints, int64_t count) {
  for (int64_t p = thread_index(); p < count; p += thread_count()) {
    sample_gradient(points + 3 * p, rows + 8 * p, dweights + 8 * p, dpoints + 3 * p);
  }
}

template <class T>
struct WeightedRows {
  View<T> x;
  const Sum<T>* weights;  // [places, taps]
  uint32_t taps;
  View<T> y;
};

// Both ways: the sums of a place are over its taps, those of a row of x over the places where it
// was read, in a list.
template <class T, int n>
struct WeightedSum {
  using Element = T;
  using Arguments = WeightedRows<T>;
  using State = Sums<T, n>;
  static constexpr int width = n;
  static constexpr int rows = 2;
  static constexpr int blocks = 6;

  Arguments a;
  int64_t col;
  __device__ int tap(int number) const { return number; }
  __device__ void add(State* state, const Pack<T, n>& x, int tap, int64_t row, int32_t) const {
    state->add(x, a.weights[row * a.taps + tap]);
  }
  __device__ void add(State* state, uint32_t place) const {
    state->add(load_pack<T, n>(a.x.at(place / a.taps, col)), a.weights[place]);
  }
  __device__ void finish(const State& state, int64_t row) const { state.write(a.y.at(row, col)); }
};

// Eight lanes share a dot product: each takes every eighth pack, then they add in pairs.
constexpr int dot_lanes = 8;
template <class T>
struct Dots {
  View<T> x;
  View<T> dy;
  const int32_t* rows;  // [dots]
  Sum<T>* dots;         // [dots]
  int64_t count;
  int64_t taps;
};
template <class T, int n>
__global__ void write_dots(Dots<T> d) {
  const int lane = threadIdx.x % dot_lanes;
  // All lanes of a warp stay until its last dot.
  const int64_t rounded = (d.count * dot_lanes + 31) / 32 * 32;
  for (int64_t i = thread_index(); i < rounded; i += thread_count()) {
    const int64_t dot = i / dot_lanes;
    const int32_t row = dot < d.count ? d.rows[dot] : -1;
    Sum<T> sum = 0;
    if (static_cast<uint32_t>(row) < d.x.rows) {
      const T* x = d.x.at(row, 0);
      const T* dy = d.dy.at(dot / d.taps, 0);
      for (int64_t c = lane * n; c < d.x.cols; c += dot_lanes * n) {
        const auto a = load_pack<T, n>(x + c);
        const auto b = load_pack<T, n>(dy + c);
        for (int j = 0; j < n; ++j) sum += a.get(j) * b.get(j);
      }
    }
    for (int step = dot_lanes / 2; step > 0; step /= 2) {
      sum += __shfl_xor_sync(0xffffffff, sum, step);
    }
    if (lane == 0 && dot < d.count) d.dots[dot] = sum;
  }
}

template <class T>
WeightedRows<T> weighted(const MatrixRef& x, const RowWeights& sums, const MatrixRef& y) {
  return {View<T>(x), sums.weights.as<Sum<T>>(),
          static_cast<uint32_t>(std::max<int64_t>(sums.rows.cols, 1)), View<T>(y)};
}

}  // namespace

SampleMap sample_map(const Context& ctx,
                     const VoxelIndex::State& index,
                     const PointsRef& points,
                     const SampleOptions& options) {
  const DeviceGuard guard(ctx.device);
  const int taps = sample_taps(options.mode);
  const int64_t count = points.points.rows;
  SampleMap map{make_matrix(ctx, count, taps, Dtype::i32),
                make_matrix(ctx, count, taps, points.points.dtype)};
  if (index.rows() == 0) {
    fill_bytes(ctx, map.rows.data, 0xff, count * taps * sizeof(int32_t));
    fill_bytes(ctx, map.weights.data, 0, count * taps * size_of(map.weights.dtype));
    return map;
  }
  const IndexView view = static_cast<const BlockIndex&>(index).view();
  dispatch_points(points.points.dtype, [&]<class T>(Type<T>) {
    const auto kernel = options.mode == SampleMode::nearest ? write_map<T, SampleMode::nearest>
                                                            : write_map<T, SampleMode::trilinear>;
    launch(ctx, over(ctx, count), kernel, view, SampleRule(options), Points<T>(points, map));
  });
  return map;
}

void sample_map_grad(const Context& ctx,
                     const MatrixRef& points,
                     const SampleMap& map,
                     const MatrixRef& dweights,
                     const MatrixRef& dpoints) {
  const DeviceGuard guard(ctx.device);
  dispatch_points(points.dtype, [&]<class T>(Type<T>) {
    launch(ctx, over(ctx, points.rows), write_point_gradients<T>, points.as<T>(),
           map.rows.as<int32_t>(), dweights.as<T>(), dpoints.as<T>(), points.rows);
  });
}

void weighted_sum(const Context& ctx,
                  const MatrixRef& x,
                  const RowWeights& sums,
                  const MatrixRef& y) {
  const DeviceGuard guard(ctx.device);
  const int64_t taps = sums.rows.cols;
  if (taps == 0) return fill_zero_rows(ctx, y);
  const Gather g = {.rows = sums.rows.as<int32_t>(),
                    .tap_stride = 1,
                    .row_stride = taps,
                    .taps = static_cast<int>(taps),
                    .rows_in = static_cast<uint32_t>(x.rows),
                    .rows_out = y.rows,
                    .cols = y.cols,
                    .x_bytes = row_bytes(x)};
  dispatch_packs(x.dtype, is_wide(x) && is_wide(y), [&]<class T, class W>(Type<T>, W) {
    gather<WeightedSum<T, W::n>>(ctx, g, x, weighted<T>(x, sums, y));
  });
}

void weighted_sum_grad_input(const Context& ctx,
                             const MatrixRef& dy,
                             const RowWeights& sums,
                             const MatrixRef& dx) {
  const DeviceGuard guard(ctx.device);
  const RowLists lists =
      make_row_lists(ctx, sums.rows.as<int32_t>(), sums.rows.rows * sums.rows.cols, dx.rows);
  dispatch_packs(dx.dtype, is_wide(dx) && is_wide(dy), [&]<class T, class W>(Type<T>, W) {
    reduce_lists<WeightedSum<T, W::n>>(ctx, lists, dx.cols, weighted<T>(dy, sums, dx));
  });
}

void weighted_sum_grad_weights(const Context& ctx,
                               const MatrixRef& x,
                               const MatrixRef& dy,
                               const RowWeights& sums) {
  const DeviceGuard guard(ctx.device);
  const int64_t count = sums.rows.rows * sums.rows.cols;
  dispatch_packs(x.dtype, is_wide(x) && is_wide(dy), [&]<class T, class W>(Type<T>, W) {
    launch(ctx, over(ctx, count * dot_lanes), write_dots<T, W::n>,
           Dots<T>{View<T>(x), View<T>(dy), sums.rows.as<int32_t>(), sums.weights.as<Sum<T>>(),
                   count, std::max<int64_t>(sums.rows.cols, 1)});
  });
}

}  // namespace voxgemm::cuda
