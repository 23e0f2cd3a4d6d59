// SPDX-License-Identifier: Apache-2.0
#include "cuda/kernels/families.h"

#include <cmath>

#include "cuda/aligned.h"
#include "cuda/device.h"

namespace voxgemm::cuda {
namespace {

using sm80::GradCut;
using sm80::Math;
using sm80::Variant;

struct Facts {
  std::string_view name;
  Dtype dtype;
  Precision precision;  // of f32
  int architecture;     // the first that has it
  double products;      // the time of a product, in products of 16 bits
  // Of the cost models: the time of a product over that at the device's rate.
  double forward;
  double gradient;
};
constexpr Facts all_facts[] = {
    // By Math.
    {"f16", Dtype::f16, Precision::ieee, 75, 1, 0.55, 1.15},
    {"bf16", Dtype::bf16, Precision::ieee, 80, 1, 0.55, 1.15},
    {"tf32", Dtype::f32, Precision::tf32, 80, 2, 2.1, 2.4},
    {"bf16x3", Dtype::f32, Precision::bf16x3, 80, 3, 1.1, 2.4},
    {"bf16x6", Dtype::f32, Precision::bf16x6, 80, 6, 1.5, 1.9},
    {"f32", Dtype::f32, Precision::ieee, 75, 12, 1.3, 1.7},
};
const Facts& facts_of(Math math) { return all_facts[static_cast<int>(math)]; }

struct Architecture {
  int number;
  int multiprocessors;  // of the usual product
  double matrix;        // TFLOP/s of its 16-bit matrix instructions of a warp
  double f32;           // TFLOP/s of its f32 arithmetic
  double bandwidth;     // GB/s of its memory

