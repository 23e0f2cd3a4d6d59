// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "voxgemm/schedule.h"

namespace voxgemm::cuda {

// Schedule::build by mask or by tap on a CUDA device, options checked.
ScheduleParts build_schedule(const Context& ctx,
                             const KernelMap& map,
                             const ScheduleOptions& options);

}  // namespace voxgemm::cuda
