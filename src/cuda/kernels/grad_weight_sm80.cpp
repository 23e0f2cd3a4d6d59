// SPDX-License-Identifier: Apache-2.0
#include "cuda/kernels/grad_weight_sm80.h"

#include <algorithm>
#include <cmath>

#include "cuda/aligned.h"
#include "cuda/device.h"
#include "cuda/kernels/grad_weight_sm80_launch.h"

namespace voxgemm::cuda {
namespace {

using sm80::GradCut;
using sm80::GradVariant;
using sm80::Math;

const GradVariant& variant_of(const Kernel& kernel) {
  return *static_cast<const GradVariant*>(kernel.family);
}

std::string why_not(const Kernel& kernel, const Problem& problem) {
  const GradVariant& variant = variant_of(kernel);
  std::string reason = sm80::why_not(variant.math, sm80::grad_shared_bytes(variant), problem);
  if (!reason.empty() || problem.pass == Pass::grad_weight) return reason;
  return "computes grad_weight";
}

// CTAs that a multiprocessor holds.
int places(const GradVariant& variant) { return variant.cols == 128 || variant.rows == 64 ? 2 : 3; }

// Time of a product over that at the device's rate for the arithmetic.
double slowness(Math math) {
  switch (math) {
    case Math::f16:
    case Math::bf16:
      return 1.15;
    case Math::tf32:
    case Math::bf16x3:
      return 2.4;
    case Math::bf16x6:
      return 1.9;
    case Math::ieee:
      return 1.7;
  }
  return 1;
}

// The sum of what a CTA does, for as many as a multiprocessor has, and of its granules in a row,
// which no company hides. Fitted to 350 times of 70 problems on an H200, in every arithmetic.
double cost(const Kernel& kernel, const Problem& problem) {
  const GradVariant& variant = variant_of(kernel);
  const sm80::Rates rates = sm80::rates_of(variant.math, problem.architecture);
  const auto size = static_cast<double>(size_of(problem.dtype));
  const double taps = problem.geometry.taps();
  const auto rows = static_cast<double>(problem.n_out);
  const GradCut cut = sm80::cut_gradient(
      variant, {problem.geometry.taps(), problem.c_in, problem.c_out, problem.n_out});
  // Of 64 rows: a CTA passes over those that have none of its taps.
  const double granules = std::ceil(rows / 64) / cut.slices;
  const double present = std::min(
      1.0, problem.expected_pairs() / std::max(rows * taps, 1.0) * (variant.masked ? 1.15 : 1.75));
  const double channels = std::ceil(problem.c_in * size / 16) * 16 / size;
  const double taps_of_cta = std::min(taps / cut.groups, variant.rows / channels + 0.5);
  const double visited = granules * (1 - std::pow(1 - present, std::max(taps_of_cta, 1.0)));
  const double turns = std::max(double(cut.ctas()) / rates.multiprocessors, 1.0);
  const double per_sm = rates.multiprocessors;
  const double products =
      64.0 * variant.rows * variant.cols * slowness(variant.math) * per_sm / rates.products;
  // Of rows, from the second-level cache.
  const double copies = 64 * size * (variant.rows + variant.cols) * per_sm / (3.6 * rates.bytes);
  const double end = 4.1e-10 * variant.rows * variant.cols;
  const double work = turns * (visited * (products + copies + 7.5e-8) + end);
  const double chain = 6.1e-7 * visited + 1.2e-8 * granules;
  const double dw_bytes = taps * problem.c_in * problem.c_out * 4;
  const double sums = cut.slices > 1 ? 2 * cut.slices * dw_bytes : 0;
  const double moved = rows * (problem.c_in + problem.c_out) * size + rows * taps * 4 + dw_bytes;
  const double launches = cut.slices > 1 ? 9.6e-6 : 5.6e-6;
  return launches + work + chain + moved / (1.2 * rates.bytes) + sums / (3 * rates.bytes);
}

ScheduleOptions schedule(const Kernel& kernel, const Problem& problem) {
  if (!variant_of(kernel).masked) return {.tile_rows = 64, .chunk_rows = 64};
  return {.order = ScheduleOptions::Order::by_mask,
          .groups = static_cast<int>(ceil_div(problem.geometry.taps(), 32)),
          .tile_rows = 128,
          .chunk_rows = one_chunk};
}

void launch_pass(const Kernel& kernel, const Context& ctx, Pass, const ConvArgs& args) {
  const DeviceGuard guard(ctx.device);
  check(args.w.dtype == args.x.dtype || args.w.dtype == Dtype::f32,
        "the weight gradient has dtype ", name(args.w.dtype), ", expected f32 or that of x");
  const AlignedMatrix x = aligned_input(ctx, args.x);
  const AlignedMatrix dy = aligned_input(ctx, args.y);
  ConvArgs aligned = args;
  aligned.x = x.matrix;
  aligned.y = dy.matrix;
  const GradVariant& variant = variant_of(kernel);
  sm80::dispatch(variant.math,
                 [&]<Math math>() { sm80::grad_weight<math>(ctx, variant, aligned); });
}

std::vector<GradVariant> variants() {
  std::vector<GradVariant> list;
  for (const Math math : sm80::all_math) {
    const bool is_16bit = math == Math::f16 || math == Math::bf16;
    const int rows = is_16bit ? 128 : 64;
    for (const bool masked : {true, false}) {
      if (is_16bit) list.push_back({math, 128, 128, masked});
      list.push_back({math, rows, 64, masked});
      list.push_back({math, rows, 64, masked, true});
    }
  }
  return list;
}

Kernel row_of(const GradVariant& variant) {
  const Algorithm algorithm = sm80::algorithm_of(variant.masked, variant.many_slices);
  return {.name = join(name(algorithm), "_grad_weight_sm80/", sm80::name(variant.math), "/",
                       variant.rows, "x", variant.cols),
          .algorithm = algorithm,
          .why_not = why_not,
          .cost = cost,
          .schedule = schedule,
          .launch = launch_pass,
          .family = &variant};
}

}  // namespace

GradCut sm80::cut_gradient(const GradVariant& variant, const GradSize& size) {
  const int64_t element = variant.math == Math::f16 || variant.math == Math::bf16 ? 2 : 4;
  const int64_t per_piece = 16 / element;
  GradCut cut;
  cut.groups = variant.masked ? static_cast<int>(ceil_div(size.taps, 32)) : 1;
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
  const double best = std::sqrt(0.7 * work * 132 * places(variant) / double(cut.ctas()) / slice);
  // At least 128 rows a slice; the sums of all slices in 64 MB, or one slice.
  const double most = std::min(double(size.rows) / 128, double(64 << 20) / (4 * gradient));
  const double wanted = variant.many_slices ? 4 * best : best;
  cut.slices = static_cast<int>(std::max(1.0, std::min({wanted, most, 1024.0})));
  return cut;
}

std::vector<Kernel> grad_weight_sm80_kernels() {
  static const std::vector<GradVariant> all = variants();
  std::vector<Kernel> rows;
  rows.reserve(all.size());
  for (const GradVariant& variant : all) rows.push_back(row_of(variant));
  return rows;
}

}  // namespace voxgemm::cuda
