// SPDX-License-Identifier: Apache-2.0
#include "conv/items.h"

#include "cpu/brick_set.h"
#include "cpu/voxel_index.h"

namespace voxgemm::cpu {

void for_items(const Context& ctx, int64_t count, const Item& item) {
  std::visit([&](const auto& body) { for_each(ctx, count, body); }, item);
}

}  // namespace voxgemm::cpu
