// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cuda/kernels/families.h"

namespace voxgemm::cuda::sm80 {

// A row of implicit_gemm_sm80.cu or, with `gradient`, of grad_weight_sm80.cu.
struct Variant {
  bool gradient = false;
  Math math = Math::f16;
  int rows = 0;  // of a tile of y; of dW: taps * c_in
  int cols = 0;
  Algorithm algorithm = Algorithm::implicit_gemm;
  int slices = 1;  // of the reduction; a gradient has as many as suit it

  // Whether its schedule is by mask, with rows sorted by the taps that they have.
  bool masked() const {
    return algorithm != Algorithm::implicit_gemm && algorithm != Algorithm::implicit_gemm_splitk;
  }
  // Of taps. One for each tap makes lists of its pairs.
  int groups(int taps) const {
    if (algorithm == Algorithm::explicit_gemm) return taps;
    return masked() ? (taps + 31) / 32 : 1;
  }
};

// Launches the variant on operands that are aligned (aligned.h). One object for each arithmetic.
template <Math math>
void convolve(const Context& ctx, const Variant& variant, const ConvArgs& args);
template <Math math>
void grad_weight(const Context& ctx, const Variant& variant, const ConvArgs& args);
// See load() of launch.cuh.
template <Math math>
void load_convolve();

// How the weight gradient is cut.
struct GradCut {
  int groups = 1;      // of taps
  int row_blocks = 0;  // of a group
  int column_blocks = 0;
  int slices = 1;
  int64_t ctas() const { return int64_t{groups} * row_blocks * column_blocks * slices; }
};
GradCut cut_gradient(const Variant& variant, const Sizes& size);

}  // namespace voxgemm::cuda::sm80
