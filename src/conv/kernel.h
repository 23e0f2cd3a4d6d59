// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "voxgemm/problem.h"
#include "voxgemm/schedule.h"

namespace voxgemm {

struct Filter;

// What a kernel needs to run one pass. Grad_input runs as a forward over the transposed map with
// `w` seen transposed (c_in and c_out exchanged), so families implement two things: a convolution
// and a weight gradient.
struct ConvArgs {
  const Schedule* schedule = nullptr;
  const KernelMap* map = nullptr;
  MatrixRef x;                 // [n_in, c_in]
  WeightsRef w;                // grad_weight: the result
  const void* bias = nullptr;  // [c_out] of y's dtype, or null
  MatrixRef residual = {};     // like y, added to it; no data: none
  bool relu = false;           // of what was added up
  MatrixRef y;                 // [n_out, c_out]; grad_weight: dy, read
  bool mirror_taps = false;    // index blocks of tap t multiply W[taps - 1 - t]
};

// What a row computes.
enum class Passes { all, convolutions, weight_gradient };

// One launchable kernel: a row of the registry. Its name is its identity everywhere.
struct Kernel {
  std::string name;  // "masked_implicit_gemm_v4/f32/128"
  Algorithm algorithm = Algorithm::implicit_gemm;
  // Other search spaces that it belongs to as well, where it is what their names promise.
  std::vector<Algorithm> also = {};
  std::optional<Dtype> dtype = {};          // of the operands; none: any
  std::optional<Precision> precision = {};  // of f32 operands; none: any
  Passes passes = Passes::all;
  bool reference = false;  // judge of the others; never picked while another can run
  int slices = 1;          // of the reduction
  int revision = 1;        // raised when its speed changes
  // Why this machine cannot run it, found once when the registry is made; empty if it can.
  std::string unavailable = {};
  // Of a problem with these operands and passes: why it cannot run that; empty if it can. None: it
  // always can.
  std::string (*limits)(const Kernel&, const Problem&) = nullptr;
  // Predicted seconds.
  double (*cost)(const Kernel&, const Problem&) = nullptr;
  ScheduleOptions (*schedule)(const Kernel&, const Problem&) = nullptr;
  void (*launch)(const Kernel&, const Context&, Pass, const ConvArgs&) = nullptr;
  const void* family = nullptr;  // what the functions of the family need, e.g. a cpu::Engine
};

// Makes no words: a choice asks every row.
bool can_run(const Kernel& kernel, const Problem& problem);
// Why it cannot; empty if it can.
std::string why_not(const Kernel& kernel, const Problem& problem);

// The rows of each backend.
namespace cpu {
std::vector<Kernel> kernels();
}
namespace cuda {
std::vector<Kernel> kernels();
}
// All kernels of this build for a kind of device; they are asked about no other.
const std::vector<Kernel>& registry(DeviceKind kind);
// The row of this name, or null.
const Kernel* find_kernel(DeviceKind kind, std::string_view name);

// The kernel the filter's picked candidate names; throws Error(unsupported) with the explain table
// if none can run.
const Kernel& choose(const Problem& problem, const Filter& filter);

}  // namespace voxgemm
