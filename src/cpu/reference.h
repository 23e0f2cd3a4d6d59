// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "conv/kernel.h"

namespace voxgemm::cpu {

// The judge of every other kernel: three loops, sums in double, one rounding, any dtype, no
// schedule.
Kernel reference_kernel();

}  // namespace voxgemm::cpu
