// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "conv/kernel.h"
#include "support/compare.h"
#include "support/problems.h"
#include "voxgemm/plan.h"

namespace voxgemm::test {

// What a test computes with when the number of workers does not matter.
inline const Context& context() {
  static const Context ctx = Context::cpu(3);
  return ctx;
}

enum class Fill {
  integers,  // -3 to 3
  reals,     // of several magnitudes, rounded to the dtype
  ones,
};

// Values of all operands of a layer; every pass takes what it reads.
struct Operands {
  std::vector<double> x;     // [n_in, c_in]
  std::vector<double> w;     // [taps, c_in, c_out]
  std::vector<double> bias;  // [c_out]
  std::vector<double> dy;    // [n_out, c_out]
  // [n_out, c_out] or none: added to y, of which ReLU is then taken.
  std::vector<double> residual = {};
  Fill fill = Fill::reals;
};

inline std::vector<double> draw(int64_t count, Fill fill, Dtype dtype, Random* random) {
  std::vector<double> values(count, 1.0);
  if (fill == Fill::ones) return values;
  for (double& value : values) {
    value = fill == Fill::integers
                ? static_cast<double>(random->integer(-3, 3))
                : rounded(std::ldexp(random->real(), -static_cast<int>(random->bits() % 8)), dtype);
  }
  return values;
}

inline WeightShape weight_shape(const Case& c) {
  return {c.map.taps(), c.problem.c_in, c.problem.c_out};
}

// with_residuals: of every second forward problem.
inline Operands make_operands(const Case& c, Fill fill, bool with_residuals = false) {
  const Problem& p = c.problem;
  Random random(p.text());
  Operands operands;
  operands.fill = fill;
  operands.x = draw(c.map.n_in * p.c_in, fill, p.dtype, &random);
  operands.w = draw(weight_shape(c).size(), fill, p.dtype, &random);
  operands.bias = draw(p.c_out, fill, p.dtype, &random);
  operands.dy = draw(c.map.n_out * p.c_out, fill, p.dtype, &random);
  if (with_residuals && p.pass == Pass::forward && random.bits() % 2 == 0) {
    operands.residual = draw(c.map.n_out * p.c_out, fill, p.dtype, &random);
  }
  return operands;
}

// How the operands of a pass lie in memory.
struct Memory {
  Layout layout = Layout::out_tap_in;
  int64_t gap = 3;  // elements between the rows of every matrix
  // Of a weight gradient, where it is not the problem's.
  std::optional<Dtype> gradient = {};
};

inline PlanOptions plan_options(const Problem& problem, const Filter& filter) {
  return {.c_in = problem.c_in,
          .c_out = problem.c_out,
          .dtype = problem.dtype,
          .operation = problem.operation,
          .filters = {filter, filter, filter}};
}

// Runs the problem's pass and returns its result as values. Also checks that all elements of the
// result were written, nothing beside them, and no operand.
inline std::vector<double> run(const Context& ctx,
                               const Case& c,
                               const Filter& filter,
                               const Operands& operands,
                               const Memory& memory = {}) {
  const Problem& p = c.problem;
  Plan plan = Plan::make(ctx, c.map, plan_options(p, filter));
  const Buffer x({c.map.n_in, p.c_in, memory.gap}, p.dtype, operands.x);
  const Buffer dy({c.map.n_out, p.c_out, memory.gap}, p.dtype, operands.dy);
  const Weights w(weight_shape(c), p.dtype, memory.layout, operands.w);
  const Buffer bias({1, p.c_out}, p.dtype, operands.bias);
  const bool has_residual = !operands.residual.empty();
  const Buffer residual({has_residual ? c.map.n_out : 0, p.c_out, memory.gap}, p.dtype,
                        operands.residual);
  const auto operand_bytes = [&] {
    return std::vector{x.elements().bytes(), dy.elements().bytes(), w.elements().bytes(),
                       bias.elements().bytes(), residual.elements().bytes()};
  };
  const auto before = operand_bytes();
  std::vector<double> result;
  const auto take = [&](const auto& matrix) {
    result = matrix.values();
    EXPECT_EQ(matrix.elements().written(), static_cast<int64_t>(result.size()))
        << "elements written";
  };
  if (p.pass == Pass::forward) {
    const Buffer y({c.map.n_out, p.c_out, memory.gap}, p.dtype);
    Epilogue epilogue{.bias = bias.ref(), .relu = has_residual};
    if (has_residual) epilogue.residual = residual.ref();
    plan.forward(ctx, x.ref(), w.ref(), epilogue, y.ref());
    take(y);
  } else if (p.pass == Pass::grad_input) {
    const Buffer dx({c.map.n_in, p.c_in, memory.gap}, p.dtype);
    plan.grad_input(ctx, dy.ref(), w.ref(), dx.ref());
    take(dx);
  } else {
    const Weights dw(weight_shape(c), memory.gradient.value_or(p.dtype), memory.layout);
    plan.grad_weight(ctx, x.ref(), dy.ref(), dw.ref());
    take(dw);
  }
  EXPECT_TRUE(before == operand_bytes()) << "an operand was written";
  return result;
}

inline std::vector<double> run(const Context& ctx,
                               const Case& c,
                               const std::string& kernel,
                               const Operands& operands,
                               const Memory& memory = {}) {
  return run(ctx, c, Filter{.algorithms = {}, .kernel = kernel}, operands, memory);
}

// Products (bias and residual) of each row of the result; of a weight gradient, of each tap.
inline std::vector<double> count_terms(const Case& c) {
  const KernelMap& map = c.map;
  const Problem& p = c.problem;
  const bool forward = p.pass == Pass::forward;
  std::vector<double> terms(forward                      ? map.n_out
                            : p.pass == Pass::grad_input ? map.n_in
                                                         : map.taps());
  if (forward) std::fill(terms.begin(), terms.end(), 2.0);
  for (int tap = 0; tap < map.taps(); ++tap) {
    for (int64_t out = 0; out < map.n_out; ++out) {
      const int32_t in = map.neighbours.row<int32_t>(tap)[out];
      if (in < 0) continue;
      if (forward) {
        terms[out] += p.c_in;
      } else if (p.pass == Pass::grad_input) {
        terms[in] += p.c_out;
      } else {
        terms[tap] += 1;
      }
    }
  }
  return terms;
}

// The judge: the reference kernel in double on the same values.
inline Sums judge(const Context& ctx, const Case& c, const Operands& operands) {
  const Case exact = c.with(c.problem.pass, Dtype::f64);
  Sums sums;
  sums.values = run(ctx, exact, "reference_cpu", operands);
  sums.terms = count_terms(c);
  const double most_terms =
      sums.terms.empty() ? 0 : *std::max_element(sums.terms.begin(), sums.terms.end());
  // Products of integers up to 3 are at most 9.
  sums.exact = operands.fill == Fill::integers && 9 * most_terms < std::ldexp(1.0, 24);
  if (sums.exact) return sums;
  if (c.problem.pass == Pass::grad_input && !c.map.out_first.empty()) {
    sums.operand_error = roundoff(c.problem.dtype);
  }
  Operands absolute = operands;
  for (auto* list : {&absolute.x, &absolute.w, &absolute.bias, &absolute.dy, &absolute.residual}) {
    for (double& value : *list) value = std::fabs(value);
  }
  sums.magnitudes = run(ctx, exact, "reference_cpu", absolute);
  return sums;
}

inline Dtype accumulator(const Kernel& kernel) {
  return kernel.reference ? Dtype::f64 : Dtype::f32;
}

inline const Kernel& kernel_named(const std::string& name) {
  return *std::find_if(registry(DeviceKind::cpu).begin(), registry(DeviceKind::cpu).end(),
                       [&](const Kernel& kernel) { return kernel.name == name; });
}

inline bool can_run(const Context& ctx, const Case& c, const Kernel& kernel) {
  Plan plan = Plan::make(ctx, c.map, plan_options(c.problem, {}));
  return can_run(kernel, plan.problem(ctx, c.problem.pass));
}

}  // namespace voxgemm::test
