// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <vector>

#include "conv/kernel.h"

namespace voxgemm::cuda {

// Forward on Hopper, and grad_input as a forward over the transposed map, over by_mask schedules;
// see implicit_gemm_sm90.cuh. A row's name ends in the rows and columns of its tiles and its
// groups of taps.
std::vector<Kernel> implicit_gemm_sm90_kernels();

}  // namespace voxgemm::cuda
