// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <vector>

#include "conv/kernel.h"

namespace voxgemm::cuda {

// The weight gradient on Hopper, any channels, f16, bf16, and f32 in two or three terms of bf16;
// see grad_weight_sm90.cuh.
std::vector<Kernel> grad_weight_sm90_kernels();

}  // namespace voxgemm::cuda
