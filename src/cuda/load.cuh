// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cuda/device.h"

namespace voxgemm::cuda {

// Loads a kernel's code on the current device, and with it what all kernels of its file share: else
// their first launch does, which takes 1 to 9 ms longer for it (H200). Another kernel of the file
// then takes 0.1 to 0.4 ms the first time. One that cannot be loaded says so when it is launched.
template <class... Parameters>
void load(void (*kernel)(Parameters...)) {
  cudaFuncAttributes found;
  if (cudaFuncGetAttributes(&found, kernel) != cudaSuccess) cudaGetLastError();
}

}  // namespace voxgemm::cuda
