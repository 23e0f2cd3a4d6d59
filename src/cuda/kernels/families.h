// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <vector>

#include "conv/kernel.h"

namespace voxgemm::cuda {

// The rows that the families have in the registry. The first is the judge of the others, and what
// runs where none of them can: any channels, any strides of the weights, any device.
std::vector<Kernel> naive_kernels();
std::vector<Kernel> sm80_kernels();
// A row's name ends in the rows and columns of its tiles and its groups of taps.
std::vector<Kernel> implicit_gemm_sm90_kernels();
std::vector<Kernel> grad_weight_sm90_kernels();

void load_grad_weight_sm90();

}  // namespace voxgemm::cuda
