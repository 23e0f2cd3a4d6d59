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
  const std::string reason = sm80::why_not(variant.math, sm80::conv_shared_bytes(variant), problem);
  if (!reason.empty() || problem.pass != Pass::grad_weight) return reason;
  return "computes forward and grad_input";
}

// Of the device's rate for the arithmetic, at many channels: measured on an H200 in f16.
double efficiency(const ConvVariant& variant) {
  if (variant.cols == 128) return 0.62;
  if (variant.cols == 32) return 0.33;
  return variant.rows == 128 ? 0.5 : 0.49;
}

// Waves of CTAs, each as long as its stages, and no less than the longest; then the sums of slices.
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
  const double places = variant.cols == 128 ? 2 : 3;  // of a multiprocessor
  // A CTA alone on its multiprocessor is faster than in company, but does not fill it.
  const double company = 0.4 * places + 0.6 * std::clamp(ctas / rates.multiprocessors, 1.0, places);
  const double channels = std::ceil(c_in * size / 16) * 16 / size;
  const double tap_seconds = double(variant.rows) * variant.cols * channels / variant.slices *
                             rates.multiprocessors * company /
                             (rates.products * efficiency(variant));
  // First and last stages, and the way out.
  constexpr double ends = 6e-6;
  const double waves = ctas / (rates.multiprocessors * places);
  const double compute =
      std::max(waves * (taps_of_row * tap_seconds + ends), taps * tap_seconds + ends);
  const double moved = (rows * (c_in + c_out) + taps * c_in * c_out) * size + rows * taps * 4;
  const double sums = variant.slices > 1 ? 2.0 * variant.slices * rows * c_out * 4 : 0;
  const double launches = variant.slices > 1 ? 2 : 1;
  return 3e-6 * launches + std::max(compute, moved / rates.bytes) + sums / rates.bytes;
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
  for (const ConvVariant& variant : all) rows.push_back(row_of(variant));
  return rows;
}

}  // namespace voxgemm::cuda
