// SPDX-License-Identifier: Apache-2.0
// Compiled once for each arithmetic.
#include "cuda/kernels/implicit_gemm_sm90_launch.cuh"

namespace voxgemm::cuda::sm90 {

template void convolve<Math::VOXGEMM_MATH>(
    const Context&, const ConvArgs&, const ConvArgs&, int, const Slicing&);

}  // namespace voxgemm::cuda::sm90
