// SPDX-License-Identifier: Apache-2.0
#include "cuda/kernels/implicit_gemm_sm80.h"

#include <algorithm>
#include <cmath>

#include "cuda/aligned.h"
#include "cuda/device.h"
#include "cuda/kernels/implicit_gemm_sm80_launch.h"

namespace voxgemm::cuda {
namespace {

using sm80::ConvVariant;
using sm80::Math;

const ConvVariant& variant_of(const Kernel& kernel) {
  return *static_cast<const ConvVariant*>(kernel.family);
}

std::string why_not(const Kernel& kernel, const Problem& problem) {
  const ConvVariant& variant = variant_of(kernel);
  std::string reason = sm80::why_not(variant.math, sm80::conv_shared_bytes(variant), problem);
  if (!reason.empty() || problem.pass != Pass::grad_weight) return reason;
  return "computes forward and grad_input";
}

// Time of a product over that at the device's rate for the arithmetic.
double slowness(Math math) {
  switch (math) {
    case Math::f16:
    case Math::bf16:
      return 0.55;  // the rate is that of company, which the other terms have too
    case Math::tf32:
      return 2.1;
    case Math::bf16x3:
      return 1.1;
    case Math::bf16x6:
      return 1.5;
    case Math::ieee:
      return 1.3;
  }
  return 1;
}

// The sum of what a CTA does, for as many as a multiprocessor has, and of its stages in a row,
// which no company hides. Fitted to 1,600 times of 150 problems on an H200, in every arithmetic.
double cost(const Kernel& kernel, const Problem& problem) {
  const ConvVariant& variant = variant_of(kernel);
  const sm80::Rates rates = sm80::rates_of(variant.math, problem.architecture);
  const bool backward = problem.pass == Pass::grad_input;
  const double c_in = backward ? problem.c_out : problem.c_in;
  const double c_out = backward ? problem.c_in : problem.c_out;
  const auto rows = static_cast<double>(problem.n_out);
  const auto size = static_cast<double>(size_of(problem.dtype));
  const double taps = problem.geometry.taps();
  // What a tile multiplies of absent neighbours: sorted by mask little; else nearly every tap of a
  // surface is in some of 16 neighbouring rows.
  const double pairs_of_row = problem.expected_pairs() / std::max(rows, 1.0);
  const double taps_of_row =
      std::min(taps, variant.masked ? 1.15 * pairs_of_row + 0.5 : 2.1 * pairs_of_row);
  const double ctas =
      std::ceil(rows / variant.rows) * std::ceil(c_out / variant.cols) * variant.slices;
  const double turns = std::max(ctas / rates.multiprocessors, 1.0);
  const double channels = std::ceil(c_in * size / 16) * 16 / size;
  const double stages = std::max(std::ceil(c_in * size / 64) / variant.slices, 0.3);  // of a tap
  const double per_sm = rates.multiprocessors;
  const double products = double(variant.rows) * variant.cols * channels / variant.slices *
                          slowness(variant.math) * per_sm / rates.products;
  // Of rows and weights, from the second-level cache.
  const double copies = stages * 64 * (variant.rows + variant.cols) * per_sm / (3.5 * rates.bytes);
  const double end = 2.7e-10 * variant.rows * variant.cols;
  const double work = turns * (taps_of_row * (products + copies + 9e-9 * stages) + end);
  const double chain = 3.2e-7 * taps * stages;
  const double moved = (rows * (c_in + c_out) + taps * c_in * c_out) * size + rows * taps * 4;
  const double sums = variant.slices > 1 ? 2.0 * variant.slices * rows * c_out * 4 : 0;
  const double launches = variant.slices > 1 ? 8.4e-6 : 5.1e-6;
  return launches + work + chain + (moved + sums) / (2.3 * rates.bytes);
}

ScheduleOptions schedule(const Kernel& kernel, const Problem& problem) {
  const ConvVariant& variant = variant_of(kernel);
  if (!variant.masked) return {.tile_rows = variant.rows, .chunk_rows = variant.rows};
  return {.order = ScheduleOptions::Order::by_mask,
          .groups = static_cast<int>(ceil_div(problem.geometry.taps(), 32)),
          .tile_rows = variant.rows,
          .chunk_rows = one_chunk};
}

void launch_pass(const Kernel& kernel, const Context& ctx, Pass, const ConvArgs& args) {
  const DeviceGuard guard(ctx.device);
  const AlignedMatrix x = aligned_input(ctx, args.x);
  const AlignedWeights w = aligned_weights(ctx, args.w);
  const AlignedMatrix y = aligned_output(ctx, args.y);
  ConvArgs aligned = args;
  aligned.x = x.matrix;
  aligned.w = w.weights;
  aligned.y = y.matrix;
  const ConvVariant& variant = variant_of(kernel);
  sm80::dispatch(variant.math, [&]<Math math>() { sm80::convolve<math>(ctx, variant, aligned); });
  write_back(ctx, y, args.y);
}

std::vector<ConvVariant> variants() {
  std::vector<ConvVariant> list;
  for (const Math math : sm80::all_math) {
    const bool is_16bit = math == Math::f16 || math == Math::bf16;
    for (const bool masked : {true, false}) {
      // 128 columns of f32 operands, in pieces of bf16, would not fit a thread's registers.
      if (is_16bit) list.push_back({math, 128, 128, masked});
      list.push_back({math, 128, 64, masked});
      list.push_back({math, 128, 32, masked});
      list.push_back({math, 64, 64, masked});
      list.push_back({math, 64, 64, masked, 4});
    }
    list.push_back({math, 64, 64, true, 16});
  }
  return list;
}

Kernel row_of(const ConvVariant& variant) {
  const Algorithm algorithm = sm80::algorithm_of(variant.masked, variant.slices > 1);
  const std::string slices = variant.slices > 1 ? join(".k", variant.slices) : "";
  return {.name = join(name(algorithm), "_sm80/", sm80::name(variant.math), "/", variant.rows, "x",
                       variant.cols, slices),
          .algorithm = algorithm,
          .slices = variant.slices,
          .why_not = why_not,
          .cost = cost,
          .schedule = schedule,
          .launch = launch_pass,
          .family = &variant};
}

}  // namespace

std::vector<Kernel> implicit_gemm_sm80_kernels() {
  static const std::vector<ConvVariant> all = variants();
  std::vector<Kernel> rows;
  rows.reserve(all.size());
  for (const ConvVariant& variant : all) rows.push_back(row_of(variant));
  return rows;
}

}  // namespace voxgemm::cuda
