// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <vector>

#include "conv/kernel.h"

namespace voxgemm::cuda {

// Forward, and grad_input as a forward over the transposed map, on every device from compute
// capability 7.5 on; see implicit_gemm_sm80.cuh.
std::vector<Kernel> implicit_gemm_sm80_kernels();

}  // namespace voxgemm::cuda
