// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "voxgemm/coords.h"

namespace voxgemm {

// On a CUDA device nothing here waits: in_first and out_first are always there, since whether
// coordinates repeat is not known to the host, and a map of coordinates whose index could not be
// built (too wide a box) has no pairs and negative pairs_per_tap. What the host may wish to know of
// it goes to its `answer`, three numbers of pinned memory or null, while it goes on: pairs of the
// first tap (negative where the map could not be built), rows of in_first and of out_first that
// repeat a voxel. The device writes each number once. On the CPU there is no answer.

// Which input row feeds which output row through which tap, for given coordinates and geometry.
// Shared by every layer and pass that has them in common.
struct VOXGEMM_EXPORT KernelMap {
  Geometry geometry;
  int64_t n_in = 0;
  int64_t n_out = 0;
  // i32 [taps, n_out]: the input row, the lowest one where coordinates repeat, or -1. For a
  // transposed map tap t is still the tap whose weights W[t] the pair multiplies.
  Matrix neighbours;
  // i64 [1, taps]: pairs of each tap.
  Matrix pairs_per_tap;
  // i32 [n, 1], empty where all coordinates of the side are distinct: the lowest row with the same
  // coordinates. Rows that repeat a voxel share its column of `neighbours`.
  Matrix in_first;
  Matrix out_first;
  // Submanifold with odd sizes: the transposed map is the same table with mirrored taps, so it
  // costs nothing.
  bool symmetric = false;
  bool is_transposed = false;
  // i32 [n_out, 1]: bit t says that the row has tap t, bit 31 beyond the taps that inputs of taps
  // adjacent on z are. Made by build_..._map on a CUDA device for up to 32 taps: faster schedules.
  Matrix masks;
  // i64 [1, 1], of a CUDA map: rows of in_first and of out_first that repeat a voxel.
  Matrix in_repeats;
  Matrix out_repeats;

  int taps() const { return geometry.taps(); }
  // The sum of pairs_per_tap. Waits for a CUDA device, and throws where its map could not be built.
  int64_t pairs(const Context& ctx) const;
};

// out = in; geometry must have stride 1 (Geometry::submanifold). coords is read. O(n * taps) time,
// 4 * taps bytes a voxel. n = 0 gives an empty map. index: of the same coordinates.
VOXGEMM_EXPORT KernelMap build_submanifold_map(const Context& ctx,
                                               const MatrixRef& coords,
                                               const Geometry& geometry,
                                               int64_t* answer = nullptr);
VOXGEMM_EXPORT KernelMap build_submanifold_map(const Context& ctx,
                                               const VoxelIndex& index,
                                               const MatrixRef& coords,
                                               const Geometry& geometry,
                                               int64_t* answer = nullptr);

// Any geometry between two coordinate sets: in(o, t) = row of out * stride - padding + tap *
// dilation.
VOXGEMM_EXPORT KernelMap build_kernel_map(const Context& ctx,
                                          const MatrixRef& in_coords,
                                          const MatrixRef& out_coords,
                                          const Geometry& geometry,
                                          int64_t* answer = nullptr);

// Nothing on the CPU. On a CUDA device waits: throws where the map could not be built, and
// empties in_first and out_first where nothing repeats, which saves grad_input the merging of
// repeated rows.
VOXGEMM_EXPORT void settle(const Context& ctx, KernelMap* map);

// The same pairs with the sides exchanged: what a transposed (inverse) convolution runs on, and the
// backward of any. Transposing twice gives the map back.
VOXGEMM_EXPORT KernelMap transpose(const Context& ctx, const KernelMap& map);

}  // namespace voxgemm