  // Of a multiprocessor, a second: multiply-adds in this arithmetic, at best, and bytes of memory.
  double products(Math math) const {
    const double flops = math == Math::ieee ? f32 : matrix / facts_of(math).products;
    return flops * 1e12 / 2 / multiprocessors;
  }
  double bytes() const { return bandwidth * 1e9 / multiprocessors; }
};
constexpr Architecture architectures[] = {
    {75, 40, 65, 8, 320},      // T4
    {80, 108, 312, 19, 1900},  // A100
    {86, 84, 140, 35, 900},    // RTX 3090, A40
    {87, 16, 40, 5, 200},      // Orin
    {89, 128, 330, 80, 900},   // RTX 4090, L40
    {90, 132, 620, 60, 4400},  // H200: two thirds of what warpgroups reach
    {100, 148, 620, 70, 7000}, {120, 170, 420, 100, 1700},  // RTX 5090
};
// The latest that is not later.
const Architecture& architecture_of(const Problem& problem) {
  const Architecture* device = architectures;
  for (const Architecture& known : architectures) {
    if (known.number <= problem.architecture) device = &known;
  }
  return *device;
}

const Variant& variant_of(const Kernel& kernel) {
  return *static_cast<const Variant*>(kernel.family);
}

std::string limits(const Kernel& kernel, const Problem& problem) {
  const Variant& variant = variant_of(kernel);
  std::string reason = sm80::limits(variant.math, problem);
  if (!reason.empty()) return reason;
  if (problem.architecture < 80 && (variant.gradient || variant.rows > 64)) {
    return "needs more shared memory than compute capability 7.5 has";
  }
  const int64_t positions = problem.n_out * variant.groups(problem.geometry.taps());
  if (positions <= INT32_MAX) return "";
  return join("its schedule would have ", positions, " positions, more than 2^31");
}

// The sum of what a CTA does, for as many as a multiprocessor has, and of its stages in a row,
// which no company hides. (At 16 bits a product takes less than at the device's rate, as the other
// terms have company's part of it too.) Fitted to 1,600 times of 150 problems on an H200.
double conv_cost(const Variant& variant, const Problem& problem) {
  const Architecture& device = architecture_of(problem);
  const Sizes sizes(problem);
  const double c_in = sizes.c_in;
  const double c_out = sizes.c_out;
  const double taps = sizes.taps;
  const auto rows = static_cast<double>(sizes.rows);
  const auto size = static_cast<double>(size_of(problem.dtype));
  // Of absent neighbours a tile sorted by mask multiplies few; else some of 16 rows have any tap.
  const double pairs_of_row = problem.expected_pairs() / std::max(rows, 1.0);
  const double taps_of_row =
      std::min(taps, variant.masked() ? 1.15 * pairs_of_row + 0.5 : 2.1 * pairs_of_row);
  const double ctas =
      std::ceil(rows / variant.rows) * std::ceil(c_out / variant.cols) * variant.slices;
  const double turns = std::max(ctas / device.multiprocessors, 1.0);
  const double channels = std::ceil(c_in * size / 16) * 16 / size;
  const double stages = std::max(std::ceil(c_in * size / 64) / variant.slices, 0.3);  // of a tap
  const double products = double(variant.rows) * variant.cols * channels / variant.slices *
                          facts_of(variant.math).forward / device.products(variant.math);
  // Of rows and weights, from the second-level cache.
  const double copies = stages * 64 * (variant.rows + variant.cols) / (3.5 * device.bytes());
  const double end = 2.7e-10 * variant.rows * variant.cols;
  const double work = turns * (taps_of_row * (products + copies + 9e-9 * stages) + end);
  const double chain = 3.2e-7 * taps * stages;
  const double moved = (rows * (c_in + c_out) + taps * c_in * c_out) * size + rows * taps * 4;
  const double sums = variant.slices > 1 ? 2.0 * variant.slices * rows * c_out * 4 : 0;
  const double launches = variant.slices > 1 ? 8.4e-6 : 5.1e-6;
  return launches + work + chain + (moved + sums) / (2.3 * device.bytes() * device.multiprocessors);
}

// The sum of what a CTA does, for as many as a multiprocessor has, and of its granules in a row,
// which no company hides. Fitted to 350 times of 70 problems on an H200, in every arithmetic.
double grad_cost(const Variant& variant, const Problem& problem) {
  const Architecture& device = architecture_of(problem);
  const auto size = static_cast<double>(size_of(problem.dtype));
  const double taps = problem.geometry.taps();
  const auto rows = static_cast<double>(problem.n_out);
  const GradCut cut = sm80::cut_gradient(variant, problem);
  // Of 64 rows: a CTA passes over those that have none of its taps.
  const double granules = std::ceil(rows / 64) / cut.slices;
  const double present = std::min(1.0, problem.expected_pairs() / std::max(rows * taps, 1.0) *
                                           (variant.masked() ? 1.15 : 1.75));
  const double channels = std::ceil(problem.c_in * size / 16) * 16 / size;
  const double taps_of_cta = std::min(taps / cut.groups, variant.rows / channels + 0.5);
  const double visited = granules * (1 - std::pow(1 - present, std::max(taps_of_cta, 1.0)));
  const double turns = std::max(double(cut.ctas()) / device.multiprocessors, 1.0);
  const double products = 64.0 * variant.rows * variant.cols * facts_of(variant.math).gradient /
                          device.products(variant.math);
  // Of rows, from the second-level cache.
  const double copies = 64 * size * (variant.rows + variant.cols) / (3.6 * device.bytes());
  const double end = 4.1e-10 * variant.rows * variant.cols;
  const double work = turns * (visited * (products + copies + 7.5e-8) + end);
  const double chain = 6.1e-7 * visited + 1.2e-8 * granules;
  const double dw_bytes = taps * problem.c_in * problem.c_out * 4;
  const double sums = cut.slices > 1 ? 2 * cut.slices * dw_bytes : 0;
  const double moved = rows * (problem.c_in + problem.c_out) * size + rows * taps * 4 + dw_bytes;
  const double launches = cut.slices > 1 ? 9.6e-6 : 5.6e-6;
  const double memory = (moved / 1.2 + sums / 3) / (device.bytes() * device.multiprocessors);
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
  const Matrix x = aligned_input(ctx, args.x);
  const Matrix y = gradient ? aligned_input(ctx, args.y) : aligned_output(ctx, args.y);
  const AlignedWeights w = gradient ? AlignedWeights{args.w} : aligned_weights(ctx, args.w);
  const Matrix residual = aligned_input(ctx, args.residual);
  ConvArgs aligned = args;
  aligned.x = x;
  aligned.y = y;
  aligned.w = w;
  aligned.residual = residual;
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

}  // namespace

std::string_view sm80::name(Math math) { return facts_of(math).name; }

Dtype sm80::dtype_of(Math math) { return facts_of(math).dtype; }
Precision sm80::precision_of(Math math) { return facts_of(math).precision; }

std::string sm80::limits(Math math, const Problem& problem) {
  const int needed = facts_of(math).architecture;
  if (problem.architecture >= needed) return "";
  return join("needs compute capability ", needed / 10, ".", needed % 10, ", the device has ",
              problem.architecture / 10, ".", problem.architecture % 10);
}

GradCut sm80::cut_gradient(const Variant& variant, const Sizes& size) {
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
  const double rate = (wide ? 1.2e14 : 0.9e14) / facts_of(variant.math).products;
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
  for (const Variant& variant : all) {
    rows.push_back(
        {.name = join(name(variant.algorithm), variant.gradient ? "_grad_weight" : "", "_sm80/",
                      sm80::name(variant.math), "/", variant.rows, "x", variant.cols,
                      variant.slices > 1 ? join(".k", variant.slices) : ""),
         .algorithm = variant.algorithm,
         .also = also(variant),
         .dtype = sm80::dtype_of(variant.math),
         .precision = sm80::precision_of(variant.math),
         .passes = variant.gradient ? Passes::weight_gradient : Passes::convolutions,
         .slices = variant.slices,
         .limits = limits,
         .cost = cost,
         .schedule = schedule,
         .launch = launch_pass,
         .family = &variant});
  }
  return rows;
}

}  // namespace voxgemm::cuda
