// SPDX-License-Identifier: Apache-2.0
#include "cuda/kernels/grad_weight_sm80_launch.cuh"

namespace voxgemm::cuda::sm80 {

template void grad_weight<Math::bf16>(const Context&, const GradVariant&, const ConvArgs&);

}  // namespace voxgemm::cuda::sm80
