// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>

#include "cuda/kernels/implicit_gemm_sm80.cuh"
#include "cuda/kernels/implicit_gemm_sm80_launch.h"

namespace voxgemm::cuda::sm80 {

inline ConvParams conv_params(const ConvVariant& variant, const ConvArgs& args) {
  const WeightsRef& w = args.w;
  ConvParams p;
  p.x = args.x.data;
  p.x_row_bytes = static_cast<uint32_t>(args.x.stride * size_of(args.x.dtype));
  p.c_in = w.c_in;
  p.w = w.data;
  p.tap_stride = w.tap_stride;
  p.in_stride = w.in_stride;
  p.out_stride = w.out_stride;
  p.y = args.y.data;
  p.y_stride = args.y.stride;
  p.c_out = w.c_out;
  p.bias = args.bias;
  p.rows = args.y.rows;
  p.taps = w.taps;
  p.mirror_taps = args.mirror_taps;
  p.neighbours = args.map->neighbours.as<int32_t>();
  p.column_blocks = static_cast<int>(ceil_div(w.c_out, variant.cols));
  p.x_pieces = static_cast<int>(ceil_div(w.c_in * size_of(w.dtype), 16));
  const int pieces_of_step = variant.masked                                                 ? 1
                             : variant.math == Math::bf16x3 || variant.math == Math::bf16x6 ? 4
                                                                                            : 2;
  p.pieces = static_cast<int>(ceil_div(p.x_pieces, pieces_of_step)) * pieces_of_step;
  p.slices = variant.slices;
  // Whole pieces of y.
  p.sums_stride = ceil_div(w.c_out, 8) * 8;
  return p;
}

template <class C>
void run_conv(const Context& ctx, const ConvVariant& variant, const ConvArgs& args) {
  static_assert(C::shared_bytes <= conv_shared_bytes({C::math, C::rows, C::cols}));
  ConvParams p = conv_params(variant, args);
  const Schedule& schedule = *args.schedule;
  const int groups = variant.masked ? schedule.options().groups : 1;
  std::shared_ptr<void> sums;
  if (groups > 1 || p.slices > 1) {
    sums = ctx.allocate(sizeof(float) * p.slices * p.rows * p.sums_stride);
    p.sums = static_cast<float*>(sums.get());
  }
  // Every group has every row.
  const int64_t tiles = ceil_div(p.rows, C::rows);
  for (int group = 0; group < groups; ++group) {
    if (variant.masked) {
      const ScheduleParts& parts = schedule.parts();
      p.tiles = parts.tiles.as<int4>() + group * tiles;
      p.masks = parts.masks.row<uint32_t>(group * tiles);
      p.order = parts.order.as<int32_t>();
      p.indices = parts.indices.as<int32_t>();
    }
    p.first_tap = static_cast<int>(static_cast<int64_t>(group) * p.taps / groups);
    p.first_group = group == 0;
    p.last_group = group == groups - 1;
    launch(ctx,
           {.blocks = tiles * p.column_blocks,
            .columns = p.slices,
            .threads = threads,
            .shared_bytes = C::shared_bytes},
           convolve<C>, p);
  }
  if (p.slices == 1) return;
  const int64_t pieces = p.rows * ceil_div(p.c_out, C::per_piece);
  launch(ctx, {.blocks = ceil_div(pieces, 256)}, finish<typename C::T>, p);
}

template <Math math, bool in_contiguous>
void run_layout(const Context& ctx, const ConvVariant& variant, const ConvArgs& args) {
  if constexpr (sizeof(typename ElementOf<math>::type) == 2) {
    if (variant.cols == 128) {
      return run_conv<ConvConfig<math, 128, 128, in_contiguous>>(ctx, variant, args);
    }
  }
  if (variant.cols == 32) {
    return run_conv<ConvConfig<math, 128, 32, in_contiguous>>(ctx, variant, args);
  }
  if (variant.rows == 128) {
    return run_conv<ConvConfig<math, 128, 64, in_contiguous>>(ctx, variant, args);
  }
  run_conv<ConvConfig<math, 64, 64, in_contiguous>>(ctx, variant, args);
}

template <Math math>
void convolve(const Context& ctx, const ConvVariant& variant, const ConvArgs& args) {
  if (args.w.in_stride == 1) return run_layout<math, true>(ctx, variant, args);
  run_layout<math, false>(ctx, variant, args);
}

}  // namespace voxgemm::cuda::sm80
