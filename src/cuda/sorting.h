// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "voxgemm/context.h"

namespace voxgemm::cuda {

// Sorts by the low `bits` bits of keys, uint64_t or of 128 bits.
template <class Key>
void sort_keys(const Context& ctx, const Key* keys, Key* sorted, int64_t count, int bits);

}  // namespace voxgemm::cuda
