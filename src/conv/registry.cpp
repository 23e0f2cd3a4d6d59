// SPDX-License-Identifier: Apache-2.0
#include "conv/kernel.h"
#include "cpu/kernels.h"

namespace voxgemm {

const std::vector<Kernel>& registry() {
  static const std::vector<Kernel> kernels = [] {
    std::vector<Kernel> all = cpu::kernels();
    return all;
  }();
  return kernels;
}

}  // namespace voxgemm
