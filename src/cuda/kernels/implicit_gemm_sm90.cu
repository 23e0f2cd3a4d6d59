// SPDX-License-Identifier: Apache-2.0
// Compiled once for each arithmetic.
#include "cuda/kernels/implicit_gemm_sm90_launch.cuh"
#include "cuda/load.cuh"

namespace voxgemm::cuda::sm90 {

template void convolve<Math::VOXGEMM_MATH>(
    const Context&, const ConvArgs&, const ConvArgs&, int, const Slicing&);

template <Math math>
void load_convolve() {
  load(finish_rows<typename Config<math, shapes[0], true>::Result>);
}

template void load_convolve<Math::VOXGEMM_MATH>();

}  // namespace voxgemm::cuda::sm90
