// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <optional>

#include "voxgemm/kernel_map.h"

namespace voxgemm {

// Depthwise convolution: every channel has its own kernel. Matrices have one float dtype and
// contiguous columns; w [taps, c]; sums are f32 (f64 for f64) in a fixed order, rounded once; an
// absent neighbour is never read, and no infinite factor of it shows. Maps without rows give no
// rows and zero gradients. No output may overlap an input.
struct DepthwiseForward {
  MatrixRef x;                                   // [n_in, c]
  MatrixRef w;                                   // [taps, c]
  std::optional<MatrixRef> bias = std::nullopt;  // [1, c]
};
// y [n_out, c] = bias + sum over taps t of x[in(o, t)] * w[t]
VOXGEMM_EXPORT void depthwise_forward(const Context& ctx,
                                      const KernelMap& map,
                                      const DepthwiseForward& operands,
                                      const MatrixRef& y);
// dx [n_in, c], the exact adjoint; repeated voxels as in a convolution. transposed: the transposed
// map, or null: made here unless the map is symmetric.
struct DepthwiseGradInput {
  MatrixRef dy;  // [n_out, c]
  MatrixRef w;   // [taps, c]
  const KernelMap* transposed = nullptr;
};
VOXGEMM_EXPORT void depthwise_grad_input(const Context& ctx,
                                         const KernelMap& map,
                                         const DepthwiseGradInput& operands,
                                         const MatrixRef& dx);
// dw [taps, c] = sum over pairs (i, o, t) of x[i] * dy[o]; dtype of x, or f32 for f16 and bf16.
VOXGEMM_EXPORT void depthwise_grad_weight(const Context& ctx,
                                          const KernelMap& map,
                                          const MatrixRef& x,
                                          const MatrixRef& dy,
                                          const MatrixRef& dw);

}  // namespace voxgemm
