// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <vector>

#include "conv/kernel.h"

namespace voxgemm::cuda {

// The rows that the families have in the registry.

// The judge of the other CUDA kernels, and what runs where none of them can: any channels, any
// strides of the weights, any device.
std::vector<Kernel> naive_kernels();

// Forward, grad_input as a forward over the transposed map, and grad_weight, on every device from
// compute capability 7.5 on; see implicit_gemm_sm80.cu and grad_weight_sm80.cu.
std::vector<Kernel> sm80_kernels();

// Forward on Hopper, and grad_input as a forward over the transposed map, over by_mask schedules;
// see implicit_gemm_sm90.cuh. A row's name ends in the rows and columns of its tiles and its
// groups of taps.
std::vector<Kernel> implicit_gemm_sm90_kernels();

// The weight gradient on Hopper, any channels, f16, bf16, and f32 in two or three terms of bf16;
// see grad_weight_sm90.cuh.
std::vector<Kernel> grad_weight_sm90_kernels();

void load_grad_weight_sm90();

// Rows of x gathered to a dense [rows, taps * c_in] block, chunk by chunk, and one dense product
// for each.
std::vector<Kernel> explicit_kernels();

}  // namespace voxgemm::cuda
