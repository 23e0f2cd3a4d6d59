// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <vector>

#include "conv/kernel.h"

namespace voxgemm::cuda {

// The weight gradient on Hopper, f16 and bf16, any channels; see grad_weight_sm90.cuh. Needs no
// schedule: it reads the map's neighbour table.
std::vector<Kernel> grad_weight_sm90_kernels();

}  // namespace voxgemm::cuda
