// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>

#include "conv/kernel.h"

namespace voxgemm::cuda {

// Forward on Hopper, and grad_input as a forward over the transposed map, over a by_mask schedule
// in one chunk; see implicit_gemm_sm90.cuh. Not a registry row yet: schedules are built on the CPU
// only.
struct MaskedSchedule {
  ScheduleParts parts;  // on the context's device
  ScheduleOptions options;
};

// How many rows of a schedule's tile the kernel takes; the columns of its tiles follow from c_out.
constexpr int sm90_tile_rows = 128;

// Whether the context's device has the kernel's instructions.
bool is_hopper(const Context& ctx);

// Why the kernel cannot run these operands; empty if it can.
std::string sm90_why_not(const MaskedSchedule& schedule, const ConvArgs& args);

// args.schedule is not read. Takes 4 * (groups - 1) * rows * c_out bytes of workspace.
void sm90_convolve(const Context& ctx, const MaskedSchedule& schedule, const ConvArgs& args);

}  // namespace voxgemm::cuda
