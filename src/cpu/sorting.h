// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "voxgemm/context.h"

namespace voxgemm::cpu {

struct KeyedRow {
  uint64_t key;
  uint32_t row;
};

// Sorts by key, stable. The memory of `rows` may be exchanged for another. The order does not
// depend on the number of threads.
void sort_rows(const Context& ctx, std::shared_ptr<KeyedRow[]>* rows, int64_t count);

// Room for `count` of them from the context's memory.
std::shared_ptr<KeyedRow[]> make_keyed_rows(const Context& ctx, int64_t count);

}  // namespace voxgemm::cpu
