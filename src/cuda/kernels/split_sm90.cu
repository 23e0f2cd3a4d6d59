// SPDX-License-Identifier: Apache-2.0
//
// f32 operands in the form that Hopper's matrix instructions read, made once a call: lines (rows of
// x; the input channels of one tap and output channel of the weights) of blocks of channels,
// rounded to tf32 or in so many pieces of bf16 as the arithmetic has products of: first pieces of
// the block, then second ones, then third ones. Piece i of a value is what i pieces leave of it,
// rounded to bf16. Channels beyond the last are zeros.
#include "cuda/kernels/families_sm90.h"

#include <algorithm>

#include "cuda/kernels/tile_sm80.cuh"
#include "cuda/launch.cuh"

namespace voxgemm::cuda::sm90 {
namespace {

using sm80::Math;

// An operand, and what becomes of its lines: groups of 8 channels of one, and its 16-byte pieces.
struct Lines {
  SplitSource from;
  bool aligned = false;  // four contiguous channels may be read at once
  int groups = 0;
  int pieces = 0;
  int lines_of_block = 0;
  int blocks = 0;
  uint4* to = nullptr;

  explicit Lines(const SplitSource& source) : from(source) {
    aligned = is_aligned(source.w);
    groups = split_channels({source.block.channels, source.block.channels / 8}, source.w.c_in);
    pieces = split_channels({source.block.channels, source.block.units / 8}, source.w.c_in);
    // About four groups a thread, and lines enough to read side by side.
    lines_of_block = std::max(8, 1024 / groups);
    blocks = static_cast<int>(ceil_div(lines(), lines_of_block));
  }
  __host__ __device__ int lines() const { return from.w.taps * from.w.c_out; }
};

// Eight channels, 0 beyond the last, as bits of f32.
struct Group {
  alignas(16) uint32_t v[8];
  __device__ uint4& half(int i) { return reinterpret_cast<uint4*>(v)[i]; }
};

__device__ inline Group load_group(const Lines& l, int line, int first) {
  const WeightsRef& w = l.from.w;
  const float* from = static_cast<const float*>(w.data) + line / w.c_out * w.tap_stride +
                      line % w.c_out * w.out_stride + first * w.in_stride;
  Group group;
  if (l.aligned) {
    unroll<2>([&](int i) {
      const auto* half = reinterpret_cast<const uint4*>(from) + i;
      group.half(i) = first + 4 * i < w.c_in ? __ldg(half) : uint4{};
    });
  } else {
    unroll<8>([&](int e) {
      group.v[e] = first + e < w.c_in ? __float_as_uint(__ldg(from + e * w.in_stride)) : 0;
    });
  }
  return group;
}

template <Math math>
__device__ inline void store_group(const Lines& l, uint4* line, int number, Group group) {
  const int block_groups = l.from.block.channels / 8;
  uint4* block = line + number / block_groups * (l.from.block.units / 8) + number % block_groups;
  if constexpr (math == Math::tf32) {
    unroll<8>([&](int e) { group.v[e] = ptx::to_tf32(group.v[e]); });
    unroll<2>([&](int i) { block[i] = group.half(i); });
  } else {
    constexpr int count = math == Math::bf16x3 ? 2 : 3;
    uint32_t words[4][count];
    unroll<4>([&](int i) { sm80::split(group.v[2 * i], group.v[2 * i + 1], words[i]); });
    unroll<count>([&](int i) {
      block[i * block_groups] = make_uint4(words[0][i], words[1][i], words[2][i], words[3][i]);
    });
  }
}

// A block takes lines_of_block lines; neighbouring threads take what lies side by side: groups of a
// line, or a group of neighbouring lines where it is those that are contiguous.
template <Math math>
__global__ void split_lines(const __grid_constant__ Lines x, const __grid_constant__ Lines w) {
  const bool of_x = blockIdx.x < x.blocks;
  const Lines& l = of_x ? x : w;
  const int first = (blockIdx.x - (of_x ? 0 : x.blocks)) * l.lines_of_block;
  const int lines = min(l.lines_of_block, l.lines() - first);
  for (int i = threadIdx.x; i < lines * l.groups; i += blockDim.x) {
    const bool contiguous = l.from.w.in_stride == 1;
    const int line = first + (contiguous ? i / l.groups : i % lines);
    const int group = contiguous ? i % l.groups : i / lines;
    store_group<math>(l, l.to + int64_t{line} * l.pieces, group, load_group(l, line, 8 * group));
  }
}

WeightsRef split_view(const Lines& lines) {
  WeightsRef w = lines.from.w;
  w.data = lines.to;
  w.c_in = 8 * lines.pieces;
  w.tap_stride = int64_t{w.c_out} * w.c_in;
  w.in_stride = 1;
  w.out_stride = w.c_in;
  w.dtype = Dtype::bf16;
  return w;
}

}  // namespace

Operands split_operands(const Context& ctx, Math math, const SplitSource& x, const SplitSource& w) {
  Lines x_lines(x);
  Lines w_lines(w);
  std::shared_ptr<void> memory =
      make_room(ctx, Room{&x_lines.to, int64_t{x_lines.lines()} * x_lines.pieces},
                Room{&w_lines.to, int64_t{w_lines.lines()} * w_lines.pieces});
  const Grid grid{.blocks = int64_t{x_lines.blocks} + w_lines.blocks};
  sm80::dispatch(math, [&]<Math known>() {
    if constexpr (known == Math::tf32 || known == Math::bf16x3 || known == Math::bf16x6) {
      launch(ctx, grid, split_lines<known>, x_lines, w_lines);
    }
  });
  return {as_rows(split_view(x_lines)), split_view(w_lines), memory};
}

}  // namespace voxgemm::cuda::sm90
