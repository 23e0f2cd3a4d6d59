// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "voxgemm/context.h"

namespace voxgemm {

// For programs without torch: a context on CUDA device `index` with a stream and a memory pool of
// its own, both released with the last copy of the context and the last memory it gave. Throws
// Error(device) where there is no such device.
VOXGEMM_EXPORT Context cuda_context(int index = 0);

// Waits for everything in the context's stream. Errors of earlier work on the device throw here.
VOXGEMM_EXPORT void synchronize(const Context& cuda);

// Copies `from` to `to`, of the same shape and dtype, each on the host or on the context's device.
// Returns once `from` may change and `to` may be read, unless both are on the device.
VOXGEMM_EXPORT void copy(const Context& cuda, const MatrixRef& from, const MatrixRef& to);

}  // namespace voxgemm
