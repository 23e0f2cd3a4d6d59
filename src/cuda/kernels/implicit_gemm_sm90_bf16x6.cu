// SPDX-License-Identifier: Apache-2.0
#include "cuda/kernels/implicit_gemm_sm90_launch.cuh"

namespace voxgemm::cuda::sm90 {

template void convolve<Math::bf16x6>(
    const Context&, const ConvArgs&, const ConvArgs&, int, const Slicing&);

}  // namespace voxgemm::cuda::sm90
