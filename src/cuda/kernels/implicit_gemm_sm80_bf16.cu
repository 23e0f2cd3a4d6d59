// SPDX-License-Identifier: Apache-2.0
#include "cuda/kernels/implicit_gemm_sm80_launch.cuh"

namespace voxgemm::cuda::sm80 {

template void convolve<Math::bf16>(const Context&, const ConvVariant&, const ConvArgs&);

}  // namespace voxgemm::cuda::sm80
