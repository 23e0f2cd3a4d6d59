// SPDX-License-Identifier: Apache-2.0
// Launches of implicit_gemm_sm90.cuh. Compiled once for each arithmetic, VOXGEMM_MATH.
#include <cudaTypedefs.h>

#include <algorithm>
#include <utility>

#include "cuda/kernels/implicit_gemm_sm90.cuh"
#include "cuda/voxel_index.cuh"

namespace voxgemm::cuda::sm90 {

// The driver's function, found at run time: linking libcuda would tie the library to a driver.
inline PFN_cuTensorMapEncodeTiled_v12000 find_encoder() {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
  check_cuda(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000,
                                              cudaEnableDefault, &result),
             "cudaGetDriverEntryPointByVersion");
  check(result == cudaDriverEntryPointSuccess, ErrorCode::device,
        "the driver has no cuTensorMapEncodeTiled");
  return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(found);
}

// The weights as a tensor (contiguous channels, taps, other channels), in boxes of one tap;
// channels past the end read as zero.
template <class C>
CUtensorMap weight_map(const WeightsRef& w) {
  static const auto encode = find_encoder();
  constexpr bool in = C::in_contiguous;
  constexpr cuuint32_t contiguous = in ? C::depth : C::box_columns;
  constexpr cuuint32_t others = in ? C::columns : C::depth;
  const cuuint64_t sizes[3] = {static_cast<cuuint64_t>(in ? w.c_in : w.c_out),
                               static_cast<cuuint64_t>(w.taps),
                               static_cast<cuuint64_t>(in ? w.c_out : w.c_in)};
  const cuuint64_t strides[2] = {2 * static_cast<cuuint64_t>(w.tap_stride),
                                 2 * static_cast<cuuint64_t>(in ? w.out_stride : w.in_stride)};
  const cuuint32_t box[3] = {contiguous, 1, others};
  const cuuint32_t steps[3] = {1, 1, 1};
  CUtensorMap map;
  const CUresult status =
      encode(&map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 3, w.data, sizes, strides, box, steps,
             CU_TENSOR_MAP_INTERLEAVE_NONE,
             contiguous == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  check(status == CUDA_SUCCESS, ErrorCode::device, "cuTensorMapEncodeTiled failed with ",
        static_cast<int>(status));
  return map;
}

template <class C>
void run(const Context& ctx, const ConvArgs& args, const Operands& operands, int slices) {
  const CUtensorMap map = weight_map<C>(operands.w);
  ConvParams p = {PassArgs(args)};
  p.operand = operands.x.data;
  p.operand_bytes = static_cast<uint32_t>(2 * operands.x.stride);
  p.units = operands.w.c_in;
  p.groups = args.schedule->options().groups;
  p.partial_stride = ceil_div(p.c_out, 8) * 8;
  p.column_blocks = static_cast<int>(ceil_div(p.c_out, C::columns));
  p.slices = std::max(slices, 1);
  p.split = p.groups * slices > 1;
  // Every group has every row, so its tiles are as many as any other's.
  p.group_tiles = static_cast<int>(args.schedule->parts().tiles.rows / p.groups);
  p.chunk_tiles = std::min(args.schedule->options().chunk_rows / C::rows, p.group_tiles);
  const int64_t items = int64_t{p.tile_count()} * p.column_blocks * p.slices;
  const int launches = p.split ? 1 : p.groups;
  constexpr int most_even_turns = 4;
  const bool dealt = items * launches > most_even_turns * multiprocessors(ctx);
  const int buffers = p.split ? p.groups * p.slices : p.groups > 1 ? 1 : 0;
  int* next_item = nullptr;
  const std::shared_ptr<void> memory =
      make_room(ctx, Room{&p.partials, buffers * p.rows * p.partial_stride},
                Room{&next_item, dealt ? launches : 0});
  if (dealt) fill_bytes(ctx, next_item, 0, sizeof(int) * launches);
  for (p.group = 0; p.group < launches; ++p.group) {
    p.added = std::min(p.group, 1);
    p.next_item = dealt ? next_item + p.group : nullptr;
    launch(ctx,
           {.blocks = std::min<int64_t>(items, multiprocessors(ctx)),
            .threads = C::threads,
            .shared_bytes = C::shared_bytes,
            .overlaps = p.group > 0},
           implicit_gemm<C>, map, p);
  }
  if (!p.split) return;
  Grid grid = over(ctx, p.rows * p.partial_stride / 8);
  grid.overlaps = true;
  launch(ctx, grid, finish<typename C::Result>, p, p.partials, p.partial_stride, buffers);
}

template <Math math>
void convolve(
    const Context& ctx, const ConvArgs& args, const Operands& operands, int shape, int slices) {
  const auto run_if = [&]<size_t i>() {
    if constexpr (is_for(math, shapes[i])) {
      if (shape != static_cast<int>(i)) return;
      // Split weights are contiguous along the input channels.
      if constexpr (sm80::is_16bit(math)) {
        if (operands.w.in_stride != 1) {
          return run<Config<math, shapes[i], false>>(ctx, args, operands, slices);
        }
      }
      run<Config<math, shapes[i], true>>(ctx, args, operands, slices);
    }
  };
  [&]<size_t... i>(std::index_sequence<i...>) { (run_if.template operator()<i>(), ...); }
  (std::make_index_sequence<std::size(shapes)>());
}

template void convolve<Math::VOXGEMM_MATH>(
    const Context&, const ConvArgs&, const Operands&, int, int);

template <Math math>
void load_convolve() {
  load(finish<typename Config<math, shapes[0], true>::Result>);
}

template void load_convolve<Math::VOXGEMM_MATH>();

}  // namespace voxgemm::cuda::sm90
