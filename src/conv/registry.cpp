// SPDX-License-Identifier: Apache-2.0
#include "conv/kernel.h"

namespace voxgemm {

const std::vector<Kernel>& registry(DeviceKind kind) {
  static const std::vector<Kernel> of_cpu = cpu::kernels();
  static const std::vector<Kernel> of_cuda = cuda::kernels();
  return kind == DeviceKind::cuda ? of_cuda : of_cpu;
}

}  // namespace voxgemm
