// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cuda/aligned.h"
#include "cuda/device.h"
#include "cuda/kernels/families.h"

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

// f32 operands are brought to another form first (split_sm90.cu), 64 units of it a stage.
constexpr bool is_for(Math math, const Shape& shape) {
  return shape.columns > 32 || (shape.depth == 32) == sm80::is_16bit(math);
}

// chunk_rows of schedules by mask on Hopper, in all passes and for all channels, so that they share
// one. Rows of a mask lie all over a chunk; of many the second-level cache holds too few.
constexpr int chunk_rows(int64_t rows) { return rows > 1 << 19 ? 1 << 16 : one_chunk; }

// As sm80::limits(), and of the device itself.
std::string limits(Math math, const Problem& problem);

// 16-bit units that stand for so many channels, a multiple of 8.
struct SplitBlock {
  int channels;
  int units;
};

// What implicit_gemm_sm90.cuh takes: pieces side by side in 128 bytes, of which bf16x6 uses 96. A
// weight gradient, whose sums run over rows, takes blocks of more channels of one piece.
constexpr SplitBlock split_block(sm80::Math math) {
  if (math == sm80::Math::tf32) return {8, 16};
  return {math == sm80::Math::bf16x3 ? 32 : 16, 64};
}
constexpr int split_channels(const SplitBlock& block, int channels) {
  return (channels + block.channels - 1) / block.channels * block.units;
}

// For the kernels on Hopper: rows of 16 bytes whole; f32 as split_channels() 16-bit input channels.
struct Operands {
  MatrixRef x;
  WeightsRef w;
  std::shared_ptr<void> memory = {};  // where they are copies
};

inline MatrixRef as_rows(const WeightsRef& w) {
  return {w.data, w.c_out, w.c_in, w.out_stride, w.dtype, w.device};
}
// An aligned matrix (aligned.h) as weights.
inline WeightsRef as_weights(const MatrixRef& m) {
  WeightsRef w = one_tap(m);
  w.c_in = static_cast<int>(ceil_div(m.cols, 4) * 4);
  return w;
}

// A matrix is weights of one tap with a row for each output channel.
struct SplitSource {
  WeightsRef w;
  SplitBlock block;
};
Operands split_operands(const Context& ctx,
                        sm80::Math math,
                        const SplitSource& x,
                        const SplitSource& w);

// The convolution `args`, of which y and the residual are aligned (aligned.h). With slices of the
// reduction all sums are partial, for a pass of its own to add; 0: none. One source an arithmetic.
template <Math math>
void convolve(
    const Context& ctx, const ConvArgs& args, const Operands& operands, int shape, int slices);

// See load() of launch.cuh.
template <Math math>
void load_convolve();

}  // namespace voxgemm::cuda::sm90
