// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <optional>

#include "voxgemm/error.h"
#include "voxgemm/plan.h"

namespace voxgemm {

// Every argument rule of the passes. Below the entry of a pass code may assume what these check.

// One of the enumerators up to the last: a caller may have cast any number.
template <class Enum>
void validate_enumerator(Enum value, Enum last, const char* what) {
  const auto number = static_cast<int>(value);
  const auto most = static_cast<int>(last);
  check(number >= 0 && number <= most, what, " is number ", number, ", expected 0 to ", most);
}
void validate_algorithms(const Filter& filter);
void validate_filter(DeviceKind kind, const Filter& filter);
void validate_problem(const Problem& problem);
void validate_plan(const Context& ctx, const KernelMap& map, const PlanOptions& options);
// A matrix called `what` must have this shape, dtype and the context's device.
struct Expected {
  const char* what;
  int64_t rows;
  int64_t cols;
  Dtype dtype;
};
void validate_matrix(const Context& ctx, const MatrixRef& matrix, const Expected& expected);
// The same, and its rows stand one behind the other.
void validate_column(const Context& ctx, const MatrixRef& matrix, const Expected& expected);
// Of a grid: no extent is negative.
void validate_shape(const Int3& shape);
// The dtype of a matrix that must be f16, bf16, f32 or f64.
Dtype float_dtype(const MatrixRef& matrix, const char* what);
// The dtype of a matrix that must be i32 or i64.
Dtype integer_dtype(const MatrixRef& matrix, const char* what);
// Rows are sorted as 32-bit numbers.
void validate_sortable(int64_t rows);
void validate_weights(const Context& ctx,
                      const WeightsRef& w,
                      const KernelMap& map,
                      const PlanOptions& options);
// The dtype of a weight gradient may also be f32.
void validate_weight_gradient(const Context& ctx,
                              const WeightsRef& dw,
                              const KernelMap& map,
                              const PlanOptions& options);
// Rows of `width` bytes, `step` bytes apart; weights count as one row.
struct Memory {
  const char* what;
  const char* data;
  int64_t rows;
  int64_t width;
  int64_t step;
};
Memory memory_of(const MatrixRef& matrix, const char* what);
Memory memory_of(const WeightsRef& w, const char* what);
// An output must not share memory with an input. Slices of the columns of one matrix do not.
void validate_apart(const Memory& output, const Memory& input);

}  // namespace voxgemm
