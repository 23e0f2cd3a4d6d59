// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "conv/kernel.h"
#include "cpu/engine.h"

namespace voxgemm::cpu {

// Forward, and grad_input as a forward over the transposed map. kernel.family is an Engine.
void convolve(const Kernel& kernel, const Context& ctx, const ConvArgs& args);

// f32 partial sums of a kernel with slices.
size_t partial_bytes(const Kernel& kernel, int64_t rows, int c_out);

}  // namespace voxgemm::cpu
