// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "core/host_device.h"
#include "voxgemm/hash_table.h"

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
struct HashSlots {
  K* keys;    // [count]
  V* values;  // [count]
  int64_t count;

  explicit HashSlots(const HashTableRef& table)
      : keys(table.keys.as<K>()), values(table.values.as<V>()), count(table.keys.rows) {}
};

// What hash_lookup() does with a row.
template <class K, class V>
struct HashLookup {
  HashSlots<K, V> table;
  const K* keys;  // [rows]
  V* values;      // [rows]

  VOXGEMM_HOST_DEVICE void operator()(int64_t row) const {
    const K key = keys[row];
    const int64_t slot = hash_slot(table.keys, table.count, key);
    const bool found = key != static_cast<K>(-1) && slot < table.count && table.keys[slot] == key;
    values[row] = found ? table.values[slot] : static_cast<V>(-1);
  }
};

// Numbers of the voxels of batches of a box, row by row.
template <class K>
struct VoxelNumbers {
  static constexpr K empty = static_cast<K>(-1);

  const int32_t* coords;  // [rows, 4]
  K* keys;                // [rows]
  uint64_t shape[3];
  uint64_t batches = empty;  // whose numbers all fit

  VoxelNumbers(const MatrixRef& voxels, const Int3& extent, const MatrixRef& numbers)
      : coords(voxels.as<int32_t>()),
        keys(numbers.as<K>()),
        shape{static_cast<uint64_t>(extent[0]), static_cast<uint64_t>(extent[1]),
              static_cast<uint64_t>(extent[2])} {
    for (const uint64_t extent_on_axis : shape) {
      batches = extent_on_axis == 0 ? 0 : batches / extent_on_axis;
    }
  }
  VOXGEMM_HOST_DEVICE void operator()(int64_t row) const {
    uint64_t place[4];
    // A negative number is a huge one here.
    for (int i = 0; i < 4; ++i) place[i] = static_cast<uint64_t>(int64_t{coords[4 * row + i]});
    const bool inside =
        place[0] < batches && place[1] < shape[0] && place[2] < shape[1] && place[3] < shape[2];
    const uint64_t number =
        ((place[0] * shape[0] + place[1]) * shape[1] + place[2]) * shape[2] + place[3];
    keys[row] = inside ? static_cast<K>(number) : empty;
  }
};

}  // namespace voxgemm
