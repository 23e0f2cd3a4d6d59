// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "voxgemm/context.h"

// Operands for kernels that move 16 bytes at once: rows start at multiples of 16 bytes and have
// zeros behind their last column up to the next such multiple. What is not so is copied.
namespace voxgemm::cuda {

// With the memory they lie in where that is a copy.
struct AlignedWeights : WeightsRef {
  std::shared_ptr<void> memory = {};
};

// Whether the input channels are the contiguous axis, in whole pieces of 16 bytes.
bool is_aligned(const WeightsRef& w);
// Whether all rows can be moved 16 bytes at a time.
bool is_wide(const MatrixRef& m);
// x for reading: itself where rows are aligned and fill their last 16 bytes, else a copy so wide.
Matrix aligned_input(const Context& ctx, const MatrixRef& x);
// y for writing in such pieces: itself likewise, else memory that write_back() copies to y.
Matrix aligned_output(const Context& ctx, const MatrixRef& y);
void write_back(const Context& ctx, const Matrix& from, const MatrixRef& y);
// w for reading: itself where one channel axis is contiguous and full to 16 bytes, and the other
// strides are multiples of them; else a copy, contiguous where w is, input channels if nowhere.
AlignedWeights aligned_weights(const Context& ctx, const WeightsRef& w);
// Weights of one tap with the matrix's rows as output channels.
WeightsRef one_tap(const MatrixRef& m);

}  // namespace voxgemm::cuda
