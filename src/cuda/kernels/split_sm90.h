// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cuda/aligned.h"
#include "cuda/device.h"
#include "cuda/kernels/families.h"

// f32 operands in the form that Hopper's matrix instructions read, made once a call: lines (rows of
// x; the input channels of one tap and output channel of the weights) of blocks of channels,
// rounded to tf32 or in so many pieces of bf16 as the arithmetic has products of: first pieces of
// the block, then second ones, then third ones. Piece i of a value is what i pieces leave of it,
// rounded to bf16. Channels beyond the last are zeros.
namespace voxgemm::cuda::sm90 {

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

// As the kernels on Hopper take them: rows of 16 bytes whole; f32 split, seen as 16-bit operands of
// split_channels() input channels, contiguous.
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

}  // namespace voxgemm::cuda::sm90
