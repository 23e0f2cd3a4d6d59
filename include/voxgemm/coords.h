// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <memory>
#include <optional>

#include "voxgemm/context.h"
#include "voxgemm/geometry.h"

namespace voxgemm {

// Coordinates are i32 [n, 4] matrices, contiguous: (batch, x, y, z) per row, in any order. Any
// int32 is legal, negative ones included; only a set whose extents need more than 63 bits when
// counted in bricks of 8^3 voxels is an error. Duplicates are legal: a look-up finds the lowest
// row.

// Membership and row numbers of a coordinate set: one 512-bit bitmap per occupied brick of 8^3
// voxels, the running count of voxels before it, and a row number per voxel in brick order (bricks
// in an order of their own, voxels inside by position). It keeps no reference to the coordinates.
class VOXGEMM_EXPORT VoxelIndex {
 public:
  // coords: i32 [n, 4], read. Costs O(n) time, 4 bytes a voxel, 96 a brick, and to find bricks at
  // most 16 bytes a voxel, or 64 a brick where bricks are far apart.
  VoxelIndex(const Context& ctx, const MatrixRef& coords);
  ~VoxelIndex();
  VoxelIndex(VoxelIndex&&) noexcept;
  VoxelIndex& operator=(VoxelIndex&&) noexcept;

  int64_t rows() const;           // n
  int64_t unique_voxels() const;  // distinct coordinates
  // The lowest row with these coordinates, or -1.
  int32_t find(int32_t batch, int32_t x, int32_t y, int32_t z) const;

  struct State;
  const State& state() const { return *state_; }

 private:
  std::unique_ptr<State> state_;
};

// Distinct coordinates in order of first appearance.
struct UniqueCoords {
  Matrix coords;     // i32 [m, 4]
  Matrix first_row;  // i32 [m, 1]: lowest input row of each
  Matrix inverse;    // i32 [n, 1]: which of the m each input row became
};
// coords: i32 [n, 4], read. n = 0 gives m = 0.
VOXGEMM_EXPORT UniqueCoords unique(const Context& ctx, const MatrixRef& coords);

// The output voxels of a strided convolution, distinct, in ascending (batch, x, y, z) order.
// With a spatial shape only outputs inside geometry.out_shape(shape) are kept (rule `reached`);
// without one every reached voxel counts, negative coordinates included. coords: i32 [n, 4], read.
// n = 0 gives 0 rows.
VOXGEMM_EXPORT Matrix output_coords(const Context& ctx,
                                    const MatrixRef& coords,
                                    const Geometry& geometry,
                                    OutputRule rule,
                                    const std::optional<Int3>& spatial_shape = std::nullopt);

// Throws unless coords is a contiguous i32 [n, 4] matrix with n < 2^31, and, where given, every
// batch number is in [0, batch_size) and every coordinate in [0, spatial_shape). The message names
// the first offending row.
VOXGEMM_EXPORT void validate_coords(const Context& ctx,
                                    const MatrixRef& coords,
                                    const std::optional<Int3>& spatial_shape,
                                    std::optional<int64_t> batch_size);

}  // namespace voxgemm
