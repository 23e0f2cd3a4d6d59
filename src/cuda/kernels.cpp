// SPDX-License-Identifier: Apache-2.0
#include "conv/passes.h"
#include "cuda/device.h"
#include "cuda/kernels/families.h"
#include "cuda/kernels/families_sm90.h"

namespace voxgemm::cuda {

std::vector<Kernel> kernels() {
  std::vector<Kernel> rows;
  for (const auto& family : {naive_kernels(), implicit_gemm_sm90_kernels(), sm80_kernels(),
                             grad_weight_sm90_kernels()}) {
    rows.insert(rows.end(), family.begin(), family.end());
  }
  return rows;
}

void load_kernels(const Device& device) {
  const DeviceGuard guard(device);
  const bool is_hopper = architecture(device) / 10 == 9;
  // Loading takes memory, which a capture on another thread or this one need not know of.
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  check_cuda(cudaThreadExchangeStreamCaptureMode(&mode), "cudaThreadExchangeStreamCaptureMode");
  for (const sm80::Math math : sm80::all_math) {
    sm80::dispatch(math, [&]<sm80::Math known>() {
      sm80::load_convolve<known>();
      if constexpr (known != sm80::Math::ieee) {
        if (is_hopper) sm90::load_convolve<known>();
      }
    });
  }
  if (is_hopper) load_grad_weight_sm90();
  check_cuda(cudaThreadExchangeStreamCaptureMode(&mode), "cudaThreadExchangeStreamCaptureMode");
}

}  // namespace voxgemm::cuda
