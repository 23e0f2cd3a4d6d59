// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "core/host_device.h"
#include "voxgemm/coords.h"

namespace voxgemm {

// What unique() does with a row: marks it where its voxel is met first; then, once the marks are
// numbers, sums of those before each row, writes it.
struct DistinctMarks {
  const int32_t* coords;  // [rows, 4]
  const int32_t* first;   // [rows]: lowest row of the same voxel
  uint32_t* marks;        // [rows]

  DistinctMarks(const MatrixRef& voxels, const MatrixRef& lowest, const MatrixRef& numbers)
      : coords(voxels.as<int32_t>()), first(lowest.as<int32_t>()), marks(numbers.as<uint32_t>()) {}
  VOXGEMM_HOST_DEVICE void operator()(int64_t row) const {
    marks[row] = coords[4 * row] != padding_batch && first[row] == row ? 1 : 0;
  }
};
struct DistinctRows : DistinctMarks {
  int32_t* voxels;     // [distinct, 4]
  int32_t* first_row;  // [distinct]
  int32_t* inverse;    // [rows]

  DistinctRows(const MatrixRef& coords,
               const MatrixRef& lowest,
               const MatrixRef& numbers,
               const UniqueCoords& result)
      : DistinctMarks(coords, lowest, numbers),
        voxels(result.coords.as<int32_t>()),
        first_row(result.first_row.as<int32_t>()),
        inverse(result.inverse.as<int32_t>()) {}
  VOXGEMM_HOST_DEVICE void operator()(int64_t row) const {
    // All loads before the first store, which might change what they read as far as it is known.
    const int32_t* c = coords + 4 * row;
    const int32_t voxel[4] = {c[0], c[1], c[2], c[3]};
    const int32_t lowest = voxel[0] == padding_batch ? -1 : first[row];
    const auto number = lowest < 0 ? -1 : static_cast<int32_t>(marks[lowest]);
    inverse[row] = number;
    if (lowest != row) return;
    first_row[number] = lowest;
    for (int64_t i = 0; i < 4; ++i) voxels[4 * int64_t{number} + i] = voxel[i];
  }
};

}  // namespace voxgemm
