// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cuda/launch.cuh"

namespace voxgemm::cuda {

// Threads for a loop over items: enough to fill the device, so that a block of threads that ends
// with something costly (a global count) does so rarely.
Grid over(const Context& ctx, int64_t items);

template <class Body>
__global__ void run_each(int64_t count, Body body) {
  for (int64_t i = thread_index(); i < count; i += thread_count()) body(i);
}
// Calls body(i), a lambda of device code that captures by value, for every i below count.
template <class Body>
void for_each(const Context& ctx, int64_t count, const Body& body) {
  launch(ctx, over(ctx, count), run_each<Body>, count, body);
}

}  // namespace voxgemm::cuda
