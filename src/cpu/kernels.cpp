// SPDX-License-Identifier: Apache-2.0
//
// The registry rows of the CPU: every engine with every way to build a schedule, and the reference.
#include "conv/kernel.h"

#include <algorithm>
#include <cmath>
#include <string_view>

#include "cpu/convolution.h"
#include "cpu/engine.h"
#include "cpu/reference.h"
#include "cpu/weight_gradient.h"
#include "voxgemm/error.h"

namespace voxgemm::cpu {
namespace {

using Order = ScheduleOptions::Order;

struct Variant {
  Algorithm algorithm;
  Order order;
  int groups;  // by_mask; 0: as few as 32 taps a group allow
  int slices;
};

constexpr Variant variants[] = {
    {Algorithm::implicit_gemm, Order::natural, 1, 1},
    {Algorithm::masked_implicit_gemm, Order::by_mask, 0, 1},
    {Algorithm::explicit_gemm, Order::by_tap, 0, 1},
    {Algorithm::implicit_gemm_splitk, Order::natural, 1, 3},
    {Algorithm::masked_implicit_gemm_splitk, Order::by_mask, 0, 3},
};

const Engine& engine_of(const Kernel& kernel) { return *static_cast<const Engine*>(kernel.family); }

const Variant& variant_of(const Kernel& kernel) {
  return *std::find_if(std::begin(variants), std::end(variants),
                       [&](const Variant& v) { return v.algorithm == kernel.algorithm; });
}

// The result's channels, which set the accumulator's width.
int columns(const Problem& problem) {
  return problem.pass == Pass::grad_input ? problem.c_in : problem.c_out;
}

// 128 rows keep tile, operand rows and one tap's weights in the second-level cache at 64 channels;
// wider layers stream the weights from further away, and twice the rows halve that. In narrow
// layers a pair takes so little that calls show, and short pieces of the index table: with 512 rows
// a LiDAR sweep takes 1.9 instead of 2.4 ms at 16 channels, 4.6 instead of 5.5 at 32 (f32, Zen 5).
// But 64 tiles should be left for the threads.
int tile_rows(const Problem& problem, Order order) {
  constexpr int64_t tiles = 64;
  const int n = columns(problem);
  if (n > 64) return 256;
  if (n > 32 || order != Order::natural || problem.n_out < tiles * 256) return 128;
  return problem.n_out < tiles * 512 ? 256 : 512;
}

ScheduleOptions schedule(const Kernel& kernel, const Problem& problem) {
  const Variant& variant = variant_of(kernel);
  ScheduleOptions options;
  options.order = variant.order;
  options.tile_rows = tile_rows(problem, variant.order);
  options.chunk_rows = options.tile_rows;
  if (variant.order == Order::natural) return options;
  const int taps = problem.geometry.taps();
  options.groups = variant.order == Order::by_tap ? taps : (taps + 31) / 32;
  // An accumulator of half a MiB a worker.
  const int rows = (512 << 10) / (4 * columns(problem));
  options.chunk_rows = std::clamp(rows / options.tile_rows, 1, 16) * options.tile_rows;
  return options;
}

// Nanoseconds of a pair beside its arithmetic: of its own, of each element of its rows of k and n,
// and where n is no multiple of a vector.
struct PairCosts {
  double pair;
  double k;
  double n;
  double tail;
};

PairCosts pair_costs(const Engine& engine, bool gradient) {
  if (engine.dtype == Dtype::f32) {
    return gradient ? PairCosts{0, 0.15, 0.06, 24} : PairCosts{0, 0.21, 0.09, 1.6};
  }
  if (engine.dtype == Dtype::f16) {
    // Without instructions for it conversion is arithmetic on integers.
    if (engine.panel_cols <= 4) {
      return gradient ? PairCosts{6.5, 0.87, 0.5, 61} : PairCosts{23, 0.28, 0.23, 14};
    }
    return gradient ? PairCosts{8.6, 0.18, 0.16, 16} : PairCosts{3.9, 0.09, 0.11, 8.2};
  }
  const std::string_view isa = engine.isa;
  // Products of bf16 take rows as they are, or of a gradient in pairs.
  if (isa == "amx" || isa == "v4bf16") {
    return gradient ? PairCosts{8.4, 0.04, 0.13, 15} : PairCosts{1.4, 0.07, 0.15, 4.2};
  }
  return gradient ? PairCosts{7.9, 0.05, 0.17, 18} : PairCosts{2.1, 0.23, 0.15, 2.4};
}

// Of building the schedule of a pass.
double building_seconds(const Variant& variant, const Problem& problem) {
  if (variant.order == Order::natural) return 0;
  const double taps = problem.geometry.taps();
  const auto rows = static_cast<double>(problem.n_out);
  if (variant.order == Order::by_tap) {
    return 1e-9 * rows * taps + 2.7e-9 * static_cast<double>(problem.pairs);
  }
  return rows * (40e-9 * std::ceil(taps / 32) + 1.4e-9 * taps);
}

// Arithmetic at the engine's rate, what pairs and index entries cost beside it, and of a schedule
// that serves the passes of several layers on its map, sixteen, say, its part. Fitted to 4,000
// times of 260 problems on one core of a Xeon with AMX.
double cost(const Kernel& kernel, const Problem& problem) {
  const Engine& engine = engine_of(kernel);
  const Variant& variant = variant_of(kernel);
  const bool gradient = problem.pass == Pass::grad_weight;
  const int k = problem.pass == Pass::grad_input ? problem.c_out : problem.c_in;
  const int n = columns(problem);
  const int lanes = engine.panel_cols;
  const auto all_pairs = static_cast<double>(problem.pairs);
  const auto rows = static_cast<double>(problem.n_out);
  const double taps = problem.geometry.taps();
  // Outer products keep fewer sums in registers.
  const int whole_columns = (n + lanes - 1) / lanes * lanes;
  const double products = (gradient ? 2.5 : 2.0) * k * whole_columns;
  const PairCosts costs = pair_costs(engine, gradient);
  double pair = costs.pair + costs.k * k + costs.n * n;
  // A gradient's rows are copied to whole vectors then.
  if (n % lanes != 0) pair += costs.tail * (gradient ? lanes / 16.0 : 1.0);
  // Sorted rows leave most absent neighbours out, but name their rows.
  double entries = 0.68 * rows * taps;
  if (variant.order == Order::by_tap) entries = 1.6 * all_pairs;
  if (variant.order == Order::by_mask) entries = 2.1 * std::min(1.3 * all_pairs, rows * taps);
  const double weights = taps * k * n;
  const double results = gradient ? 2.8 * weights : 0.39 * rows * n + 0.2 * weights;
  const double sums = kernel.slices == 1 || gradient ? 0.0 : 2.0 * rows * n;
  const double seconds = all_pairs * products / (engine.gflops * 1e9) +
                         1e-9 * (all_pairs * pair + entries + results + sums) +
                         building_seconds(variant, problem) / 16;
  // Divided by the threads whatever a kernel's tasks: kernels add in different orders, so where
  // another one won with many threads only, results would depend on these.
  return (1e-6 + seconds) / problem.threads;
}

void launch(const Kernel& kernel, const Context& ctx, Pass pass, const ConvArgs& args) {
  if (pass == Pass::grad_weight) return weight_gradient(kernel, ctx, args);
  convolve(kernel, ctx, args);
}

}  // namespace

std::vector<Kernel> kernels() {
  std::vector<Kernel> rows;
  for (const Engine* engine : engines()) {
    // Asking the CPU is slow in virtual machines.
    const std::string unavailable =
        engine->supported() ? "" : join("this CPU has no ", engine->isa);
    for (const Variant& variant : variants) {
      rows.push_back(
          {.name = join(name(variant.algorithm), "_cpu/", name(engine->dtype), "/", engine->isa),
           .algorithm = variant.algorithm,
           .dtype = engine->dtype,
           .slices = variant.slices,
           .unavailable = unavailable,
           .cost = cost,
           .schedule = schedule,
           .launch = launch,
           .family = engine});
    }
  }
  rows.push_back(reference_kernel());
  return rows;
}

}  // namespace voxgemm::cpu
