// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "conv/coords.h"
#include "cpu/brick_set.h"

namespace voxgemm::cpu {

// The bricks of a coordinate set and the lowest row of every voxel, in the order of the bricks'
// ranks.
class BrickIndex final : public VoxelIndex::State {
 public:
  BrickIndex(const Context& ctx, const MatrixRef& coords);

  int64_t unique_voxels() const override { return bricks_.voxels(); }
  int32_t find(int32_t batch, int32_t x, int32_t y, int32_t z) const override;

  const BrickSet& bricks() const { return bricks_; }
  // [unique_voxels + 1]: the row of each rank, counted from 1; entry 0 is -1, for the absent.
  const int32_t* row_of_rank() const { return row_of_rank_.data(); }
  // Writes the lowest row with the same coordinates to rows[first .. last), nothing of padding.
  void first_rows(const MatrixRef& coords, int64_t first, int64_t last, int32_t* rows) const;
  // i32 [n, 1]: find() of all rows; empty where all coordinates are distinct.
  Matrix first_rows(const Context& ctx, const MatrixRef& coords) const;

 private:
  BrickSet bricks_;
  Buffer<int32_t> row_of_rank_;
};

// The smallest box with all voxels of coords, an empty one if there are none.
Box bounds(const Context& ctx, const MatrixRef& coords);

// Rows handled by one task where a row costs some nanoseconds.
constexpr int64_t rows_per_task = 4096;

// Runs body(i) for every i below `items`, `piece` of them a task.
template <class Body>
void for_each(const Context& ctx, int64_t items, const Body& body, int64_t piece = rows_per_task) {
  for_pieces(ctx, items, piece, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) body(i);
  });
}

}  // namespace voxgemm::cpu
