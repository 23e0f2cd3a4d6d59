// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <optional>

#include "tune/operands.h"

namespace voxgemm {

// Holds kernels' results against the reference's, on operands whose sums are exact: so they must be
// the same bits.
class Judge {
 public:
  // Runs the reference kernel, unless that would take long: then there is no verdict.
  Judge(const Context& ctx, const KernelMap& map, const PlanOptions& options, Pass pass);
  // Of a plan of that map and those options; true where there is no verdict.
  bool agrees(Plan* plan) const;
  bool has_verdict() const { return !expected_.empty(); }

 private:
  Matrix result_of(Plan* plan) const;

  const Context& ctx_;
  Pass pass_;
  std::optional<Operands> operands_;
  Matrix expected_;  // on the host, the first elements
};

}  // namespace voxgemm
