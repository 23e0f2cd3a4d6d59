// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "conv/kernel.h"
#include "cpu/engine.h"

namespace voxgemm::cpu {

// Forward, and grad_input as a forward over the transposed map. kernel.family is an Engine.
void convolve(const Kernel& kernel, const Context& ctx, const ConvArgs& args);

}  // namespace voxgemm::cpu
