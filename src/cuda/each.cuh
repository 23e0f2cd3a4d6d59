// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cuda/launch.cuh"

namespace voxgemm::cuda {

// Threads for a loop over items: enough to fill the device, so that a block of threads that ends
// with something costly (a global count) does so rarely.
Grid over(const Context& ctx, int64_t items);

// Calls body(i), a lambda of device code that captures by value, for every i below count.
template <class Body>
__global__ void run_each(int64_t count, Body body) {
  for (int64_t i = thread_index(); i < count; i += thread_count()) body(i);
}
template <class Body>
void for_each(const Context& ctx, int64_t count, const Body& body) {
  launch(ctx, over(ctx, count), run_each<Body>, count, body);
}

// Calls body(i, known()), where known() is asked once a thread.
template <class Known, class Body>
__global__ void run_each_knowing(int64_t count, Known known, Body body) {
  const auto fact = known();
  for (int64_t i = thread_index(); i < count; i += thread_count()) body(i, fact);
}
template <class Known, class Body>
void for_each(const Context& ctx, int64_t count, const Known& known, const Body& body) {
  launch(ctx, over(ctx, count), run_each_knowing<Known, Body>, count, known, body);
}

}  // namespace voxgemm::cuda
