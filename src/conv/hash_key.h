// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "core/host_device.h"
#include "voxgemm/geometry.h"

namespace voxgemm {

// What a hash table does with one key. K is uint32_t or uint64_t; all ones is no key.

// Where a key stands among ascending keys, or would stand: the first slot whose key is not less.
template <class K>
VOXGEMM_HOST_DEVICE inline int64_t hash_slot(const K* keys, int64_t slots, K key) {
  int64_t first = 0;
  while (slots > 0) {
    const int64_t half = slots / 2;
    if (keys[first + half] < key) {
      first += half + 1;
      slots -= half + 1;
    } else {
      slots = half;
    }
  }
  return first;
}

template <class K, class V>
VOXGEMM_HOST_DEVICE inline V hash_value(const K* keys, const V* values, int64_t slots, K key) {
  const int64_t slot = hash_slot(keys, slots, key);
  const bool found = key != static_cast<K>(-1) && slot < slots && keys[slot] == key;
  return found ? values[slot] : static_cast<V>(-1);
}

// Numbers of the voxels of batches of a box.
struct KeyRule {
  uint64_t shape[3];
  uint64_t batches;  // whose numbers all fit

  KeyRule(const Int3& extent, uint64_t empty)
      : shape{static_cast<uint64_t>(extent[0]), static_cast<uint64_t>(extent[1]),
              static_cast<uint64_t>(extent[2])} {
    batches = empty;
    for (const uint64_t extent_on_axis : shape) {
      batches = extent_on_axis == 0 ? 0 : batches / extent_on_axis;
    }
  }
  VOXGEMM_HOST_DEVICE uint64_t key(const int32_t* voxel, uint64_t empty) const {
    const auto batch = static_cast<uint64_t>(static_cast<int64_t>(voxel[0]));
    const auto x = static_cast<uint64_t>(static_cast<int64_t>(voxel[1]));
    const auto y = static_cast<uint64_t>(static_cast<int64_t>(voxel[2]));
    const auto z = static_cast<uint64_t>(static_cast<int64_t>(voxel[3]));
    // A negative number is a huge one here.
    const bool inside = batch < batches && x < shape[0] && y < shape[1] && z < shape[2];
    return inside ? ((batch * shape[0] + x) * shape[1] + y) * shape[2] + z : empty;
  }
};

}  // namespace voxgemm
