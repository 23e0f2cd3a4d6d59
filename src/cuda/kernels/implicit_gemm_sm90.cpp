// SPDX-License-Identifier: Apache-2.0
#include "cuda/kernels/families.h"

#include <algorithm>
#include <cmath>

#include "cuda/aligned.h"
#include "cuda/device.h"
#include "cuda/kernels/families_sm90.h"

namespace voxgemm::cuda {
namespace {

using sm90::Math;
using sm90::Shape;
using sm90::shapes;

// A row of the registry.
struct Row {
  int shape = 0;
  int groups = 1;  // more where 32 taps a group ask for it
  bool split = false;
  Math math = Math::f16;
};
// Of every arithmetic that the shape is for.
constexpr Row all_rows[] = {{0, 1}, {0, 2},       {0, 3},       {1, 1},      {2, 1},
                            {2, 3}, {3, 1},       {3, 3},       {4, 1},      {5, 1},
                            {6, 1}, {0, 1, true}, {2, 1, true}, {3, 1, true}};
std::vector<Row> family_rows() {
  std::vector<Row> rows;
  for (const Math math : {Math::f16, Math::bf16, Math::tf32, Math::bf16x3, Math::bf16x6}) {
    for (Row row : all_rows) {
      row.math = math;
      if (sm90::is_for(math, shapes[row.shape])) rows.push_back(row);
    }
  }
  return rows;
}

const Row& row_of(const Kernel& kernel) { return *static_cast<const Row*>(kernel.family); }

// Taps of a group are bits of a mask; only rows of three groups take kernels that need more.
constexpr int most_taps = 32;
constexpr int most_groups = 3;

int groups_of(const Row& row, int taps) {
  return std::min(taps, std::max(row.groups, static_cast<int>(ceil_div(taps, most_taps))));
}

// Slices for items to fill the SMs of an H100 or H200 once: a partial sum costs more than the end
// of a second wave. Not asked of the device: results depend on it.
constexpr int sms = 132;
int slices_of(const Row& row, const Sizes& sizes) {
  if (!row.split) return 0;
  const Shape& shape = shapes[row.shape];
  const int64_t items = ceil_div(sizes.rows, shape.rows) * groups_of(row, sizes.taps) *
                        ceil_div(sizes.c_out, shape.columns);
  // A slice of less than four steps is all beginning and end.
  const int64_t steps = sizes.taps / groups_of(row, sizes.taps) * ceil_div(sizes.c_in, shape.depth);
  const int64_t most = std::clamp<int64_t>(steps / 4, 1, 16);
  return static_cast<int>(std::clamp<int64_t>(sms / std::max<int64_t>(items, 1), 1, most));
}

void launch_pass(const Kernel& kernel, const Context& ctx, Pass, const ConvArgs& args) {
  const Row& row = row_of(kernel);
  const Matrix x = aligned_input(ctx, args.x);
  const Matrix y = aligned_output(ctx, args.y);
  const Matrix residual = aligned_input(ctx, args.residual);
  ConvArgs aligned = args;
  aligned.y = y;
  aligned.residual = residual;
  sm90::Operands operands;
  if (!sm80::is_16bit(row.math)) {
    const sm90::SplitBlock block = sm90::split_block(row.math);
    operands = sm90::split_operands(ctx, row.math, {sm90::as_weights(x), block}, {args.w, block});
  } else {
    const AlignedWeights w = aligned_weights(ctx, args.w);
    operands = {x, w, w.memory};
  }
  Sizes sizes(args);
  sizes.c_in = operands.w.c_in;
  const int slices = slices_of(row, sizes);
  sm80::dispatch(row.math, [&]<Math math>() {
    if constexpr (math != Math::ieee) {
      sm90::convolve<math>(ctx, aligned, operands, row.shape, slices);
    }
  });
  write_back(ctx, y, args.y);
}

std::string limits(const Kernel& kernel, const Problem& problem) {
  const Row& row = row_of(kernel);
  std::string reason = sm90::limits(row.math, problem);
  if (!reason.empty()) return reason;
  const int taps = problem.geometry.taps();
  if (row.groups < most_groups && taps > most_taps * row.groups) {
    return join("takes at most ", most_taps * row.groups, " taps, the kernel has ", taps);
  }
  return "";
}

// Executed over useful products of tiles of so many rows sorted by mask, where every row has about
// half of the taps: as counted on shells of 4 thousand to 4 million voxels, where it falls with the
// number of rows that share a mask, and groups of taps multiply that.
double waste(double rows, int tile_rows, int groups) {
  const double sharing = rows / 25e3 * 128 / tile_rows * std::pow(4.3, groups - 1);
  return 1 + 1 / (1 + std::pow(sharing, 0.75));
}

// Fitted on one H200; what is left of the error is corrected (conv/correction.h).
double cost(const Kernel& kernel, const Problem& problem) {
  const Row& row = row_of(kernel);
  const Shape& shape = shapes[row.shape];
  Sizes sizes(problem);
  if (!sm80::is_16bit(row.math)) {
    sizes.c_in = sm90::split_channels(sm90::split_block(row.math), sizes.c_in);
  }
  const int groups = groups_of(row, sizes.taps);
  const int slices = std::max(slices_of(row, sizes), 1);
  const auto rows = static_cast<double>(std::max<int64_t>(sizes.rows, 1));
  const auto k_blocks = static_cast<double>(ceil_div(sizes.c_in, shape.depth));
  const auto column_blocks = static_cast<double>(ceil_div(sizes.c_out, shape.columns));
  const double taps = std::max(problem.expected_pairs() / rows, 1e-3);  // of a row
  const double tile_waste = std::min(waste(rows, shape.rows, groups), sizes.taps / taps);
  // Clocks of a step: products at 4096 a clock, and copies at 35 bytes a clock, of rows that are
  // there and of weights that neighbours in part share.
  const bool pieces = row.math == Math::bf16x3 || row.math == Math::bf16x6;
  const double products =
      (pieces ? 1.5 : 1.0) * 2.0 * shape.rows * shape.columns * shape.depth / 4096;
  const double copies =
      2.0 * shape.depth * (1.2 * shape.rows / tile_waste + 0.7 * shape.columns) / 35;
  const double steps = taps * tile_waste * k_blocks / groups / slices;  // of an item
  // Clocks of an item's end, most of which partial sums take.
  const double end = 2000 + (groups == 1 && slices == 1 ? 0.024 : 0.092) * shape.rows *
                                std::min(shape.columns, sizes.c_out);
  const double items = std::ceil(rows / shape.rows) * groups * column_blocks * slices;
  const double turns = items <= sms ? 1.2 : items / sms + 0.5;
  const double adding = slices > 1 ? 2.4e-6 + rows * sizes.c_out * groups * slices / 1.1e12 : 0;
  const double splitting =
      !sm80::is_16bit(row.math)
          ? 4e-6 + (rows * sizes.c_in + double(sizes.taps) * sizes.c_in * sizes.c_out) / 0.9e12
          : 0;
  return 12e-6 + splitting + turns * (steps * std::max(products, copies) + end) / 1.6e9 + adding;
}

ScheduleOptions schedule(const Kernel& kernel, const Problem& problem) {
  const Row& row = row_of(kernel);
  return {.order = ScheduleOptions::Order::by_mask,
          .groups = groups_of(row, problem.geometry.taps()),
          .tile_rows = shapes[row.shape].rows,
          .chunk_rows = sm90::chunk_rows(problem.n_out)};
}

}  // namespace

std::string sm90::limits(Math math, const Problem& problem) {
  std::string reason = sm80::limits(math, problem);
  if (!reason.empty() || problem.architecture / 10 == 9) return reason;
  return join("runs on compute capability 9.x only, this is ", problem.architecture / 10, ".",
              problem.architecture % 10);
}

std::vector<Kernel> implicit_gemm_sm90_kernels() {
  static const std::vector<Row> family = family_rows();
  std::vector<Kernel> rows;
  for (const Row& row : family) {
    const Shape& shape = shapes[row.shape];
    const Algorithm algorithm =
        row.split ? Algorithm::masked_implicit_gemm_splitk : Algorithm::masked_implicit_gemm;
    rows.push_back({.name = join(name(algorithm), "_sm90/", sm80::name(row.math), "/", shape.rows,
                                 "x", shape.columns, ".g", row.groups),
                    .algorithm = algorithm,
                    .dtype = sm80::dtype_of(row.math),
                    .precision = sm80::precision_of(row.math),
                    .passes = Passes::convolutions,
                    .slices = row.split ? 16 : 1,
                    .limits = limits,
                    .cost = cost,
                    .schedule = schedule,
                    .launch = launch_pass,
                    .family = &row});
  }
  return rows;
}

}  // namespace voxgemm::cuda
