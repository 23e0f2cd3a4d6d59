// SPDX-License-Identifier: Apache-2.0
//
// The registry rows of the CPU: every engine with every way to build a schedule, and the reference.
#include "conv/kernel.h"

#include <algorithm>

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

std::string why_not(const Kernel& kernel, const Problem& problem) {
  const Engine& engine = engine_of(kernel);
  if (engine.dtype != problem.dtype) return std::string("takes ").append(name(engine.dtype));
  return kernel.unavailable;
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

// Seconds of a pair beside arithmetic: its index, and rows of k and n that are read and written.
double pair_seconds(const Engine& engine, Pass pass, int k, int n) {
  const bool gradient = pass == Pass::grad_weight;
  // Outer products smaller than some registers are made of copies.
  const double narrow = gradient && k * n <= 32 && engine.panel_cols > 4 ? 13e-9 : 0.0;
  const double rows =
      narrow + (gradient ? 1.5e-10 : 1.6e-10) * k + (gradient ? 1.0e-10 : 1.2e-10) * n;
  if (engine.dtype == Dtype::f16) return rows + 12e-9;
  if (!gradient) return rows + 3.5e-9;
  if (engine.dtype == Dtype::f32) return rows + 5e-9;
  // Wide instructions want their rows of bf16 in pairs.
  return rows + (engine.panel_cols > 4 ? 10e-9 : 4.4e-9);
}

// Arithmetic at the engine's rate, degraded where few columns leave registers unused, what a pair
// and an index entry cost beside it, and a call of the engine. Fitted to 1,800 times of 135
// problems on one core of a Xeon with AMX.
double cost(const Kernel& kernel, const Problem& problem) {
  const Engine& engine = engine_of(kernel);
  const Variant& variant = variant_of(kernel);
  const bool gradient = problem.pass == Pass::grad_weight;
  const int k = problem.pass == Pass::grad_input ? problem.c_out : problem.c_in;
  const int n = columns(problem);
  const int panels = (n + engine.panel_cols - 1) / engine.panel_cols;
  const auto all_pairs = static_cast<double>(problem.pairs);
  const auto rows = static_cast<double>(problem.n_out);
  const double taps = problem.geometry.taps();
  const double arithmetic =
      2.0 * all_pairs * k * panels * engine.panel_cols / (engine.gflops * 1e9);
  const double pairs = all_pairs * pair_seconds(engine, problem.pass, k, n);
  // Sorted rows leave most absent neighbours out, and make fewer and longer calls.
  const bool sorted = variant.order != Order::natural;
  const double entries = variant.order == Order::by_tap ? all_pairs
                         : sorted                       ? std::min(1.3 * all_pairs, rows * taps)
                                                        : rows * taps;
  const double entry =
      variant.order == Order::by_mask ? (gradient ? 1.4e-9 : 0.7e-9) : (gradient ? 0.6e-9 : 0.4e-9);
  const ScheduleOptions options = schedule(kernel, problem);
  const double calls = taps * (sorted ? 1 + rows / 4096 : rows / options.tile_rows);
  // A schedule serves the passes of all layers on its map: eight of them, say.
  const double building = sorted ? (40e-9 + 0.4e-9 * taps) * rows / 8 : 0.0;
  const double weights = taps * k * n;
  const double results = gradient ? 1.5e-9 * weights : 2.5e-10 * rows * n + 1e-10 * weights;
  const double sums = kernel.slices == 1 ? 0.0 : gradient ? 2e-9 * weights : 2.4e-9 * rows * n;
  // Divided by the threads whatever a kernel's tasks: kernels add in different orders, so where
  // another one won with many threads only, results would depend on these.
  return (4e-6 + arithmetic + pairs + entries * entry + 5e-8 * calls + building + results + sums) /
         problem.threads;
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
           .slices = variant.slices,
           .unavailable = unavailable,
           .why_not = why_not,
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
