// SPDX-License-Identifier: Apache-2.0
#include "conv/schedule.h"
#include "voxgemm/error.h"

namespace voxgemm::cuda {

ScheduleParts build_schedule(const Context&, const KernelMap&, const ScheduleOptions&) {
  fail(ErrorCode::unsupported, true, "schedules are not built on the device yet");
}

}  // namespace voxgemm::cuda
