// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "voxgemm/kernel_map.h"

namespace voxgemm {

// What an index of one backend answers; each backend derives its own.
struct VoxelIndex::State {
  explicit State(int64_t n) : rows(n) {}
  State(const State&) = delete;
  State& operator=(const State&) = delete;
  virtual ~State() = default;
  virtual int64_t unique_voxels() const = 0;
  virtual int32_t find(int32_t batch, int32_t x, int32_t y, int32_t z) const = 0;

  const int64_t rows;  // of the coordinates
};

// The public functions of coords.h and kernel_map.h without their argument checks. On a CUDA device
// results are the CPU's, bit for bit, with one difference: in_first and out_first of a map are
// always there. src/no_cuda stands for cuda where that is not built.
namespace cpu {

// Without regard to max_voxels: src/conv pads.
Matrix output_coords(const Context& ctx,
                     const MatrixRef& coords,
                     const Geometry& geometry,
                     const OutputOptions& options);
// The lowest row with a value that as an unsigned number is not below its column's limit, padding
// excepted; n if there is none.
int64_t first_row_outside(const Context& ctx,
                          const MatrixRef& coords,
                          const std::array<int64_t, 4>& limits);
std::unique_ptr<VoxelIndex::State> make_index(const Context& ctx, const MatrixRef& coords);
// i32 [n, 1]: of coordinates and their index the lowest row of every row's voxel; of padding
// anything.
Matrix first_rows(const Context& ctx, const VoxelIndex::State& index, const MatrixRef& coords);
// In place: sums[i] = sums[0] + ... + sums[i - 1].
void exclusive_sums(const Context& ctx, uint32_t* sums, int64_t count);
// These fill in a map that has its shape and its tables' memory; on CUDA with three words more
// behind pairs_per_tap. index: null where there is none yet. answer: CUDA only.
void fill_submanifold_map(const Context& ctx,
                          const VoxelIndex::State* index,
                          const MatrixRef& coords,
                          KernelMap* map,
                          int64_t* answer);
void fill_kernel_map(const Context& ctx,
                     const MatrixRef& in_coords,
                     const MatrixRef& out_coords,
                     KernelMap* map,
                     int64_t* answer);
void fill_transposed(const Context& ctx, const KernelMap& map, KernelMap* result);

}  // namespace cpu
namespace cuda {

// These wait for the device.
void read_back(const Context& ctx, const void* device, void* host, size_t bytes);
decltype(cpu::first_row_outside) first_row_outside;
// Does not wait. unique_voxels() and find() of the index do, and throw what went wrong: a box that
// is too large, or a full table.
decltype(cpu::make_index) make_index;
decltype(cpu::first_rows) first_rows;
decltype(cpu::exclusive_sums) exclusive_sums;
// Waits once, a second time where the first table was too small; with max_voxels never.
decltype(cpu::output_coords) output_coords;
// These do not wait. Where the index of the input side could not be built, all pairs are absent and
// every entry of pairs_per_tap is negative; check_built() throws then.
decltype(cpu::fill_submanifold_map) fill_submanifold_map;
decltype(cpu::fill_kernel_map) fill_kernel_map;
decltype(cpu::fill_transposed) fill_transposed;
// Throws where the pairs of its first tap say that the map could not be built.
void check_built(const KernelMap& map, int64_t first_pairs);

}  // namespace cuda
}  // namespace voxgemm
