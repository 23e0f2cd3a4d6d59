// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>

#include "conv/kernel.h"
#include "cuda/kernels/arithmetic_sm80.h"

namespace voxgemm::cuda::sm80 {

// A row of implicit_gemm_sm80.cu or, with `gradient`, of grad_weight_sm80.cu.
struct Variant {
  bool gradient = false;
  Math math = Math::f16;
  int rows = 0;  // of a tile of y; of dW: taps * c_in
  int cols = 0;
  bool masked = false;
  int slices = 1;  // of the reduction; of a gradient, how many times the usual number
};

// Launches the variant on operands that are aligned (aligned.h). One object for each arithmetic.
template <Math math>
void convolve(const Context& ctx, const Variant& variant, const ConvArgs& args);
template <Math math>
void grad_weight(const Context& ctx, const Variant& variant, const ConvArgs& args);
// See load() of launch.cuh.
template <Math math>
void load_convolve();

// Dynamic shared memory of a CTA, at most.
constexpr size_t shared_bytes(const Variant& variant) {
  // Three stages of 128 bytes a row and a column, of a gradient 64 elements, panels of columns
  // whole; presence words of 64 rows' 128 bytes; alignment; of y the taps of a tile.
  const size_t line = variant.gradient && !is_16bit(variant.math) ? 256 : 128;
  const auto rows = static_cast<size_t>(variant.rows);
  const auto columns = static_cast<size_t>(std::max(variant.cols, 64));
  const size_t taps = variant.gradient ? 0 : size_t{4} * 32;
  return 128 + 3 * (line * (rows + columns) + 4 * (rows * line / 8192)) + taps;
}

// How the weight gradient is cut.
struct GradCut {
  int groups = 1;      // of taps
  int row_blocks = 0;  // of a group
  int column_blocks = 0;
  int slices = 1;
  int64_t ctas() const { return int64_t{groups} * row_blocks * column_blocks * slices; }
};
struct GradSize {
  int taps = 0;
  int c_in = 0;
  int c_out = 0;
  int64_t rows = 0;  // of dy
};
GradCut cut_gradient(const Variant& variant, const GradSize& size);

}  // namespace voxgemm::cuda::sm80
