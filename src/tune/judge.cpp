// SPDX-License-Identifier: Apache-2.0
#include "tune/judge.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "conv/kernel.h"
#include "core/dispatch.h"

namespace voxgemm {
namespace {

// What a verdict may take of the reference's predicted time.
constexpr double affordable_seconds = 0.25;
// Of a result that many are compared.
constexpr int64_t most_elements = int64_t{1} << 22;

const Kernel* reference_for(const Problem& problem) {
  for (const Kernel& kernel : registry(problem.device.kind)) {
    if (kernel.reference && can_run(kernel, problem)) return &kernel;
  }
  return nullptr;
}

}  // namespace

Judge::Judge(const Context& ctx, const KernelMap& map, const PlanOptions& options, Pass pass)
    : ctx_(ctx), pass_(pass) {
  PlanOptions asked = options;
  asked.tune_at_first_use = false;
  asked.schedules = {};
  const Problem problem = Plan::make(ctx, map, asked).problem(ctx, pass);
  const Kernel* reference = reference_for(problem);
  // Products of two such integers are up to 4, and f32 has 24 bits.
  const double exact = std::ldexp(1.0, 22);
  const double terms = pass == Pass::grad_weight ? static_cast<double>(map.n_out)
                                                 : static_cast<double>(map.taps()) *
                                                       std::max(options.c_in, options.c_out);
  if (reference == nullptr || terms > exact ||
      reference->cost(*reference, problem) > affordable_seconds) {
    return;
  }
  operands_.emplace(ctx, map, options, Numbers::integers);
  asked.filters[static_cast<size_t>(pass)] = {.kernel = reference->name};
  Plan plan = Plan::make(ctx, map, asked);
  expected_ = result_of(&plan);
}

Matrix Judge::result_of(Plan* plan) const {
  const Matrix& result = operands_->result(pass_);
  // What a kernel does not write must not look like the result of the one before.
  fill(ctx_, result, Numbers::normal);
  operands_->run(ctx_, plan, pass_);
  const int64_t count = std::min(result.rows * result.cols, most_elements);
  Matrix host = make_matrix(Context::cpu(1), 1, count, result.dtype);
  copy_elements(ctx_, result, host);
  return host;
}

bool Judge::agrees(Plan* plan) const {
  if (!has_verdict()) return true;
  const Matrix found = result_of(plan);
  const auto bytes = static_cast<size_t>(found.cols) * size_of(found.dtype);
  if (std::memcmp(found.data, expected_.data, bytes) == 0) return true;
  // Zeros of either sign are equal.
  bool same = true;
  dispatch_float(found.dtype, [&]<class T>(Type<T>) {
    for (int64_t i = 0; i < found.cols; ++i) {
      same = same && to_float(found.as<T>()[i]) == to_float(expected_.as<T>()[i]);
    }
  });
  return same;
}

}  // namespace voxgemm
