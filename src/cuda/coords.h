// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "conv/coords.h"

// The public functions of coords.h and kernel_map.h on a CUDA device, without their argument
// checks. Results are the CPU's, bit for bit, with one difference: in_first and out_first of a map
// are always there, because whether coordinates repeat is not known without waiting for the device.
namespace voxgemm::cuda {

// Waits for the device.
int64_t first_row_outside(const Context& ctx,
                          const MatrixRef& coords,
                          const std::array<std::optional<int64_t>, 4>& limits);
// Does not wait. unique_voxels() and find() of the index do, and throw what went wrong: a box that
// is too large, or a full table.
std::unique_ptr<VoxelIndex::State> make_index(const Context& ctx, const MatrixRef& coords);
// Waits once.
UniqueCoords unique(const Context& ctx, const MatrixRef& coords);
// Waits once, a second time where the first table was too small.
Matrix output_coords(const Context& ctx,
                     const MatrixRef& coords,
                     const Geometry& geometry,
                     OutputRule rule,
                     const std::optional<Int3>& spatial_shape);

// These do not wait. Where the index of the input side could not be built, all pairs are absent and
// every entry of pairs_per_tap is negative; count_pairs() throws then.
KernelMap build_submanifold_map(const Context& ctx,
                                const VoxelIndex::State& index,
                                const MatrixRef& coords,
                                const Geometry& geometry);
KernelMap build_kernel_map(const Context& ctx,
                           const MatrixRef& in_coords,
                           const MatrixRef& out_coords,
                           const Geometry& geometry);
KernelMap transpose(const Context& ctx, const KernelMap& map);

// The sum of pairs_per_tap; throws where the map could not be built. Waits for the device.
int64_t count_pairs(const Context& ctx, const KernelMap& map);

}  // namespace voxgemm::cuda
