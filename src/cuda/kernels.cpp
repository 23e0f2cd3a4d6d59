// SPDX-License-Identifier: Apache-2.0
#include "conv/kernel.h"
#include "cuda/kernels/explicit.h"
#include "cuda/kernels/grad_weight_sm80.h"
#include "cuda/kernels/grad_weight_sm90.h"
#include "cuda/kernels/implicit_gemm_sm80.h"
#include "cuda/kernels/implicit_gemm_sm90.h"
#include "cuda/kernels/naive.h"

namespace voxgemm::cuda {

std::vector<Kernel> kernels() {
  std::vector<Kernel> rows;
  for (const Kernel& kernel : naive_kernels()) rows.push_back(kernel);
  for (const Kernel& kernel : implicit_gemm_sm90_kernels()) rows.push_back(kernel);
  for (const Kernel& kernel : implicit_gemm_sm80_kernels()) rows.push_back(kernel);
  for (const Kernel& kernel : grad_weight_sm80_kernels()) rows.push_back(kernel);
  for (const Kernel& kernel : grad_weight_sm90_kernels()) rows.push_back(kernel);
  for (const Kernel& kernel : explicit_kernels()) rows.push_back(kernel);
  return rows;
}

}  // namespace voxgemm::cuda
