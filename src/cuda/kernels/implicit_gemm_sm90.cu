// SPDX-License-Identifier: Apache-2.0
#include "cuda/kernels/implicit_gemm_sm90.h"

#include <cudaTypedefs.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <utility>

#include "cuda/aligned.h"
#include "cuda/kernels/implicit_gemm_sm90.cuh"
#include "cuda/voxel_index.cuh"

namespace voxgemm::cuda {
namespace {

using sm90::Config;
using sm90::ConvParams;
using sm90::Shape;

// Stages fill the shared memory of an SM.
constexpr Shape shapes[] = {
    {.rows = 128, .columns = 256, .stages = 4},
    {.rows = 256, .columns = 128, .stages = 4},
    {.rows = 128, .columns = 128, .stages = 6},
    {.rows = 128, .columns = 64, .stages = 8},
    {.rows = 256, .columns = 64, .stages = 5, .pingpong = true},
    {.rows = 256, .columns = 32, .depth = 32, .stages = 10, .pingpong = true},
};

// A row of the registry.
struct Row {
  Dtype dtype = Dtype::f16;
  int shape = 0;
  int groups = 1;  // more where 32 taps a group ask for it
  bool split = false;
};
constexpr Row variants[] = {
    {.shape = 0, .groups = 1},
    {.shape = 0, .groups = 2},
    {.shape = 0, .groups = 3},
    {.shape = 1, .groups = 1},
    {.shape = 2, .groups = 1},
    {.shape = 2, .groups = 3},
    {.shape = 3, .groups = 1},
    {.shape = 3, .groups = 3},
    {.shape = 4, .groups = 1},
    {.shape = 5, .groups = 1},
    {.shape = 0, .groups = 1, .split = true},
    {.shape = 2, .groups = 1, .split = true},
    {.shape = 3, .groups = 1, .split = true},
};
constexpr auto family_rows = [] {
  std::array<Row, 2 * std::size(variants)> rows;
  for (size_t i = 0; i < rows.size(); ++i) {
    rows[i] = variants[i % std::size(variants)];
    rows[i].dtype = i < std::size(variants) ? Dtype::f16 : Dtype::bf16;
  }
  return rows;
}();

const Row& row_of(const Kernel& kernel) { return *static_cast<const Row*>(kernel.family); }

// Taps of a group are bits of a mask; only rows of three groups take kernels that need more.
constexpr int most_taps = 32;
constexpr int most_groups = 3;

int groups_of(const Row& row, int taps) {
  return std::min(taps, std::max(row.groups, static_cast<int>(ceil_div(taps, most_taps))));
}

// The sizes of a pass seen as a forward.
struct Sizes {
  int64_t rows = 0;
  int taps = 0;
  int c_in = 0;
  int c_out = 0;
};

// Slices for items to fill the SMs of an H100 or H200 once: a partial sum costs more than the end
// of a second wave. Not asked of the device: results depend on it.
constexpr int sms = 132;
int slices_of(const Row& row, const Sizes& sizes) {
  if (!row.split) return 1;
  const Shape& shape = shapes[row.shape];
  const int64_t items = ceil_div(sizes.rows, shape.rows) * groups_of(row, sizes.taps) *
                        ceil_div(sizes.c_out, shape.columns);
  // A slice of less than four steps is all beginning and end.
  const int64_t steps = sizes.taps / groups_of(row, sizes.taps) * ceil_div(sizes.c_in, shape.depth);
  const int64_t most = std::clamp<int64_t>(steps / 4, 1, 16);
  return static_cast<int>(std::clamp<int64_t>(sms / std::max<int64_t>(items, 1), 1, most));
}

// The driver's function, found at run time: linking libcuda would tie the library to a driver.
PFN_cuTensorMapEncodeTiled_v12000 find_encoder() {
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
  const CUresult status = encode(
      &map,
      w.dtype == Dtype::f16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3,
      w.data, sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      contiguous == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  check(status == CUDA_SUCCESS, ErrorCode::device, "cuTensorMapEncodeTiled failed with ",
        static_cast<int>(status));
  return map;
}

ConvParams params_of(const ConvArgs& args) {
  const WeightsRef& w = args.w;
  const ScheduleParts& parts = args.schedule->parts();
  ConvParams p;
  p.x = args.x.data;
  p.x_row_bytes = static_cast<uint32_t>(2 * args.x.stride);
  p.c_in = w.c_in;
  p.y = args.y.data;
  p.y_stride = args.y.stride;
  p.c_out = w.c_out;
  p.bias = args.bias;
  p.order = parts.order.as<int32_t>();
  p.indices = parts.indices.as<int32_t>();
  p.taps = w.taps;
  p.groups = args.schedule->options().groups;
  p.mirror_taps = args.mirror_taps;
  p.rows = args.y.rows;
  p.partial_stride = ceil_div(w.c_out, 8) * 8;
  p.neighbours = args.map->neighbours.as<int32_t>();
  p.weights = w.data;
  p.tap_stride = w.tap_stride;
  p.in_stride = w.in_stride;
  p.out_stride = w.out_stride;
  return p;
}

// Whether all sums are partial, to be added by a pass of its own, and into how many slices.
struct Slicing {
  bool split = false;
  int slices = 1;
};

// Which groups a launch takes, and what becomes of their sums.
struct Stage {
  int first_group = 0;
  int groups = 0;
  int added = 0;
  bool finish = true;
  int group_buffers = 0;
};

// args: of aligned operands.
template <class C>
void run(const Context& ctx, const ConvArgs& args, const Slicing& slicing) {
  const CUtensorMap map = weight_map<C>(args.w);
  ConvParams p = params_of(args);
  p.column_blocks = static_cast<int>(ceil_div(p.c_out, C::columns));
  p.slices = slicing.slices;
  p.tiles_first = slicing.split;
  // Up to so many groups have a buffer each and run together; more of them take turns with one.
  const bool chained = !slicing.split && p.groups > most_groups;
  const int buffers = slicing.split ? p.groups * p.slices : chained ? 1 : p.groups - 1;
  // Every group has every row, so its tiles are as many as any other's, and stand together.
  const ScheduleParts& parts = args.schedule->parts();
  const int64_t group_tiles = parts.tiles.rows / p.groups;
  // One turn needs no counter.
  const bool dealt = group_tiles * p.column_blocks * p.groups * p.slices > multiprocessors(ctx);
  Layout layout;
  const auto sums = layout.add<float>(buffers * p.rows * p.partial_stride);
  const auto counters = layout.add<int>(dealt ? p.groups : 0);
  std::shared_ptr<void> memory;
  if (layout.bytes() > 0) memory = ctx.allocate(layout.bytes());
  p.partials = Layout::at<float>(memory, sums);
  int* const next_item = dealt ? Layout::at<int>(memory, counters) : nullptr;
  if (dealt) fill_bytes(ctx, next_item, 0, sizeof(int) * p.groups);
  bool overlaps = false;
  const auto launch_groups = [&](const Stage& stage) {
    const int64_t first = group_tiles * stage.first_group;
    p.tiles = parts.tiles.as<int4>() + first;
    p.masks = parts.masks.row<uint32_t>(first);
    p.tile_count = static_cast<int>(group_tiles * stage.groups);
    p.next_item = dealt ? next_item + stage.first_group : nullptr;
    p.added = stage.added;
    p.finish = stage.finish;
    p.group_buffers = stage.group_buffers;
    const int64_t items = int64_t{p.tile_count} * p.column_blocks * p.slices;
    launch(ctx,
           {.blocks = std::min<int64_t>(items, multiprocessors(ctx)),
            .threads = C::threads,
            .shared_bytes = C::shared_bytes,
            .overlaps = overlaps},
           sm90::implicit_gemm<C>, map, p);
    overlaps = true;
  };
  if (slicing.split && buffers > 1) {
    launch_groups({.groups = p.groups, .finish = false, .group_buffers = p.slices});
    p.added = buffers;
    Grid grid = over(ctx, p.rows * p.partial_stride / 8);
    grid.overlaps = true;
    launch(ctx, grid, sm90::finish_rows<typename C::T>, p);
  } else if (chained) {
    for (int g = 0; g < p.groups; ++g) {
      launch_groups(
          {.first_group = g, .groups = 1, .added = std::min(g, 1), .finish = g == p.groups - 1});
    }
  } else {
    const int others = p.groups - 1;
    if (others > 0) launch_groups({.groups = others, .finish = false, .group_buffers = 1});
    launch_groups({.first_group = others, .groups = 1, .added = others});
  }
}

template <class T, bool in_contiguous, size_t... i>
void run_shape(const Context& ctx,
               const ConvArgs& args,
               const Slicing& slicing,
               int shape,
               std::index_sequence<i...>) {
  ((shape == static_cast<int>(i) ? run<Config<T, shapes[i], in_contiguous>>(ctx, args, slicing)
                                 : void()),
   ...);
}

template <class T>
void run_layout(const Context& ctx, const ConvArgs& args, const Row& row) {
  constexpr auto all = std::make_index_sequence<std::size(shapes)>();
  const Slicing slicing = {row.split,
                           slices_of(row, {args.y.rows, args.w.taps, args.w.c_in, args.w.c_out})};
  if (args.w.in_stride == 1) return run_shape<T, true>(ctx, args, slicing, row.shape, all);
  run_shape<T, false>(ctx, args, slicing, row.shape, all);
}

void launch_pass(const Kernel& kernel, const Context& ctx, Pass, const ConvArgs& args) {
  const DeviceGuard guard(ctx.device);
  const Row& row = row_of(kernel);
  const AlignedMatrix x = aligned_input(ctx, args.x);
  const AlignedMatrix y = aligned_output(ctx, args.y);
  const AlignedWeights w = aligned_weights(ctx, args.w);
  ConvArgs aligned = args;
  aligned.x = x.matrix;
  aligned.y = y.matrix;
  aligned.w = w.weights;
  row.dtype == Dtype::f16 ? run_layout<__half>(ctx, aligned, row)
                          : run_layout<__nv_bfloat16>(ctx, aligned, row);
  write_back(ctx, y, args.y);
}

std::string why_not(const Kernel& kernel, const Problem& problem) {
  const Row& row = row_of(kernel);
  if (problem.device.kind != DeviceKind::cuda) return "runs on CUDA only";
  if (problem.dtype != row.dtype) return std::string("takes ").append(name(row.dtype));
  if (problem.pass == Pass::grad_weight) return "has no weight gradient";
  if (problem.architecture / 10 != 9) {
    return join("runs on compute capability 9.x only, this is ", problem.architecture / 10, ".",
                problem.architecture % 10);
  }
  const int taps = problem.geometry.taps();
  if (row.groups < most_groups && taps > most_taps * row.groups) {
    return join("takes at most ", most_taps * row.groups, " taps, the kernel has ", taps);
  }
  return "";
}

Sizes sizes_of(const Problem& problem) {
  const bool backward = problem.pass == Pass::grad_input;
  return {problem.n_out, problem.geometry.taps(), backward ? problem.c_out : problem.c_in,
          backward ? problem.c_in : problem.c_out};
}

// Executed over useful products of tiles of so many rows sorted by mask, where every row has about
// half of the taps: as counted on shells of 4 thousand to 4 million voxels, where it falls with the
// number of rows that share a mask, and groups of taps multiply that.
double waste(double rows, int tile_rows, int groups) {
  const double sharing = rows / 25e3 * 128 / tile_rows * std::pow(4.3, groups - 1);
  return 1 + 1 / (1 + std::pow(sharing, 0.75));
}

// Fitted to 160 times on one H200, every row on shells of 192 to 4 million voxels and 32 to 1024
// channels; what it picks is within 3% of the fastest row there.
double cost(const Kernel& kernel, const Problem& problem) {
  const Row& row = row_of(kernel);
  const Shape& shape = shapes[row.shape];
  const Sizes sizes = sizes_of(problem);
  const int groups = groups_of(row, sizes.taps);
  const int slices = slices_of(row, sizes);
  const auto rows = static_cast<double>(std::max<int64_t>(sizes.rows, 1));
  const auto k_blocks = static_cast<double>(ceil_div(sizes.c_in, shape.depth));
  const auto column_blocks = static_cast<double>(ceil_div(sizes.c_out, shape.columns));
  const double taps = std::max(problem.expected_pairs() / rows, 1e-3);  // of a row
  const double tile_waste = std::min(waste(rows, shape.rows, groups), sizes.taps / taps);
  const double half_waste = std::min(waste(rows, shape.rows / 2, groups), tile_waste);
  // Clocks of a step: products at 4096 a clock, for halves that have the tap, and copies at 35
  // bytes a clock, of rows that are there and of weights that neighbours in part share.
  const double products =
      2.0 * shape.rows * shape.columns * shape.depth / 4096 * half_waste / tile_waste;
  const double copies =
      2.0 * shape.depth * (1.2 * shape.rows / tile_waste + 0.7 * shape.columns) / 35;
  const double steps = taps * tile_waste * k_blocks / groups / slices;  // of an item
  // Clocks of an item's end, half of them beside the next item with pingpong.
  const bool finished = groups == 1 && slices == 1;
  const double end = 3800 + (finished ? 0.024 : 0.092) * (shape.pingpong ? 0.5 : 1.0) * shape.rows *
                                std::min(shape.columns, sizes.c_out);
  const double items = std::ceil(rows / shape.rows) * groups * column_blocks * slices;
  const double turns = items <= sms ? 1.2 : items / sms + 0.98;
  constexpr double clock = 1.6e9;
  constexpr double launching = 12e-6;
  const double buffers = slices > 1 ? groups * slices : 0;
  const double adding = slices > 1 ? 2.4e-6 + 8 * rows * sizes.c_out * buffers / 8.6e12 : 0;
  const double weights = 2.0 * sizes.taps * sizes.c_in * sizes.c_out;
  const double memory = (2.0 * rows * (sizes.c_in + sizes.c_out) + weights) / 3.5e12;
  const double items_time = turns * (steps * std::max(products, copies) + end) / clock;
  return launching + std::max(items_time, memory) + adding;
}

ScheduleOptions schedule(const Kernel& kernel, const Problem& problem) {
  const Row& row = row_of(kernel);
  return {.order = ScheduleOptions::Order::by_mask,
          .groups = groups_of(row, problem.geometry.taps()),
          .tile_rows = shapes[row.shape].rows,
          .chunk_rows = one_chunk};
}

}  // namespace

std::vector<Kernel> implicit_gemm_sm90_kernels() {
  std::vector<Kernel> rows;
  for (const Row& row : family_rows) {
    const Shape& shape = shapes[row.shape];
    const Algorithm algorithm =
        row.split ? Algorithm::masked_implicit_gemm_splitk : Algorithm::masked_implicit_gemm;
    rows.push_back({.name = join(name(algorithm), "_sm90/", name(row.dtype), "/", shape.rows, "x",
                                 shape.columns, ".g", row.groups),
                    .algorithm = algorithm,
                    .slices = row.split ? 16 : 1,
                    .why_not = why_not,
                    .cost = cost,
                    .schedule = schedule,
                    .launch = launch_pass,
                    .family = &row});
  }
  return rows;
}

}  // namespace voxgemm::cuda
