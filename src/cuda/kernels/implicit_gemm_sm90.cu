// SPDX-License-Identifier: Apache-2.0
// Launches of implicit_gemm_sm90.cuh. Compiled once for each arithmetic, VOXGEMM_MATH.
#include <algorithm>
#include <utility>

#include "cuda/kernels/implicit_gemm_sm90.cuh"
#include "cuda/voxel_index.cuh"

namespace voxgemm::cuda::sm90 {

// The weights as a tensor (contiguous channels, taps, other channels), in boxes of one tap;
// channels past the end read as zero.
template <class C>
CUtensorMap weight_map(const WeightsRef& w) {
  constexpr bool in = C::in_contiguous;
  constexpr cuuint32_t contiguous = in ? C::depth : C::box_columns;
  constexpr cuuint32_t others = in ? C::columns : C::depth;
  return tensor_map(w.data, {in ? w.c_in : w.c_out, w.taps, in ? w.c_out : w.c_in},
                    {2 * w.tap_stride, 2 * (in ? w.out_stride : w.in_stride)},
                    {contiguous, 1, others},
                    contiguous == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B);
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
