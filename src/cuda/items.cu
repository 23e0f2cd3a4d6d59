// SPDX-License-Identifier: Apache-2.0
#include "conv/items.h"

#include "cuda/launch.cuh"

namespace voxgemm::cuda {

void for_items(const Context& ctx, int64_t count, const Item& item) {
  std::visit([&](const auto& body) { for_each(ctx, count, body); }, item);
}

}  // namespace voxgemm::cuda
