// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <vector>

#include "conv/kernel.h"

namespace voxgemm::cuda {

// Rows of x gathered to a dense [rows, taps * c_in] block, chunk by chunk, and one dense product
// for each.
std::vector<Kernel> explicit_kernels();

}  // namespace voxgemm::cuda
