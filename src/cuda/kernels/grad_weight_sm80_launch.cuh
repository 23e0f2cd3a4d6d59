// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>

#include "cuda/kernels/grad_weight_sm80.cuh"
#include "cuda/kernels/grad_weight_sm80_launch.h"

namespace voxgemm::cuda::sm80 {

inline GradParams grad_params(const GradVariant& variant, const ConvArgs& args) {
  const WeightsRef& dw = args.w;
  GradParams p;
  p.x = args.x.data;
  p.x_row_bytes = static_cast<uint32_t>(args.x.stride * size_of(args.x.dtype));
  p.c_in = dw.c_in;
  p.dy = args.y.data;
  p.dy_row_bytes = static_cast<uint32_t>(args.y.stride * size_of(args.y.dtype));
  p.c_out = dw.c_out;
  p.rows = args.y.rows;
  p.taps = dw.taps;
  p.neighbours = args.map->neighbours.as<int32_t>();
  p.pieces = static_cast<int>(ceil_div(dw.c_in * size_of(args.x.dtype), 16));
  const GradCut cut = cut_gradient(variant, {dw.taps, dw.c_in, dw.c_out, args.y.rows});
  p.groups = cut.groups;
  p.row_blocks = cut.row_blocks;
  p.column_blocks = cut.column_blocks;
  p.slices = cut.slices;
  if (variant.masked) {
    const ScheduleParts& parts = args.schedule->parts();
    p.tiles = parts.tiles.as<int4>();
    p.masks = parts.masks.as<uint32_t>();
    p.order = parts.order.as<int32_t>();
    p.indices = parts.indices.as<int32_t>();
    p.tile_rows = args.schedule->options().tile_rows;
    // Every group has every row.
    p.group_tiles = ceil_div(p.rows, p.tile_rows);
  }
  p.dw = {dw.data, dw.tap_stride, dw.in_stride, dw.out_stride, dw.dtype == Dtype::f32};
  return p;
}

template <class C>
void run_grad_weight(const Context& ctx, const GradVariant& variant, const ConvArgs& args) {
  static_assert(C::shared_bytes <= grad_shared_bytes({C::math, C::rows, C::cols}));
  GradParams p = grad_params(variant, args);
  const int64_t size = static_cast<int64_t>(p.taps) * p.c_in * p.c_out;
  std::shared_ptr<void> sums;
  p.sums = p.dw;
  if (p.slices > 1) {
    sums = ctx.allocate(sizeof(float) * p.slices * size);
    p.sums = {.data = sums.get(), .tap_stride = p.c_in};
    if (p.dw.in_stride == 1) {
      p.sums.in_stride = 1;
      p.sums.out_stride = static_cast<int64_t>(p.taps) * p.c_in;
    } else {
      p.sums.tap_stride *= p.c_out;
      p.sums.in_stride = p.c_out;
      p.sums.out_stride = 1;
    }
  }
  launch(ctx,
         {.blocks = int64_t{p.slices} * p.groups * p.row_blocks * p.column_blocks,
          .threads = threads,
          .shared_bytes = C::shared_bytes},
         grad_weight<C>, p);
  if (p.slices > 1) {
    launch(ctx, {.blocks = ceil_div(size, 256)}, add_slices<typename C::T>, p);
  }
}

template <Math math>
void grad_weight(const Context& ctx, const GradVariant& variant, const ConvArgs& args) {
  if constexpr (sizeof(typename ElementOf<math>::type) == 2) {
    if (variant.cols == 128) return run_grad_weight<GradConfig<math, 128, 128>>(ctx, variant, args);
    return run_grad_weight<GradConfig<math, 128, 64>>(ctx, variant, args);
  } else {
    run_grad_weight<GradConfig<math, 64, 64>>(ctx, variant, args);
  }
}

}  // namespace voxgemm::cuda::sm80
