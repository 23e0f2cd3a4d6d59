// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "voxgemm/context.h"

namespace voxgemm::cuda {

// db [1, channels] = sum of the rows of dy, in double, in the order of the CPU's: the same bits.
void grad_bias(const Context& ctx, const MatrixRef& dy, const MatrixRef& db);

}  // namespace voxgemm::cuda
