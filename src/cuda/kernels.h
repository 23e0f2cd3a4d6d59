// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <vector>

#include "conv/kernel.h"

namespace voxgemm::cuda {

// CUDA's rows of the registry.
std::vector<Kernel> kernels();

}  // namespace voxgemm::cuda
