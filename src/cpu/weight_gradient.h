// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "conv/kernel.h"
#include "cpu/engine.h"

namespace voxgemm::cpu {

// dW[t] = sum over pairs of x[in]^T dy[out]. kernel.family is an Engine.
void weight_gradient(const Kernel& kernel, const Context& ctx, const ConvArgs& args);

}  // namespace voxgemm::cpu
