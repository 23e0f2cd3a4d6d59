// SPDX-License-Identifier: Apache-2.0
#include "cuda/kernels/families.h"

#include <algorithm>

#include "cuda/kernels/naive.cuh"
#include "cuda/voxel_index.cuh"

namespace voxgemm::cuda {
namespace {

template <class T>
Weights<T> weights_of(const WeightsRef& w) {
  return {static_cast<T*>(w.data), w.tap_stride, w.in_stride, w.out_stride};
}

template <class T>
void forward(const Context& ctx, const ConvArgs& args) {
  const NaiveForward<T> conv = {.neighbours = args.map->neighbours.as<int32_t>(),
                                .rows = args.y.rows,
                                .taps = args.w.taps,
                                .mirror_taps = args.mirror_taps,
                                .c_in = args.w.c_in,
                                .c_out = args.w.c_out,
                                .x = args.x.as<T>(),
                                .x_stride = args.x.stride,
                                .w = weights_of<const T>(args.w),
                                .bias = static_cast<const T*>(args.bias),
                                .y = args.y.as<T>(),
                                .y_stride = args.y.stride};
  launch(ctx,
         {.blocks = ceil_div(args.y.rows, naive_warps * naive_rows),
          .columns = ceil_div(args.w.c_out, naive_columns),
          .threads = 32 * naive_warps},
         naive_forward<T>, conv);
}

template <class T, class Result>
void grad_weight(const Context& ctx, const ConvArgs& args) {
  const WeightsRef& w = args.w;
  const int64_t size = static_cast<int64_t>(w.taps) * w.c_in * w.c_out;
  // Shorter slices do not pay for their partial sums, and those must not take more memory than
  // this.
  constexpr int64_t rows_per_slice = 1024;
  constexpr int64_t most_partial_bytes = int64_t{32} << 20;
  const int64_t slices = std::max<int64_t>(
      1, std::min({args.y.rows / rows_per_slice, int64_t{64},
                   most_partial_bytes / static_cast<int64_t>(sizeof(Sum<T>) * size)}));
  std::shared_ptr<void> partial;
  if (slices > 1) partial = ctx.allocate(sizeof(Sum<T>) * size * slices);
  const NaiveGradWeight<T, Result> conv = {.neighbours = args.map->neighbours.as<int32_t>(),
                                           .rows = args.y.rows,
                                           .taps = w.taps,
                                           .c_in = w.c_in,
                                           .c_out = w.c_out,
                                           .x = args.x.as<T>(),
                                           .x_stride = args.x.stride,
                                           .dy = args.y.as<T>(),
                                           .dy_stride = args.y.stride,
                                           .dw = weights_of<Result>(w),
                                           .slices = static_cast<int>(slices),
                                           .partial = static_cast<Sum<T>*>(partial.get())};
  launch(ctx,
         {.blocks = slices * w.taps * ceil_div(w.c_in, naive_warps * naive_inputs),
          .columns = ceil_div(w.c_out, naive_columns),
          .threads = 32 * naive_warps},
         naive_grad_weight<T, Result>, conv);
  if (slices > 1) launch(ctx, over(ctx, size), add_slices<T, Result>, conv);
}

std::string why_not(const Kernel& kernel, const Problem& problem) {
  const auto& dtype = *static_cast<const Dtype*>(kernel.family);
  return dtype == problem.dtype ? "" : join("takes ", name(dtype));
}

// About 2 TFLOP/s, whatever the device: it is the last choice.
double cost(const Kernel&, const Problem& problem) { return 5e-6 + problem.useful_flops() / 2e12; }

ScheduleOptions schedule(const Kernel&, const Problem&) {
  return {.tile_rows = 128, .chunk_rows = 128};
}

void launch_pass(const Kernel&, const Context& ctx, Pass pass, const ConvArgs& args) {
  const DeviceGuard guard(ctx.device);
  dispatch_device_float(args.x.dtype, [&]<class T>(Type<T>) {
    if (pass != Pass::grad_weight) return forward<T>(ctx, args);
    if (args.w.dtype == args.x.dtype) return grad_weight<T, T>(ctx, args);
    check(args.w.dtype == Dtype::f32, "the weight gradient has dtype ", name(args.w.dtype),
          ", expected f32 or that of x");
    grad_weight<T, float>(ctx, args);
  });
}

}  // namespace

std::vector<Kernel> naive_kernels() {
  static constexpr Dtype dtypes[] = {Dtype::f16, Dtype::bf16, Dtype::f32, Dtype::f64};
  std::vector<Kernel> rows;
  for (const Dtype& dtype : dtypes) {
    rows.push_back({.name = join("naive_cuda/", name(dtype)),
                    .reference = true,
                    .why_not = why_not,
                    .cost = cost,
                    .schedule = schedule,
                    .launch = launch_pass,
                    .family = &dtype});
  }
  return rows;
}

}  // namespace voxgemm::cuda
