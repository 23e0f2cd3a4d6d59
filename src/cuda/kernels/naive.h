// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <vector>

#include "conv/kernel.h"

namespace voxgemm::cuda {

// The judge of the other CUDA kernels, and what runs where none of them can: any channels, any
// strides of the weights, any device.
std::vector<Kernel> naive_kernels();

}  // namespace voxgemm::cuda
