// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <limits>
#include <memory>
#include <optional>

#include "voxgemm/context.h"
#include "voxgemm/geometry.h"

namespace voxgemm {

// Coordinates are i32 [n, 4] matrices, contiguous: (batch, x, y, z) per row, in any order. Any
// int32 is legal, negative ones included; only a set whose extents need more than 63 bits when
// counted in bricks of 8^3 voxels is an error. Duplicates are legal: a look-up finds the lowest
// row.

// A row with this batch number is padding: no voxel, whatever its other numbers. No look-up finds
// it, it has no pairs in a map, and no output is made of it. So coordinate sets of different sizes
// can stand in matrices of one size, as a CUDA graph that is replayed needs it.
constexpr int32_t padding_batch = std::numeric_limits<int32_t>::min();

// Membership and row numbers of a coordinate set: one 512-bit bitmap per occupied brick of 8^3
// voxels, the running count of voxels before it, and a row number per voxel in brick order (bricks
// in an order of their own, voxels inside by position). It keeps no reference to the coordinates.
// One that was moved from may only be destroyed or assigned to.
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

// Distinct coordinates in order of first appearance, padding left out.
struct UniqueCoords {
  Matrix coords;     // i32 [m, 4]
  Matrix first_row;  // i32 [m, 1]: lowest input row of each
  Matrix inverse;    // i32 [n, 1]: which of the m each input row became, -1 of padding
};
// coords: i32 [n, 4], read. n = 0 gives m = 0.
VOXGEMM_EXPORT UniqueCoords unique(const Context& ctx, const MatrixRef& coords);

struct OutputOptions {
  OutputRule rule = OutputRule::reached;
  // With one only outputs inside geometry.out_shape(shape) are kept (rule `reached`); without,
  // every reached voxel counts, negative coordinates included.
  std::optional<Int3> spatial_shape = std::nullopt;
  // With it the result has exactly so many rows, behind the voxels padding, and a CUDA device is
  // not waited for. More voxels than that are an error: the CPU throws it; on a CUDA device the
  // rows are all padding, and so is what output_coords makes of them, and a map from or to such
  // rows has no pairs: settle() and KernelMap::pairs() throw what went wrong. There the output
  // voxels may span 2^37 bricks of 8^3 voxels.
  std::optional<int64_t> max_voxels = std::nullopt;
};

// The output voxels of a strided convolution, distinct, in ascending (batch, x, y, z) order.
// coords: i32 [n, 4], read. n = 0 gives no voxels. Without max_voxels a CUDA device is waited for,
// since their number depends on the data.
VOXGEMM_EXPORT Matrix output_coords(const Context& ctx,
                                    const MatrixRef& coords,
                                    const Geometry& geometry,
                                    const OutputOptions& options = {});

// Throws unless coords is a contiguous i32 [n, 4] matrix with n < 2^31, and, where given, every
// batch number is in [0, batch_size) and every coordinate in [0, spatial_shape), padding excepted.
// The message names the first offending row.
VOXGEMM_EXPORT void validate_coords(const Context& ctx,
                                    const MatrixRef& coords,
                                    const std::optional<Int3>& spatial_shape,
                                    std::optional<int64_t> batch_size);

}  // namespace voxgemm
