// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <optional>

#include "voxgemm/context.h"
#include "voxgemm/geometry.h"

namespace voxgemm {

// A table of keys and their values in two matrices of the caller. Keys and values are 32 or 64 bits
// (i32 or i64, taken as unsigned). A table of all ones (every byte 0xff) is empty; the key of all
// ones cannot be stored, and as a value it is what a look-up gives for a missing key. Which slot
// holds what is nobody's business but insert's and look-up's: keys stand in ascending order, so
// that nothing depends on timing, any load up to 100 % costs the same, and no look-up takes more
// than log2(slots) + 1 steps.
struct HashTableRef {
  MatrixRef keys;    // [slots, 1]
  MatrixRef values;  // [slots, 1]
};

// Adds keys [n, 1] (dtype of the table's) with values [n, 1] (dtype of the table's), or with their
// row numbers. Of equal keys the lowest row counts; a key that the table already has gets the new
// value. Does not wait for a CUDA device. Returns i64 [1, 2] on the context's device: the distinct
// keys, old and new, and the first row whose key is all ones, or -1 (always -1 with skip_empty,
// which passes such rows over). Where there are more keys than slots, or such a row, the table is
// left as it was. Keys and values may not overlap the table.
struct HashInsert {
  MatrixRef keys;
  std::optional<MatrixRef> values;
  bool skip_empty = false;
};
VOXGEMM_EXPORT Matrix hash_insert(const Context& ctx,
                                  const HashTableRef& table,
                                  const HashInsert& insert);
// Throws what went wrong in an insert, of its result. Waits for a CUDA device.
VOXGEMM_EXPORT void check_hash_insert(const Context& ctx,
                                      const HashTableRef& table,
                                      const MatrixRef& status);

// values[i] = the value of keys[i], all ones where the table does not have it. keys: [n, 1], dtype
// of the table's, read. values: [n, 1], dtype of the table's, contiguous, written; it overlaps
// neither.
VOXGEMM_EXPORT void hash_lookup(const Context& ctx,
                                const HashTableRef& table,
                                const MatrixRef& keys,
                                const MatrixRef& values);

// keys[r] = ((batch * shape_x + x) * shape_y + y) * shape_z + z, all ones outside the shape and
// where the number does not fit. coords: i32 [n, 4], read. keys: i32 or i64 [n, 1], contiguous,
// written.
VOXGEMM_EXPORT void voxel_keys(const Context& ctx,
                               const MatrixRef& coords,
                               const Int3& shape,
                               const MatrixRef& keys);

}  // namespace voxgemm
