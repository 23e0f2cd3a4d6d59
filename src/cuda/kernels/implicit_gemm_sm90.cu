// SPDX-License-Identifier: Apache-2.0
#include "cuda/kernels/implicit_gemm_sm90.h"

#include <cudaTypedefs.h>

#include <algorithm>

#include "cuda/kernels/implicit_gemm_sm90.cuh"
#include "cuda/launch.cuh"

namespace voxgemm::cuda {
namespace {

using sm90::Config;
using sm90::ConvParams;

bool aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

// The driver's function, found at run time: linking libcuda would tie the library to a driver.
PFN_cuTensorMapEncodeTiled_v12000 tensor_map_encoder() {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
  check_cuda(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000,
                                              cudaEnableDefault, &result),
             "cudaGetDriverEntryPointByVersion");
  check(result == cudaDriverEntryPointSuccess, ErrorCode::device,
        "the driver has no cuTensorMapEncodeTiled");
  return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(found);
}

// The weights as a tensor (contiguous channels, taps, other channels), in boxes of one tap and 64
// contiguous channels; channels past the end read as zero.
CUtensorMap weight_map(const WeightsRef& w, bool in_contiguous, int columns) {
  const auto other_stride = in_contiguous ? w.out_stride : w.in_stride;
  const cuuint64_t sizes[3] = {static_cast<cuuint64_t>(in_contiguous ? w.c_in : w.c_out),
                               static_cast<cuuint64_t>(w.taps),
                               static_cast<cuuint64_t>(in_contiguous ? w.c_out : w.c_in)};
  const cuuint64_t strides[2] = {2 * static_cast<cuuint64_t>(w.tap_stride),
                                 2 * static_cast<cuuint64_t>(other_stride)};
  const cuuint32_t box[3] = {64, 1, static_cast<cuuint32_t>(in_contiguous ? columns : 64)};
  const cuuint32_t steps[3] = {1, 1, 1};
  CUtensorMap map;
  const CUresult status = tensor_map_encoder()(
      &map,
      w.dtype == Dtype::f16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3,
      w.data, sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  check(status == CUDA_SUCCESS, ErrorCode::device, "cuTensorMapEncodeTiled failed with ",
        static_cast<int>(status));
  return map;
}

ConvParams params_of(const MaskedSchedule& schedule, const ConvArgs& args) {
  const WeightsRef& w = args.w;
  ConvParams p;
  p.x = args.x.data;
  p.x_row_bytes = static_cast<uint32_t>(2 * args.x.stride);
  p.c_in = w.c_in;
  p.y = args.y.data;
  p.y_stride = args.y.stride;
  p.c_out = w.c_out;
  p.bias = args.bias;
  p.order = schedule.parts.order.as<int32_t>();
  p.indices = schedule.parts.indices.as<int32_t>();
  p.taps = w.taps;
  p.groups = schedule.options.groups;
  p.mirror_taps = args.mirror_taps;
  p.rows = args.y.rows;
  p.neighbours = args.map->neighbours.as<int32_t>();
  p.weights = w.data;
  p.tap_stride = w.tap_stride;
  p.in_stride = w.in_stride;
  p.out_stride = w.out_stride;
  return p;
}

template <class C>
void run(const Context& ctx, const MaskedSchedule& schedule, const ConvArgs& args) {
  const DeviceGuard guard(ctx.device);
  ConvParams p = params_of(schedule, args);
  p.column_blocks = static_cast<int>(ceil_div(p.c_out, C::columns));
  const CUtensorMap map = weight_map(args.w, C::in_contiguous, C::columns);
  std::shared_ptr<void> partials;
  if (p.groups > 1) {
    partials = ctx.allocate(sizeof(float) * (p.groups - 1) * p.rows * p.c_out);
    p.partials = static_cast<float*>(partials.get());
  }
  // Every group has every row, so its tiles are as many as any other's, and stand together.
  const int64_t group_tiles = schedule.parts.tiles.rows / p.groups;
  const auto launch_tiles = [&](int64_t first, int64_t count, bool last_group) {
    p.tiles = schedule.parts.tiles.as<int4>() + first;
    p.masks = schedule.parts.masks.row<uint32_t>(first);
    p.tile_count = static_cast<int>(count);
    p.last_group = last_group;
    const int64_t items = count * p.column_blocks;
    launch(ctx,
           {.blocks = std::min<int64_t>(items, multiprocessors(ctx)),
            .threads = C::threads,
            .shared_bytes = C::shared_bytes},
           sm90::implicit_gemm<C>, map, p);
  };
  launch_tiles(0, group_tiles * (p.groups - 1), false);
  launch_tiles(group_tiles * (p.groups - 1), group_tiles, true);
}

// Stages fill the shared memory of an SM.
template <class T, bool in_contiguous>
void run_width(const Context& ctx, const MaskedSchedule& schedule, const ConvArgs& args) {
  if (args.w.c_out > 128) return run<Config<T, 1, 256, 4, in_contiguous>>(ctx, schedule, args);
  if (args.w.c_out > 64) return run<Config<T, 1, 128, 6, in_contiguous>>(ctx, schedule, args);
  run<Config<T, 1, 64, 8, in_contiguous>>(ctx, schedule, args);
}

template <class T>
void run_layout(const Context& ctx, const MaskedSchedule& schedule, const ConvArgs& args) {
  if (args.w.in_stride == 1) return run_width<T, true>(ctx, schedule, args);
  run_width<T, false>(ctx, schedule, args);
}

}  // namespace

bool is_hopper(const Context& ctx) {
  int major = 0;
  check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, ctx.device.index),
             "cudaDeviceGetAttribute");
  return major == 9;
}

std::string sm90_why_not(const MaskedSchedule& schedule, const ConvArgs& args) {
  const WeightsRef& w = args.w;
  const ScheduleOptions& options = schedule.options;
  if (w.dtype != Dtype::f16 && w.dtype != Dtype::bf16) return "takes f16 and bf16";
  if (w.c_in % 8 != 0) return join("c_in is ", w.c_in, ", not a multiple of 8");
  if (w.c_out % 8 != 0) return join("c_out is ", w.c_out, ", not a multiple of 8");
  if (args.x.stride % 8 != 0 || args.y.stride % 8 != 0 || !aligned(args.x.data) ||
      !aligned(args.y.data)) {
    return "rows of x or y do not start at multiples of 16 bytes";
  }
  const int64_t other = w.in_stride == 1 ? w.out_stride : w.in_stride;
  if ((w.in_stride != 1 && w.out_stride != 1) || other % 8 != 0 || w.tap_stride % 8 != 0 ||
      !aligned(w.data)) {
    return "rows of the weights are not contiguous or do not start at multiples of 16 bytes";
  }
  if (options.order != ScheduleOptions::Order::by_mask || options.tile_rows != sm90_tile_rows) {
    return join("needs a schedule by mask with tiles of ", sm90_tile_rows, " rows");
  }
  if (options.chunk_rows < args.y.rows) return "needs a schedule of one chunk";
  return "";
}

void sm90_convolve(const Context& ctx, const MaskedSchedule& schedule, const ConvArgs& args) {
  check(is_hopper(ctx), ErrorCode::unsupported, "implicit_gemm_sm90 needs compute capability 9.x");
  const std::string reason = sm90_why_not(schedule, args);
  check(reason.empty(), ErrorCode::unsupported, "implicit_gemm_sm90: ", reason);
  if (args.w.dtype == Dtype::f16) return run_layout<__half>(ctx, schedule, args);
  run_layout<__nv_bfloat16>(ctx, schedule, args);
}

}  // namespace voxgemm::cuda
