// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cuda/aligned.h"
#include "cuda/kernels/arithmetic_sm80.h"

// f32 operands in the form that Hopper's matrix instructions read, made once a call: lines (rows of
// x; the input channels of one tap and output channel of the weights) of 128-byte blocks,
//   tf32     32 channels, rounded to tf32
//   bf16x3   32 channels of the first pieces, then the same of the second ones
//   bf16x6   16 channels of the first, of the second and of the third pieces, and 32 bytes unused
// Piece i of a value is what i pieces leave of it, rounded to bf16. Channels beyond the last are
// zeros, but in tf32 there are none beyond the last 16 bytes. A weight gradient, whose sums run
// over rows, takes blocks of more channels of one piece; see split_rows().
namespace voxgemm::cuda::sm90 {

// Operands seen as 16-bit ones of split_channels(c_in) channels, input channels contiguous.
struct SplitOperands {
  MatrixRef x;
  WeightsRef w;
  std::shared_ptr<void> memory;
};

constexpr int split_channels(sm80::Math math, int channels) {
  switch (math) {
    case sm80::Math::bf16x3:
      return (channels + 31) / 32 * 64;
    case sm80::Math::bf16x6:
      return (channels + 15) / 16 * 64;
    default:
      return (channels + 3) / 4 * 8;
  }
}

// x: aligned (aligned.h).
SplitOperands split_operands(const Context& ctx,
                             sm80::Math math,
                             const MatrixRef& x,
                             const WeightsRef& w);

struct SplitRows {
  MatrixRef x;
  MatrixRef dy;
  std::shared_ptr<void> memory;
};

// Rows in `pieces` pieces: the first ones of `x_block` channels (of dy: 64), then the second ones
// of the same and so on, then those of the next channels. x, dy: aligned.
SplitRows split_rows(
    const Context& ctx, int pieces, const MatrixRef& x, const MatrixRef& dy, int x_block);

}  // namespace voxgemm::cuda::sm90
