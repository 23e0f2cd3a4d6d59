// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "conv/kernel.h"
#include "cuda/kernels/arithmetic_sm80.h"

namespace voxgemm::cuda::sm80 {

// A row of the family.
struct ConvVariant {
  Math math = Math::f16;
  int rows = 0;  // of a tile
  int cols = 0;
  bool masked = false;
  int slices = 1;
};

// Launches the variant on operands that are aligned (aligned.h). One source for each arithmetic.
template <Math math>
void convolve(const Context& ctx, const ConvVariant& variant, const ConvArgs& args);

// Dynamic shared memory of a CTA.
constexpr size_t conv_shared_bytes(const ConvVariant& variant) {
  // Three stages of 128 bytes a row and a column, panels of columns whole; alignment, presence
  // words, taps.
  const auto rows = static_cast<size_t>(variant.rows);
  const auto columns = static_cast<size_t>(variant.cols < 64 ? 64 : variant.cols);
  return 128 + size_t{3} * 128 * (rows + columns) + size_t{3} * 4 * (rows / 64) + size_t{4} * 32;
}

}  // namespace voxgemm::cuda::sm80
