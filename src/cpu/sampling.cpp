// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <vector>

#include "conv/operators.h"
#include "conv/sample_point.h"
#include "core/dispatch.h"
#include "cpu/row_lists.h"
#include "cpu/voxel_index.h"

namespace voxgemm::cpu {
namespace {

// Points or rows handled by one task.
constexpr int64_t piece = 1024;

// What rows of y are weighted sums of, without numbers outside of [0, x_rows); valid for list_rows
// rows more.
template <class S>
class PresentRows {
 public:
  PresentRows(const RowWeights& sums, int64_t x_rows)
      : sums_(sums),
        x_rows_(x_rows),
        rows_(static_cast<size_t>(list_rows * sums.rows.cols)),
        factors_(rows_.size()) {}
  RowList operator()(int64_t row) {
    const int64_t taps = sums_.rows.cols;
    const int32_t* numbers = sums_.rows.as<const int32_t>() + row * taps;
    const S* weights = sums_.weights.as<const S>() + row * taps;
    int32_t* rows = rows_.data() + row % list_rows * taps;
    S* factors = factors_.data() + row % list_rows * taps;
    int64_t count = 0;
    for (int64_t t = 0; t < taps; ++t) {
      rows[count] = numbers[t];
      factors[count] = weights[t];
      count += static_cast<uint32_t>(numbers[t]) < x_rows_ ? 1 : 0;
    }
    return {.rows = rows, .factors = factors, .count = count};
  }

 private:
  const RowWeights& sums_;
  int64_t x_rows_;
  std::vector<int32_t> rows_;
  std::vector<S> factors_;
};

}  // namespace

void fill_sample_map(const Context& ctx,
                     const VoxelIndex::State& index,
                     const PointsRef& points,
                     const SampleOptions& options,
                     const SampleMap& map) {
  const SampleRule rule(options);
  const auto find = [&](int32_t batch, int32_t x, int32_t y, int32_t z) {
    return index.find(batch, x, y, z);
  };
  dispatch_points(points.points.dtype, [&]<class T>(Type<T>) {
    const Points<T> all(points, map);
    const auto sample = options.mode == SampleMode::nearest
                            ? sample_point<SampleMode::nearest, T, decltype(find)>
                            : sample_point<SampleMode::trilinear, T, decltype(find)>;
    for_each(
        ctx, all.count, [&](int64_t p) { sample(rule, all, p, find); }, piece);
  });
}

void weighted_sum(const Context& ctx,
                  const MatrixRef& x,
                  const RowWeights& sums,
                  const MatrixRef& y) {
  const RowEngine& engine = row_engine(x.dtype);
  dispatch_float(x.dtype, [&]<class T>(Type<T>) {
    for_row_pieces(ctx, y.rows, piece, [&](int64_t first, int64_t last) {
      PresentRows<Sum<T>> list(sums, x.rows);
      for_lists(first, last, list, [&](std::span<const RowList> lists, int64_t r) {
        engine.sum({.rows = row_args(x, lists, y, r), .weighted = true});
      });
    });
  });
}

void weighted_sum_grad_input(const Context& ctx,
                             const MatrixRef& dy,
                             const RowWeights& sums,
                             const MatrixRef& dx) {
  const RowEngine& engine = row_engine(dy.dtype);
  dispatch_float(dy.dtype, [&]<class T>(Type<T>) {
    const RowLists<Sum<T>> of(sums.rows, dx.rows, sums.weights.as<const Sum<T>>());
    for_row_pieces(ctx, dx.rows, piece, [&](int64_t first, int64_t last) {
      for_lists(first, last, of, [&](std::span<const RowList> lists, int64_t r) {
        engine.sum_in_double({.rows = row_args(dy, lists, dx, r), .weighted = true});
      });
    });
  });
}

void weighted_sum_grad_weights(const Context& ctx,
                               const MatrixRef& x,
                               const MatrixRef& dy,
                               const RowWeights& sums) {
  const RowEngine& engine = row_engine(x.dtype);
  for_row_pieces(ctx, dy.rows, piece, [&](int64_t first, int64_t last) {
    engine.dot({.x = x.data,
                .x_stride = x.stride,
                .x_rows = x.rows,
                .dy = dy.data,
                .dy_stride = dy.stride,
                .n = static_cast<int>(dy.cols),
                .numbers = sums.rows.as<const int32_t>(),
                .taps = sums.rows.cols,
                .first = first,
                .last = last,
                .dots = sums.weights.data});
  });
}

}  // namespace voxgemm::cpu
