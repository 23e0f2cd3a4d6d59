// SPDX-License-Identifier: Apache-2.0
#include "cuda/kernels/split_sm90.h"

#include <algorithm>
#include <limits>

#include "cuda/kernels/tile_sm80.cuh"
#include "cuda/launch.cuh"

namespace voxgemm::cuda::sm90 {
namespace {

using sm80::Math;

// Line l begins at from + l / inner * outer_stride + l % inner * inner_stride.
struct Lines {
  const float* from = nullptr;
  int64_t outer_stride = 0;
  int inner = 1;
  int64_t inner_stride = 0;
  int64_t channel_stride = 1;
  int channels = 0;
  bool aligned = false;  // four contiguous channels may be read at once
  int lines = 0;
  int groups = 0;  // of 8 channels in a line of the result
  // In pieces of bf16: groups that stand together, and from them to the next ones' in 16 bytes.
  int block_groups = 0;
  int block_pieces = 0;
  int lines_of_block = 0;
  int blocks = 0;
  uint4* to = nullptr;
  int64_t to_pieces = 0;  // of a line
};

// Eight channels, 0 beyond the last.
__device__ __forceinline__ void load_group(const Lines& l, int line, int first, uint32_t (&v)[8]) {
  const float* from = l.from + line / l.inner * l.outer_stride + line % l.inner * l.inner_stride +
                      first * l.channel_stride;
  if (l.aligned) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const bool inside = first + 4 * half < l.channels;
      const float4 four =
          inside ? __ldg(reinterpret_cast<const float4*>(from) + half) : make_float4(0, 0, 0, 0);
      v[4 * half] = __float_as_uint(four.x);
      v[4 * half + 1] = __float_as_uint(four.y);
      v[4 * half + 2] = __float_as_uint(four.z);
      v[4 * half + 3] = __float_as_uint(four.w);
    }
    return;
  }
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    v[e] = first + e < l.channels ? __float_as_uint(__ldg(from + e * l.channel_stride)) : 0;
  }
}

template <Math math>
__device__ __forceinline__ void store_group(const Lines& l,
                                            uint4* line,
                                            int group,
                                            const uint32_t (&v)[8]) {
  if constexpr (math == Math::tf32) {
    uint32_t r[8];
#pragma unroll
    for (int e = 0; e < 8; ++e) r[e] = ptx::to_tf32(v[e]);
    line[2 * group] = make_uint4(r[0], r[1], r[2], r[3]);
    line[2 * group + 1] = make_uint4(r[4], r[5], r[6], r[7]);
  } else {
    constexpr int count = math == Math::bf16x3 ? 2 : 3;
    uint32_t words[4][count];
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) sm80::split(v[2 * pair], v[2 * pair + 1], words[pair]);
    uint4* block = line + group / l.block_groups * l.block_pieces + group % l.block_groups;
#pragma unroll
    for (int i = 0; i < count; ++i) {
      block[i * l.block_groups] = make_uint4(words[0][i], words[1][i], words[2][i], words[3][i]);
    }
  }
}

// A block takes lines_of_block lines; neighbouring threads take what lies side by side: groups of a
// line, or a group of neighbouring lines where it is those that are contiguous.
template <Math math>
__global__ void split_lines(const __grid_constant__ Lines x, const __grid_constant__ Lines w) {
  const bool of_x = blockIdx.x < x.blocks;
  const Lines& l = of_x ? x : w;
  const int first = (blockIdx.x - (of_x ? 0 : x.blocks)) * l.lines_of_block;
  const int lines = min(l.lines_of_block, l.lines - first);
  for (int i = threadIdx.x; i < lines * l.groups; i += blockDim.x) {
    const bool contiguous = l.channel_stride == 1;
    const int line = first + (contiguous ? i / l.groups : i % lines);
    const int group = contiguous ? i % l.groups : i / lines;
    uint32_t v[8];
    load_group(l, line, 8 * group, v);
    uint4* to = l.to + line * l.to_pieces;
    if (math == Math::tf32 && 2 * group + 1 == l.to_pieces) {
      to[2 * group] = make_uint4(ptx::to_tf32(v[0]), ptx::to_tf32(v[1]), ptx::to_tf32(v[2]),
                                 ptx::to_tf32(v[3]));
    } else {
      store_group<math>(l, to, group, v);
    }
  }
}

