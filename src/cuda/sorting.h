// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "voxgemm/context.h"

namespace voxgemm::cuda {

// The toolkit's radix sort and prefix sum on device memory, in one translation unit because they
// compile slowly.

// Keys, uint32_t or uint64_t, and the numbers that go with them.
template <class Key>
struct SortArrays {
  Key* keys;
  Key* sorted_keys;
  uint32_t* numbers;
  uint32_t* sorted_numbers;
};
// Sorts by the low `bits` bits of the keys, stable; all four arrays are apart.
template <class Key>
void sort_by_key(const Context& ctx, const SortArrays<Key>& arrays, int64_t count, int bits);

// Keys alone, uint64_t or of 128 bits.
template <class Key>
void sort_keys(const Context& ctx, const Key* keys, Key* sorted, int64_t count, int bits);

// Of rows of equal keys, which stand together, the first: keys and numbers into the sorted_ arrays,
// and how many there are.
template <class Key>
void first_by_key(const Context& ctx, const SortArrays<Key>& arrays, int64_t n, int64_t* count);

// In place: sums[i] = sums[0] + ... + sums[i - 1].
void exclusive_sums(const Context& ctx, uint32_t* sums, int64_t count);

}  // namespace voxgemm::cuda
