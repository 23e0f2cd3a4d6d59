// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "voxgemm/context.h"

// Rows that repeat a voxel. `first`, i32 [n, 1], is the lowest row with the same coordinates.
namespace voxgemm::cuda {

// The rows r with first[r] != r. Waits for the device.
int64_t count_repeated(const Context& ctx, const MatrixRef& first);

// dy with the rows of every voxel added to the voxel's lowest row, in double and in row order.
// Right, though slow, where nothing repeats.
Matrix merge_repeated(const Context& ctx, const MatrixRef& dy, const MatrixRef& first);

// Sets the rows that are not their voxel's lowest to zero; reads only `first` where there are none.
void zero_repeated(const Context& ctx, const MatrixRef& dx, const MatrixRef& first);

}  // namespace voxgemm::cuda
