// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cuda/kernels/split_sm90.h"

namespace voxgemm::cuda::sm90 {

using sm80::Math;

// A tile and what it is worked with.
struct Shape {
  int rows = 128;  // of a tile: 128 or 256
  int columns = 256;
  int depth = 64;  // of a stage, in 16-bit units: 64 or 32
  int stages = 4;
  bool pingpong = false;
  int team = 4;  // warps that fill a stage
};

// Stages fill the shared memory of an SM.
constexpr Shape shapes[] = {
    {.rows = 128, .columns = 256, .stages = 4},
    {.rows = 256, .columns = 128, .stages = 4, .team = 2},
    {.rows = 128, .columns = 128, .stages = 6, .team = 2},
    {.rows = 128, .columns = 64, .stages = 8, .team = 1},
    {.rows = 256, .columns = 64, .stages = 4, .pingpong = true, .team = 1},
    {.rows = 256, .columns = 32, .depth = 32, .stages = 8, .pingpong = true, .team = 1},
    {.rows = 256, .columns = 32, .stages = 4, .pingpong = true, .team = 1},
};

// f32 operands are brought to another form first (split_sm90.h), 64 units of it a stage.
constexpr bool is_for(Math math, const Shape& shape) {
  return shape.columns > 32 || (shape.depth == 32) == sm80::is_16bit(math);
}

// chunk_rows of schedules by mask on Hopper, in all passes and for all channels, so that they share
// one. Rows of a mask lie all over a chunk; of many the second-level cache holds too few.
constexpr int chunk_rows(int64_t rows) { return rows > 1 << 19 ? 1 << 16 : one_chunk; }

// As sm80::why_not(), and on which devices.
std::string why_not(Math math, const Problem& problem);

// The convolution `args`, of which y and the residual are aligned (aligned.h). With slices, into
// which the reduction of a tile is cut, all sums are partial, for a pass of its own to add; 0:
// none. One source for each arithmetic.
template <Math math>
void convolve(
    const Context& ctx, const ConvArgs& args, const Operands& operands, int shape, int slices);

// See load() of launch.cuh.
template <Math math>
void load_convolve();

}  // namespace voxgemm::cuda::sm90
