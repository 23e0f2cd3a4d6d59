// SPDX-License-Identifier: Apache-2.0
#include <vector>

#include "conv/operators.h"
#include "conv/sample_point.h"
#include "core/dispatch.h"
#include "cpu/avx2.h"
#include "cpu/row_lists.h"
#include "cpu/voxel_index.h"
#include "cpu/widen.h"

namespace voxgemm::cpu {
namespace {

// Points or rows handled by one task.
constexpr int64_t piece = 1024;

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
  const int64_t taps = sums.rows.cols;
  dispatch_float(x.dtype, [&]<class T>(Type<T>) {
    for_vector_pieces(ctx, y.rows, piece, [&](int64_t first, int64_t last) {
      std::vector<Sum<T>> sum(static_cast<size_t>(y.cols));
      for (int64_t r = first; r < last; ++r) {
        std::fill(sum.begin(), sum.end(), Sum<T>{0});
        for (int64_t t = taps * r; t < taps * (r + 1); ++t) {
          const int32_t row = sums.rows.as<int32_t>()[t];
          if (!RowLists::is_row(row, x.rows)) continue;
          const Sum<T> weight = sums.weights.as<Sum<T>>()[t];
          const T* from = x.row<const T>(row);
          for (int64_t c = 0; c < y.cols; ++c) sum[c] += weight * widen(from[c]);
        }
        for (int64_t c = 0; c < y.cols; ++c) store(sum[c], y.row<T>(r)[c]);
      }
    });
  });
}

void weighted_sum_grad_input(const Context& ctx,
                             const MatrixRef& dy,
                             const RowWeights& sums,
                             const MatrixRef& dx) {
  const int64_t taps = sums.rows.cols;
  const RowLists lists(sums.rows.as<int32_t>(), taps * dy.rows, dx.rows);
  dispatch_float(dy.dtype, [&]<class T>(Type<T>) {
    for_vector_pieces(ctx, dx.rows, piece, [&](int64_t first, int64_t last) {
      std::vector<double> sum(static_cast<size_t>(dx.cols));
      for (int64_t r = first; r < last; ++r) {
        std::fill(sum.begin(), sum.end(), 0.0);
        for (const int64_t place : lists.of(r)) {
          const double weight = sums.weights.as<Sum<T>>()[place];
          const T* from = dy.row<const T>(place / taps);
          for (int64_t c = 0; c < dx.cols; ++c) sum[c] += weight * widen(from[c]);
        }
        for (int64_t c = 0; c < dx.cols; ++c) store(sum[c], dx.row<T>(r)[c]);
      }
    });
  });
}

void weighted_sum_grad_weights(const Context& ctx,
                               const MatrixRef& x,
                               const MatrixRef& dy,
                               const RowWeights& sums) {
  const int64_t taps = sums.rows.cols;
  dispatch_float(x.dtype, [&]<class T>(Type<T>) {
    for_vector_pieces(ctx, dy.rows, piece, [&](int64_t first, int64_t last) {
      for (int64_t t = taps * first; t < taps * last; ++t) {
        const int32_t row = sums.rows.as<int32_t>()[t];
        Sum<T> sum = 0;
        const int64_t cols = RowLists::is_row(row, x.rows) ? dy.cols : 0;
        for (int64_t c = 0; c < cols; ++c) {
          sum += widen(x.row<const T>(row)[c]) * widen(dy.row<const T>(t / taps)[c]);
        }
        sums.weights.as<Sum<T>>()[t] = sum;
      }
    });
  });
}

}  // namespace voxgemm::cpu