void deal(Lines* lines) {
  // About four groups a thread, and lines enough to read side by side.
  lines->lines_of_block = std::max(8, 1024 / lines->groups);
  lines->blocks = static_cast<int>(ceil_div(lines->lines, lines->lines_of_block));
}

void place(Lines* lines, Math math) {
  const int units = split_channels(math, lines->channels);
  lines->to_pieces = units / 8;
  lines->groups = math == Math::tf32     ? static_cast<int>(ceil_div(units, 16))
                  : math == Math::bf16x3 ? units / 16
                                         : units / 32;
  lines->block_groups = math == Math::bf16x3 ? 4 : 2;
  lines->block_pieces = 8;
  deal(lines);
}

// In `pieces` pieces of `block` channels.
void place_blocks(Lines* lines, int pieces, int block) {
  const int blocks = static_cast<int>(ceil_div(lines->channels, block));
  lines->block_groups = block / 8;
  lines->block_pieces = pieces * lines->block_groups;
  lines->groups = blocks * lines->block_groups;
  lines->to_pieces = int64_t{blocks} * lines->block_pieces;
  deal(lines);
}

bool reads_four(const void* data, int64_t a, int64_t b) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && a % 4 == 0 && b % 4 == 0;
}

Lines lines_of(const MatrixRef& m, int channels) {
  return {.from = static_cast<const float*>(m.data),
          .inner = std::numeric_limits<int>::max(),
          .inner_stride = m.stride,
          .channels = channels,
          .aligned = reads_four(m.data, m.stride, 0),
          .lines = static_cast<int>(m.rows)};
}

// Room for both, and their split.
std::shared_ptr<void> split(const Context& ctx, Math math, Lines* first, Lines* second) {
  Layout layout;
  const size_t first_place = layout.add<uint4>(first->lines * first->to_pieces);
  const size_t second_place = layout.add<uint4>(second->lines * second->to_pieces);
  std::shared_ptr<void> memory = ctx.allocate(layout.bytes());
  first->to = Layout::at<uint4>(memory, first_place);
  second->to = Layout::at<uint4>(memory, second_place);
  const Grid grid{.blocks = int64_t{first->blocks} + second->blocks};
  sm80::dispatch(math, [&]<Math known>() {
    if constexpr (known == Math::tf32 || known == Math::bf16x3 || known == Math::bf16x6) {
      launch(ctx, grid, split_lines<known>, *first, *second);
    }
  });
  return memory;
}

}  // namespace

SplitOperands split_operands(const Context& ctx,
                             Math math,
                             const MatrixRef& x,
                             const WeightsRef& w) {
  Lines rows = lines_of(x, w.c_in);
  place(&rows, math);
  Lines columns{.from = static_cast<const float*>(w.data),
                .outer_stride = w.tap_stride,
                .inner = w.c_out,
                .inner_stride = w.out_stride,
                .channel_stride = w.in_stride,
                .channels = w.c_in,
                .aligned = w.in_stride == 1 && w.c_in % 4 == 0 &&
                           reads_four(w.data, w.tap_stride, w.out_stride),
                .lines = w.taps * w.c_out};
  place(&columns, math);
  SplitOperands result{x, w, split(ctx, math, &rows, &columns)};
  const int channels = split_channels(math, w.c_in);
  result.x.data = rows.to;
  result.x.cols = result.x.stride = channels;
  result.x.dtype = Dtype::bf16;
  result.w.data = columns.to;
  result.w.c_in = channels;
  result.w.tap_stride = int64_t{w.c_out} * channels;
  result.w.in_stride = 1;
  result.w.out_stride = channels;
  result.w.dtype = Dtype::bf16;
  return result;
}

SplitRows split_rows(
    const Context& ctx, int pieces, const MatrixRef& x, const MatrixRef& dy, int x_block) {
  Lines x_lines = lines_of(x, static_cast<int>(x.cols));
  place_blocks(&x_lines, pieces, x_block);
  Lines dy_lines = lines_of(dy, static_cast<int>(dy.cols));
  place_blocks(&dy_lines, pieces, 64);
  SplitRows result{x, dy,
                   split(ctx, pieces == 2 ? Math::bf16x3 : Math::bf16x6, &x_lines, &dy_lines)};
  const auto see = [](MatrixRef* m, const Lines& lines) {
    m->data = lines.to;
    m->cols = m->stride = 8 * lines.to_pieces;
    m->dtype = Dtype::bf16;
  };
  see(&result.x, x_lines);
  see(&result.dy, dy_lines);
  return result;
}

}  // namespace voxgemm::cuda::sm90
