// SPDX-License-Identifier: Apache-2.0
#include "cuda/kernels/families_sm80.h"

#include <cmath>

#include "cuda/aligned.h"
#include "cuda/device.h"
#include "cuda/kernels/families.h"

namespace voxgemm::cuda {
namespace {

using sm80::GradCut;
using sm80::Math;
using sm80::Variant;

const Variant& variant_of(const Kernel& kernel) {
  return *static_cast<const Variant*>(kernel.family);
}

std::string why_not(const Kernel& kernel, const Problem& problem) {
  const Variant& variant = variant_of(kernel);
  std::string reason = sm80::why_not(variant.math, problem);
  if (!reason.empty()) return reason;
  if ((problem.pass == Pass::grad_weight) != variant.gradient) {
    return variant.gradient ? "computes grad_weight" : "computes forward and grad_input";
  }
  if (problem.architecture < 80 && (variant.gradient || variant.rows > 64)) {
    return "needs more shared memory than compute capability 7.5 has";
  }
  const int64_t positions = problem.n_out * variant.groups(problem.geometry.taps());
  if (positions <= INT32_MAX) return "";
  return join("its schedule would have ", positions, " positions, more than 2^31");
}

// The sum of what a CTA does, for as many as a multiprocessor has, and of its stages in a row,
// which no company hides. Fitted to 1,600 times of 150 problems on an H200, in every arithmetic.
double conv_cost(const Variant& variant, const Problem& problem) {
  const sm80::Rates rates = sm80::rates_of(variant.math, problem.architecture);
  // Time of a product over that at the device's rate, which is that of company at 16 bits: the
  // other terms have it too.
  constexpr double slowness[] = {0.55, 0.55, 2.1, 1.1, 1.5, 1.3};  // by Math
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
      std::min(taps, variant.masked() ? 1.15 * pairs_of_row + 0.5 : 2.1 * pairs_of_row);
  const double ctas =
      std::ceil(rows / variant.rows) * std::ceil(c_out / variant.cols) * variant.slices;
  const double turns = std::max(ctas / rates.multiprocessors, 1.0);
  const double channels = std::ceil(c_in * size / 16) * 16 / size;
  const double stages = std::max(std::ceil(c_in * size / 64) / variant.slices, 0.3);  // of a tap
  const double products = double(variant.rows) * variant.cols * channels / variant.slices *
                          slowness[int(variant.math)] / rates.products;
  // Of rows and weights, from the second-level cache.
  const double copies = stages * 64 * (variant.rows + variant.cols) / (3.5 * rates.bytes);
  const double end = 2.7e-10 * variant.rows * variant.cols;
  const double work = turns * (taps_of_row * (products + copies + 9e-9 * stages) + end);
  const double chain = 3.2e-7 * taps * stages;
  const double moved = (rows * (c_in + c_out) + taps * c_in * c_out) * size + rows * taps * 4;
  const double sums = variant.slices > 1 ? 2.0 * variant.slices * rows * c_out * 4 : 0;
  const double launches = variant.slices > 1 ? 8.4e-6 : 5.1e-6;
  return launches + work + chain + (moved + sums) / (2.3 * rates.bytes * rates.multiprocessors);
}

// The sum of what a CTA does, for as many as a multiprocessor has, and of its granules in a row,
// which no company hides. Fitted to 350 times of 70 problems on an H200, in every arithmetic.
double grad_cost(const Variant& variant, const Problem& problem) {
  const sm80::Rates rates = sm80::rates_of(variant.math, problem.architecture);
  // As above.
  constexpr double slowness[] = {1.15, 1.15, 2.4, 2.4, 1.9, 1.7};
  const auto size = static_cast<double>(size_of(problem.dtype));
  const double taps = problem.geometry.taps();
  const auto rows = static_cast<double>(problem.n_out);
  const GradCut cut = sm80::cut_gradient(
      variant, {problem.geometry.taps(), problem.c_in, problem.c_out, problem.n_out});
  // Of 64 rows: a CTA passes over those that have none of its taps.
  const double granules = std::ceil(rows / 64) / cut.slices;
  const double present = std::min(1.0, problem.expected_pairs() / std::max(rows * taps, 1.0) *
                                           (variant.masked() ? 1.15 : 1.75));
  const double channels = std::ceil(problem.c_in * size / 16) * 16 / size;
  const double taps_of_cta = std::min(taps / cut.groups, variant.rows / channels + 0.5);
  const double visited = granules * (1 - std::pow(1 - present, std::max(taps_of_cta, 1.0)));
  const double turns = std::max(double(cut.ctas()) / rates.multiprocessors, 1.0);
  const double products =
      64.0 * variant.rows * variant.cols * slowness[int(variant.math)] / rates.products;
  // Of rows, from the second-level cache.
  const double copies = 64 * size * (variant.rows + variant.cols) / (3.6 * rates.bytes);
  const double end = 4.1e-10 * variant.rows * variant.cols;
  const double work = turns * (visited * (products + copies + 7.5e-8) + end);
  const double chain = 6.1e-7 * visited + 1.2e-8 * granules;
  const double dw_bytes = taps * problem.c_in * problem.c_out * 4;
  const double sums = cut.slices > 1 ? 2 * cut.slices * dw_bytes : 0;
  const double moved = rows * (problem.c_in + problem.c_out) * size + rows * taps * 4 + dw_bytes;
  const double launches = cut.slices > 1 ? 9.6e-6 : 5.6e-6;
  const double memory = (moved / 1.2 + sums / 3) / (rates.bytes * rates.multiprocessors);
  return launches + work + chain + memory;
}

double cost(const Kernel& kernel, const Problem& problem) {
  const Variant& variant = variant_of(kernel);
  const double pass = variant.gradient ? grad_cost(variant, problem) : conv_cost(variant, problem);
  if (variant.algorithm != Algorithm::explicit_gemm) return pass;
  // Of each tap a launch, and its list, which no other row shares.
  return pass + problem.geometry.taps() * (5e-6 + 4e-11 * double(problem.n_out));
}

ScheduleOptions schedule(const Kernel& kernel, const Problem& problem) {
  const Variant& variant = variant_of(kernel);
  const int rows = !variant.gradient ? variant.rows : variant.masked() ? 128 : 64;
  if (!variant.masked()) return {.tile_rows = rows, .chunk_rows = rows};
  return {.order = ScheduleOptions::Order::by_mask,
          .groups = variant.groups(problem.geometry.taps()),
          .tile_rows = rows,
          .chunk_rows = one_chunk};
}

void launch_pass(const Kernel& kernel, const Context& ctx, Pass, const ConvArgs& args) {
  const Variant& variant = variant_of(kernel);
  const bool gradient = variant.gradient;
  const AlignedMatrix x = aligned_input(ctx, args.x);
  const AlignedMatrix y = gradient ? aligned_input(ctx, args.y) : aligned_output(ctx, args.y);
  const AlignedWeights w =
      gradient ? AlignedWeights{args.w, nullptr} : aligned_weights(ctx, args.w);
  const AlignedMatrix residual = aligned_input(ctx, args.residual);
  ConvArgs aligned = args;
  aligned.x = x.matrix;
  aligned.y = y.matrix;
  aligned.w = w.weights;
  aligned.residual = residual.matrix;
  sm80::dispatch(variant.math, [&]<Math math>() {
    const auto run = gradient ? sm80::grad_weight<math> : sm80::convolve<math>;
    run(ctx, variant, aligned);
  });
  if (!gradient) write_back(ctx, y, args.y);
}

std::vector<Variant> variants() {
  std::vector<Variant> list;
  for (const Math math : sm80::all_math) {
    for (const Algorithm algorithm :
         {Algorithm::masked_implicit_gemm, Algorithm::implicit_gemm, Algorithm::explicit_gemm}) {
      // 128 columns of f32 operands, in pieces of bf16, would not fit a thread's registers.
      const bool wide = sm80::is_16bit(math);
      for (const bool gradient : {false, true}) {
        if (wide) list.push_back({gradient, math, 128, 128, algorithm});
        list.push_back({gradient, math, gradient && !wide ? 64 : 128, 64, algorithm});
      }
      list.push_back({false, math, 128, 32, algorithm});
      list.push_back({false, math, 64, 64, algorithm});
    }
    list.push_back({false, math, 64, 64, Algorithm::implicit_gemm_splitk, 4});
    list.push_back({false, math, 64, 64, Algorithm::masked_implicit_gemm_splitk, 4});
    list.push_back({false, math, 64, 64, Algorithm::masked_implicit_gemm_splitk, 16});
  }
  return list;
}

// A gradient's reduction is always cut.
std::vector<Algorithm> also(const Variant& variant) {
  if (!variant.gradient || variant.algorithm == Algorithm::explicit_gemm) return {};
  return {variant.masked() ? Algorithm::masked_implicit_gemm_splitk
                           : Algorithm::implicit_gemm_splitk};
}

Kernel row_of(const Variant& variant) {
  return {.name = join(name(variant.algorithm), variant.gradient ? "_grad_weight" : "", "_sm80/",
                       sm80::name(variant.math), "/", variant.rows, "x", variant.cols,
                       variant.slices > 1 ? join(".k", variant.slices) : ""),
          .algorithm = variant.algorithm,
          .also = also(variant),
          .slices = variant.slices,
          .why_not = why_not,
          .cost = cost,
          .schedule = schedule,
          .launch = launch_pass,
          .family = &variant};
}

}  // namespace

GradCut sm80::cut_gradient(const Variant& variant, const GradSize& size) {
  const int64_t element = sm80::is_16bit(variant.math) ? 2 : 4;
  const int64_t per_piece = 16 / element;
  GradCut cut;
  cut.groups = variant.groups(size.taps);
  const int64_t pieces = ceil_div(size.taps, cut.groups) * ceil_div(size.c_in, per_piece);
  cut.row_blocks = static_cast<int>(ceil_div(pieces * per_piece, variant.rows));
  cut.column_blocks = static_cast<int>(ceil_div(size.c_out, variant.cols));
  // Work w of a device that is full, over s slices, takes about w (1 + 0.7 * places / ctas), places
  // being the CTAs it holds: taps have unlike numbers of pairs, and the last wave is seldom full.
  // The slices' sums, written and read, go at 1.2 TB/s. Both together are least at the root below.
  // Rates of an H200, so that the bits are the same on every device.
  const bool wide = variant.cols == 128;
  const double rate = (wide ? 1.2e14 : 0.9e14) / sm80::products_of(variant.math);
  const double gradient = double(size.taps) * size.c_in * size.c_out;
  const double work = 0.6 * double(size.rows) * gradient / rate;
  const double slice = 2 * 4 * gradient / 1.2e12;
  const int places = wide || variant.rows == 64 ? 2 : 3;  // of a multiprocessor
  const double best = std::sqrt(0.7 * work * 132 * places / double(cut.ctas()) / slice);
  // At least 128 rows a slice; the sums of all slices in 64 MB, or one slice.
  const double most = std::min(double(size.rows) / 128, double(64 << 20) / (4 * gradient));
  cut.slices = static_cast<int>(std::max(1.0, std::min({best, most, 1024.0})));
  return cut;
}

std::vector<Kernel> sm80_kernels() {
  static const std::vector<Variant> all = variants();
  std::vector<Kernel> rows;
  rows.reserve(all.size());
  for (const Variant& variant : all) rows.push_back(row_of(variant));
  return rows;
}

}  // namespace voxgemm::cuda
