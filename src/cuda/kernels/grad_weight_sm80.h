// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <vector>

#include "conv/kernel.h"

namespace voxgemm::cuda {

// grad_weight on every device from compute capability 7.5 on; see grad_weight_sm80.cuh.
std::vector<Kernel> grad_weight_sm80_kernels();

}  // namespace voxgemm::cuda
