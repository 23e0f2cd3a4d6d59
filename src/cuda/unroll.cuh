// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace voxgemm::cuda {

// body(0), .. body(count - 1), one behind the other: what is indexed by them may be in registers.
template <int count, class Body>
__device__ inline void unroll(const Body& body) {
#pragma unroll
  for (int i = 0; i < count; ++i) body(i);
}

}  // namespace voxgemm::cuda
