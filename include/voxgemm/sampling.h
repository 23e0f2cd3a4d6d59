// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <optional>

#include "voxgemm/coords.h"

namespace voxgemm {

// Reading a sparse grid at real points. Voxel (i, j, k) fills [i, i + 1)^3, its centre is at + 0.5.
// No output may overlap an input.

enum class SampleMode {
  nearest,    // the voxel that holds the point
  trilinear,  // the eight voxels whose centres are around it
};
enum class Rounding {
  floor,
  truncate,  // towards zero: a point in (-1, 0) reads voxel 0
};

struct SampleOptions {
  SampleMode mode = SampleMode::trilinear;
  Rounding rounding = Rounding::floor;               // of nearest
  std::optional<Int3> spatial_shape = std::nullopt;  // voxels outside it do not count
};
constexpr int sample_taps(SampleMode mode) { return mode == SampleMode::trilinear ? 8 : 1; }

struct PointsRef {
  MatrixRef points;                // f32 or f64 [m, 3], contiguous
  std::optional<MatrixRef> batch;  // i32 [m, 1], contiguous
  // Without `batch`: point p is in batch p / points_per_batch; 0: all are in batch 0.
  int64_t points_per_batch = 0;
};

// Which rows a point reads, and how much of each. Corner c of trilinear is at the lower voxel plus
// (c & 1, c >> 1 & 1, c >> 2) on (x, y, z); its share is the product of 1 - |point - centre| over
// the axes, divided by the sum over the corners that are there (at least 1e-12). A voxel that is
// not there has row -1 and weight 0, as has a point that is not finite.
struct SampleMap {
  Matrix rows;     // i32 [m, 8 or 1]: the lowest row of the voxel, or -1
  Matrix weights;  // dtype of the points [m, 8 or 1]
};
// index: of the coordinates that are sampled. m = 0 gives no rows. On a CUDA device, where nothing
// waits, an index that could not be built (too wide a box) gives weights of NaN at row 0.
VOXGEMM_EXPORT SampleMap sample_map(const Context& ctx,
                                    const VoxelIndex& index,
                                    const PointsRef& points,
                                    const SampleOptions& options);
// dpoints [m, 3] = the gradient of sum(dweights * weights) in the points of a trilinear map.
// dweights [m, 8] and dpoints: contiguous, dtype of the points; dpoints is written.
VOXGEMM_EXPORT void sample_map_grad(const Context& ctx,
                                    const MatrixRef& points,
                                    const SampleMap& map,
                                    const MatrixRef& dweights,
                                    const MatrixRef& dpoints);

// Weighted sums of rows: rows [m, k] i32 (numbers outside [0, n) are absent and never read) and
// weights [m, k], both contiguous; weights are f32, or f64 where x is. x [n, c] and y [m, c] have
// one float dtype. Sums are f32 (f64 for f64) in a fixed order, rounded once.
struct RowWeights {
  MatrixRef rows;
  MatrixRef weights;
};
// y[i] = sum over k of weights[i, k] * x[rows[i, k]]
VOXGEMM_EXPORT void weighted_sum(const Context& ctx,
                                 const MatrixRef& x,
                                 const RowWeights& sums,
                                 const MatrixRef& y);
// dx[r] = sum over the places (i, k) with rows[i, k] = r of weights[i, k] * dy[i]
VOXGEMM_EXPORT void weighted_sum_grad_input(const Context& ctx,
                                            const MatrixRef& dy,
                                            const RowWeights& sums,
                                            const MatrixRef& dx);
// sums.weights[i, k] = <dy[i], x[rows[i, k]]>, 0 where absent; written.
VOXGEMM_EXPORT void weighted_sum_grad_weights(const Context& ctx,
                                              const MatrixRef& x,
                                              const MatrixRef& dy,
                                              const RowWeights& sums);

}  // namespace voxgemm
