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
// row is (padding_batch, failure_mark, halves of the status); nobody else pads with the mark.
constexpr int32_t failure_mark = -1913471627;
__device__ inline int4 failure_row(Status status) {
  const auto bits = static_cast<uint64_t>(status);
  return make_int4(padding_batch, failure_mark, int(bits), int(bits >> 32));
}
// The status in such a row, `fine` in any other.
__device__ inline Status failure_in(const int4& c) {
  if (!is_padding(c) || c.y != failure_mark) return Status::fine;
  return static_cast<Status>(static_cast<uint64_t>(c.w) << 32 | static_cast<uint32_t>(c.z));
}

// A set, half full with so many blocks; for an index of so many rows, or with a list of its blocks.
struct BlockSetMemory : BlockSet {
  std::shared_ptr<void> memory;
};
BlockSetMemory make_block_set(const Context& ctx, int64_t most_blocks, int64_t rows);

// Of a set whose voxels were added; throws what went wrong but a full table. Waits for the device.
SetHead read_head(const Context& ctx, const BlockSet& set);
// Throws unless a set of so many rows was made.
void check_made(Status status, int64_t rows);

// What a build of a map counts, and tells the host when it is done.
struct Counts {
  // Pairs of every tap; rows of each side that repeat a voxel, where the sides are one the first
  // alone; a counter that give() needs.
  uint64_t* words = nullptr;  // [taps + 3]
  int taps = 0;
  int sides = 0;
  volatile uint64_t* host = nullptr;  // [3], or null: nobody asks

  __device__ void add(int word, uint64_t count) const { atomicAdd(word_of(words + word), count); }
  // At the end of the last kernel, by all of its threads.
  __device__ void give() const {
    if (host == nullptr) return;
    __threadfence();
    __syncthreads();
    const uint64_t last = gridDim.x * gridDim.y - 1;
    if (threadIdx.x != 0 || atomicAdd(word_of(words + taps + 2), 1) != last) return;
    __threadfence();
    host[0] = __ldcg(words);
    host[1] = __ldcg(words + taps);
    host[2] = __ldcg(words + taps + sides - 1);
  }
};

// What is built at once, for every column of blocks of threads the set of a side's coordinates.
struct Sides {
  struct Side {
    Coords coords;
    BlockSet set;
    int32_t* first = nullptr;       // [rows], for write_first_rows
    bool distinct_will_do = false;  // where the rows ascend the status is `distinct`
  } sides[2];
  int count;
  Counts counts = {};  // zeroed by the first kernel
  uint32_t boxes = 0;  // of measured rows; fill_sets knows

  explicit Sides(const Side& side) : sides{side, side}, count(1) {}
  Sides(const Side& in, const Side& out) : sides{in, out}, count(2) {}
  __device__ const Side& here() const { return sides[blockIdx.y]; }
  Grid grid(const Context& ctx) const {
    Grid grid = over(ctx, std::max({int64_t{1}, sides[0].coords.rows, sides[1].coords.rows}));
    grid.columns = count;
    return grid;
  }
};
// Adds what the coordinates reach to new sets, and ranks their blocks; or sets the status.
void fill_sets(const Context& ctx, Sides sides, const Reach& reach);
// The sets of the coordinates themselves, and the lowest row of every voxel.
void index_rows(const Context& ctx, const Sides& sides);
// The lowest row of every row's voxel, of sides that are indexed; gives the counts.
void write_first_rows(const Context& ctx, const Sides& sides);

// The set of a coordinate matrix and the lowest row of every voxel, about 45 bytes a row. Built
// without waiting for the device: what goes wrong is found by the first read of a size.
class BlockIndex final : public VoxelIndex::State {
 public:
  BlockIndex(const Context& ctx, const MatrixRef& coords);

  // Wait for the device.
  int64_t unique_voxels() const override;
  int32_t find(int32_t batch, int32_t x, int32_t y, int32_t z) const override;

  const BlockSet& set() const { return set_; }

 private:
  Context ctx_;
  BlockSetMemory set_;
};

}  // namespace voxgemm::cuda
