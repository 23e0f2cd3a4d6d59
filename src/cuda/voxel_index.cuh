// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "conv/coords.h"
#include "conv/reach.h"
#include "cuda/aligned.h"
#include "cuda/block_set.cuh"
#include "cuda/launch.cuh"

namespace voxgemm::cuda {

// i32 [n, 4] coordinates for kernels: data[row]. Made of what aligned_input() gives.
using Coords = View<const int4>;

__device__ inline int4 padding_row() { return make_int4(padding_batch, 0, 0, 0); }
__device__ inline bool is_padding(const int4& c) { return c.x == padding_batch; }
// What output_coords writes in place of a set that it cannot make is padding, of which the first
// row is (padding_batch, failure_mark, halves of the status). The mark is a number that nobody else
// pads with.
constexpr int32_t failure_mark = -1913471627;
__device__ inline int4 failure_row(Status status) {
  const auto bits = static_cast<uint64_t>(status);
  return make_int4(padding_batch, failure_mark, static_cast<int>(bits),
                   static_cast<int>(bits >> 32));
}
// The status in such a row, `fine` in any other.
__device__ inline Status failure_in(const int4& c) {
  if (!is_padding(c) || c.y != failure_mark) return Status::fine;
  return static_cast<Status>(static_cast<uint64_t>(c.w) << 32 | static_cast<uint32_t>(c.z));
}

// An empty set, at most half full with this many blocks; for an index of so many rows, or without
// rows with a list of its blocks.
struct BlockSetMemory : BlockSet {
  std::shared_ptr<void> memory;
};
BlockSetMemory make_block_set(const Context& ctx, int64_t most_blocks, int64_t rows);

// Status, sizes and frame of a set whose voxels were added; throws what went wrong, a full table
// excepted. Waits for the device.
SetHead read_head(const Context& ctx, const BlockSet& set);
// Throws unless a set of so many rows was made.
void check_made(Status status, int64_t rows);

// Adds what the coordinates reach to an empty set, and ranks its blocks; or sets the status: with
// distinct_will_do `distinct` where the rows ascend.
void fill_set(const Context& ctx,
              const Coords& coords,
              const Reach& reach,
              const BlockSet& set,
              bool distinct_will_do = false);

// The set of a coordinate matrix and the lowest row of every voxel, about 45 bytes a row. Built
// without waiting for the device: what goes wrong is found by the first read of a size.
class BlockIndex final : public VoxelIndex::State {
 public:
  BlockIndex(const Context& ctx, const MatrixRef& coords, bool distinct_will_do = false);

  // Wait for the device.
  int64_t unique_voxels() const override;
  int32_t find(int32_t batch, int32_t x, int32_t y, int32_t z) const override;

  const BlockSet& set() const { return set_; }

 private:
  Context ctx_;
  BlockSetMemory set_;
};

// As of an index that is made for it. Costs little where the rows ascend, as those that
// output_coords gives do.
Matrix first_rows(const Context& ctx, const MatrixRef& coords);

}  // namespace voxgemm::cuda
