// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "voxgemm/plan.h"

namespace voxgemm {

// What the numbers of operands are.
enum class Numbers {
  normal,    // which multiply at the power that real data takes
  integers,  // -2 to 2: sums of 2^22 products are exact in f32, in any order and precision
};

// Operands of a plan's passes, each pass's result in the place of the matrix that it does not read.
struct Operands {
  Matrix x;   // [n_in, c_in]; grad_input: the result
  Matrix dy;  // [n_out, c_out]; forward: the result
  Matrix w_memory;
  WeightsRef w;  // [c_out, taps, c_in]; grad_weight: the result

  Operands(const Context& ctx, const KernelMap& map, const PlanOptions& options, Numbers numbers);
  void run(const Context& ctx, Plan* plan, Pass pass) const;
  const Matrix& result(Pass pass) const;
};

// Copies elements that lie one after the other, at most as many as either has.
void copy_elements(const Context& ctx, const MatrixRef& from, const MatrixRef& to);
// The same few thousand numbers over and over.
void fill(const Context& ctx, const Matrix& matrix, Numbers numbers);

}  // namespace voxgemm
