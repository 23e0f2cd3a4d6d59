// SPDX-License-Identifier: Apache-2.0
#include "voxgemm/sampling.h"

#include "conv/items.h"
#include "conv/operators.h"
#include "conv/validate.h"
#include "voxgemm/error.h"

namespace voxgemm {
namespace {

Dtype point_dtype(const MatrixRef& points) {
  check(points.dtype == Dtype::f32 || points.dtype == Dtype::f64, "points have dtype ",
        name(points.dtype), ", expected f32 or f64");
  return points.dtype;
}

// The sides of weighted sums: x [n, c] and y [m, c].
void validate_sums(const Context& ctx,
                   const MatrixRef& x,
                   const RowWeights& sums,
                   const MatrixRef& y) {
  validate_matrix(ctx, x, {"x", x.rows, x.cols, float_dtype(x, "x")});
  validate_matrix(ctx, y, {"y", sums.rows.rows, x.cols, x.dtype});
  validate_column(ctx, sums.rows, {"rows", y.rows, sums.rows.cols, Dtype::i32});
  validate_column(
      ctx, sums.weights,
      {"weights", y.rows, sums.rows.cols, x.dtype == Dtype::f64 ? Dtype::f64 : Dtype::f32});
}

// What is written, beside an input and the rows; and the weights, unless it is these.
void validate_written(const Memory& output, const Memory& input, const RowWeights& sums) {
  validate_apart(output, input);
  validate_apart(output, memory_of(sums.rows, "rows"));
}

}  // namespace

SampleMap sample_map(const Context& ctx,
                     const VoxelIndex& index,
                     const PointsRef& points,
                     const SampleOptions& options) {
  const MatrixRef& p = points.points;
  validate_column(ctx, p, {"points", p.rows, 3, point_dtype(p)});
  if (points.batch) validate_column(ctx, *points.batch, {"batch", p.rows, 1, Dtype::i32});
  check(points.points_per_batch >= 0, "there are ", points.points_per_batch,
        " points per batch, expected 0 or more");
  if (options.spatial_shape) validate_shape(*options.spatial_shape);
  validate_enumerator(options.mode, SampleMode::trilinear, "the mode of sampling");
  validate_enumerator(options.rounding, Rounding::truncate, "the rounding of sampling");
  const int taps = sample_taps(options.mode);
  SampleMap map{make_matrix(ctx, p.rows, taps, Dtype::i32),
                make_matrix(ctx, p.rows, taps, p.dtype)};
  run(ctx, cuda::fill_sample_map, cpu::fill_sample_map, index.state(), points, options, map);
  return map;
}

void sample_map_grad(const Context& ctx,
                     const MatrixRef& points,
                     const SampleMap& map,
                     const MatrixRef& dweights,
                     const MatrixRef& dpoints) {
  validate_column(ctx, points, {"points", points.rows, 3, point_dtype(points)});
  validate_column(ctx, map.rows, {"rows", points.rows, 8, Dtype::i32});
  validate_column(ctx, dweights, {"dweights", points.rows, 8, points.dtype});
  validate_column(ctx, dpoints, {"dpoints", points.rows, 3, points.dtype});
  const Memory result = memory_of(dpoints, "dpoints");
  validate_apart(result, memory_of(points, "points"));
  validate_apart(result, memory_of(map.rows, "rows"));
  validate_apart(result, memory_of(dweights, "dweights"));
  dispatch_points(points.dtype, [&]<class T>(Type<T>) {
    for_items(ctx, points.rows,
              PointGradients<T>{points.as<T>(), map.rows.as<int32_t>(), dweights.as<T>(),
                                dpoints.as<T>()});
  });
}

void weighted_sum(const Context& ctx,
                  const MatrixRef& x,
                  const RowWeights& sums,
                  const MatrixRef& y) {
  validate_sums(ctx, x, sums, y);
  validate_written(memory_of(y, "y"), memory_of(x, "x"), sums);
  validate_apart(memory_of(y, "y"), memory_of(sums.weights, "weights"));
  if (y.cols == 0) return;
  run(ctx, cuda::weighted_sum, cpu::weighted_sum, x, sums, y);
}

void weighted_sum_grad_input(const Context& ctx,
                             const MatrixRef& dy,
                             const RowWeights& sums,
                             const MatrixRef& dx) {
  validate_sums(ctx, dx, sums, dy);
  validate_written(memory_of(dx, "dx"), memory_of(dy, "dy"), sums);
  validate_apart(memory_of(dx, "dx"), memory_of(sums.weights, "weights"));
  if (dx.cols == 0) return;
  if (on_device(ctx)) validate_sortable(sums.rows.rows * sums.rows.cols);
  run(ctx, cuda::weighted_sum_grad_input, cpu::weighted_sum_grad_input, dy, sums, dx);
}

void weighted_sum_grad_weights(const Context& ctx,
                               const MatrixRef& x,
                               const MatrixRef& dy,
                               const RowWeights& sums) {
  validate_sums(ctx, x, sums, dy);
  validate_written(memory_of(sums.weights, "weights"), memory_of(x, "x"), sums);
  validate_apart(memory_of(sums.weights, "weights"), memory_of(dy, "dy"));
  run(ctx, cuda::weighted_sum_grad_weights, cpu::weighted_sum_grad_weights, x, dy, sums);
}

}  // namespace voxgemm
