// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <optional>

#include "voxgemm/kernel_map.h"

namespace voxgemm {

// Sums and means are f32 (f64 for f64), added in a fixed order and rounded once. In max and min a
// NaN wins, and of equals the first. A result of no operand is 0 and its winner -1. No output may
// overlap an input.
enum class Reduction { max, min, sum, mean };
constexpr int reduction_count = 4;

// y is written; so is winners (of max and min): the row of x that each element is from.
struct Reduced {
  MatrixRef y;                                      // [rows, c], dtype of x
  std::optional<MatrixRef> winners = std::nullopt;  // i32 [rows, c], contiguous
};

// y[o] = the reduction over the taps t of x[in(o, t)], column by column. x: [n_in, c] of a float
// dtype; y has n_out rows. Of equals the lowest tap wins.
VOXGEMM_EXPORT void pool(const Context& ctx,
                         const KernelMap& map,
                         const MatrixRef& x,
                         Reduction reduction,
                         const Reduced& result);
// dx [n_in, c], the exact adjoint: every pair (sum), its share of the mean, or the winner alone
// gets its dy [n_out, c]; rows of dy on repeated voxels are added and rounded first, as in a
// convolution. winners: those of pool(), for max and min. transposed: the transposed map, or null:
// made here unless the map is symmetric.
struct PoolGrad {
  MatrixRef dy;
  std::optional<MatrixRef> winners = std::nullopt;
  const KernelMap* transposed = nullptr;
};
VOXGEMM_EXPORT void pool_grad(const Context& ctx,
                              const KernelMap& map,
                              Reduction reduction,
                              const PoolGrad& grad,
                              const MatrixRef& dx);

// y[s] = the reduction over the rows r with segments[r] = s, in ascending order, of x[r]. segments:
// i32 [n, 1], contiguous; rows with a number outside [0, y.rows) are left out.
VOXGEMM_EXPORT void segment_reduce(const Context& ctx,
                                   const MatrixRef& x,
                                   const MatrixRef& segments,
                                   Reduction reduction,
                                   const Reduced& result);

}  // namespace voxgemm
