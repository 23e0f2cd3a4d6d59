// SPDX-License-Identifier: Apache-2.0
#include "cuda/kernels/families.h"

namespace voxgemm::cuda {

std::vector<Kernel> kernels() {
  std::vector<Kernel> rows;
  for (const auto& family : {naive_kernels(), implicit_gemm_sm90_kernels(), sm80_kernels(),
                             grad_weight_sm90_kernels(), explicit_kernels()}) {
    rows.insert(rows.end(), family.begin(), family.end());
  }
  return rows;
}

}  // namespace voxgemm::cuda
