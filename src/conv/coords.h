// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "voxgemm/kernel_map.h"

namespace voxgemm {

// What an index of one backend answers; each backend derives its own.
struct VoxelIndex::State {
  State() = default;
  State(const State&) = delete;
  State& operator=(const State&) = delete;
  virtual ~State() = default;
  virtual int64_t rows() const = 0;
  virtual int64_t unique_voxels() const = 0;
  virtual int32_t find(int32_t batch, int32_t x, int32_t y, int32_t z) const = 0;
};

// The public functions of coords.h and kernel_map.h without their argument checks.
namespace cpu {

// The lowest row with a value outside [0, limit) of its column, where that has a limit; n if there
// is none.
int64_t first_row_outside(const Context& ctx,
                          const MatrixRef& coords,
                          const std::array<std::optional<int64_t>, 4>& limits);
std::unique_ptr<VoxelIndex::State> make_index(const Context& ctx, const MatrixRef& coords);
UniqueCoords unique(const Context& ctx, const MatrixRef& coords);
Matrix output_coords(const Context& ctx,
                     const MatrixRef& coords,
                     const Geometry& geometry,
                     OutputRule rule,
                     const std::optional<Int3>& spatial_shape);
KernelMap build_submanifold_map(const Context& ctx,
                                const VoxelIndex& index,
                                const MatrixRef& coords,
                                const Geometry& geometry);
KernelMap build_kernel_map(const Context& ctx,
                           const MatrixRef& in_coords,
                           const MatrixRef& out_coords,
                           const Geometry& geometry);
KernelMap transpose(const Context& ctx, const KernelMap& map);

}  // namespace cpu
}  // namespace voxgemm
