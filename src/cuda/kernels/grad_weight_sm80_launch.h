// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "conv/kernel.h"
#include "cuda/kernels/arithmetic_sm80.h"

namespace voxgemm::cuda::sm80 {

// A row of the family.
struct GradVariant {
  Math math = Math::f16;
  int rows = 0;  // of a tile of dW: taps * c_in
  int cols = 0;
  bool masked = false;
  bool many_slices = false;
};

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
GradCut cut_gradient(const GradVariant& variant, const GradSize& size);

// Launches the variant on x and dy that are aligned (aligned.h). One source for each arithmetic.
template <Math math>
void grad_weight(const Context& ctx, const GradVariant& variant, const ConvArgs& args);

// Dynamic shared memory of a CTA.
constexpr size_t grad_shared_bytes(const GradVariant& variant) {
  const size_t size = variant.math == Math::f16 || variant.math == Math::bf16 ? 2 : 4;
  // Three stages of 64 lines; alignment, presence words.
  const auto rows = static_cast<size_t>(variant.rows);
  const auto columns = static_cast<size_t>(variant.cols);
  return 128 + size_t{3} * 64 * size * (rows + columns) + size_t{3} * 4 * rows * size / 128;
}

}  // namespace voxgemm::cuda::sm80
