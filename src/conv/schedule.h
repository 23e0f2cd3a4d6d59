// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "core/host_device.h"
#include "voxgemm/schedule.h"

namespace voxgemm {

// The place of a mask in the reflected Gray code.
VOXGEMM_HOST_DEVICE inline uint32_t gray_rank(uint32_t mask) {
  for (int shift = 1; shift < 32; shift *= 2) mask ^= mask >> shift;
  return mask;
}
VOXGEMM_HOST_DEVICE inline uint32_t gray_mask(uint32_t rank) { return rank ^ (rank >> 1); }

namespace cuda {

// Schedule::build by mask or by tap on a CUDA device, options checked.
ScheduleParts build_schedule(const Context& ctx,
                             const KernelMap& map,
                             const ScheduleOptions& options);

}  // namespace cuda
}  // namespace voxgemm
