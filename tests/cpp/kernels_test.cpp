// SPDX-License-Identifier: Apache-2.0
// Every row of the registry on every problem of support/problems.h, against the reference; and the
// reference against the relation between coordinates itself.
#include <gtest/gtest.h>

#include <cctype>
#include <map>

#include "support/brute_force.h"

namespace voxgemm::test {
namespace {

std::string test_name(const std::string& text) {
  std::string result;
  for (const char c : text) {
    if (std::isalnum(static_cast<unsigned char>(c)) != 0) {
      result += c;
    } else if (!result.ends_with('_')) {
      result += '_';
    }
  }
  return result;
}

class Problems : public ::testing::TestWithParam<std::string> {};

TEST_P(Problems, EveryKernelAgreesWithTheReference) {
  const Case c = make_case(context(), GetParam());
  const int64_t rows = c.map.n_in + c.map.n_out;
  int ran = 0;
  for (const Fill fill : {Fill::integers, Fill::reals}) {
    const Operands operands = make_operands(c, fill, true);
    const Sums expected = judge(context(), c, operands);
    for (const Kernel& kernel : registry(DeviceKind::cpu)) {
      if (!can_run(context(), c, kernel)) continue;
      SCOPED_TRACE(kernel.name + " on " + GetParam());
      // The layout changes from kernel to kernel, so that each meets all of them over the list.
      const Layout layout = layouts[(ran++ + rows) % std::size(layouts)];
      EXPECT_TRUE(within_bound(run(context(), c, kernel.name, operands, {.layout = layout}),
                               expected, {accumulator(kernel), c.problem.dtype}));
    }
  }
  EXPECT_GT(ran, 0);
}

INSTANTIATE_TEST_SUITE_P(List, Problems, ::testing::ValuesIn(problem_list()), [](const auto& info) {
  return test_name(info.param);
});

class Kernels : public ::testing::TestWithParam<std::string> {
 protected:
  // Says for every row of the registry that this machine cannot run why it is not tested here.
  void SetUp() override {
    if (!kernel().unavailable.empty()) GTEST_SKIP() << kernel().unavailable;
  }

  const Kernel& kernel() const { return kernel_named(GetParam()); }

  // The layer in the first dtype that the kernel takes.
  Case accepted(const std::string& layer, Pass pass) const {
    for (const Dtype dtype : {Dtype::f32, Dtype::f16, Dtype::bf16}) {
      Case c = make_case(context(), problem_text(pass, dtype, layer));
      if (can_run(context(), c, kernel())) return c;
    }
    throw std::logic_error(kernel().name + " takes " + layer + " in no dtype");
  }
};

std::vector<std::string> kernel_names() {
  std::vector<std::string> names;
  for (const Kernel& kernel : registry(DeviceKind::cpu)) names.push_back(kernel.name);
  return names;
}

INSTANTIATE_TEST_SUITE_P(Registry,
                         Kernels,
                         ::testing::ValuesIn(kernel_names()),
                         [](const auto& info) { return test_name(info.param); });

TEST_P(Kernels, GiveTheSameBitsForAnyThreadsAndEveryRun) {
  // Rows for several chunks of every schedule and several slices of the weight gradient.
  const Context one = Context::cpu(1);
  const Context seven = Context::cpu(7);
  const Context others[] = {Context::cpu(2), seven, seven};
  const char* list[] = {"subm3 3->17 random:4200:18", "conv3s2p1 5->3 random:9000:34",
                        "subm3 16->200 random:129:6"};
  for (const Pass pass : passes) {
    for (size_t i = 0; i < std::size(list); i += layer_step) {
      const Case c = accepted(list[i], pass);
      SCOPED_TRACE(c.problem.text());
      const Operands operands = make_operands(c, Fill::reals);
      const std::vector<double> once = run(one, c, kernel().name, operands);
      for (const Context& ctx : others) {
        EXPECT_TRUE(same_bits(run(ctx, c, kernel().name, operands), once))
            << ctx.threads << " threads";
      }
    }
  }
}

TEST_P(Kernels, GiveTheSameBitsForAnyLayout) {
  for (const Pass pass : passes) {
    const Case c = accepted("subm3 33->17 random:129:6", pass);
    SCOPED_TRACE(c.problem.text());
    const Operands operands = make_operands(c, Fill::reals);
    const std::vector<double> once = run(context(), c, kernel().name, operands, {.gap = 0});
    for (const Layout layout : layouts) {
      EXPECT_TRUE(same_bits(
          run(context(), c, kernel().name, operands, {.layout = layout, .gap = 5}), once));
    }
  }
}

TEST_P(Kernels, WriteWeightGradientsInF32) {
  const Case c = accepted("conv2s2 16->33 shell:8", Pass::grad_weight);
  const Memory memory{.gradient = Dtype::f32};
  for (const Fill fill : {Fill::integers, Fill::reals}) {
    const Operands operands = make_operands(c, fill);
    EXPECT_TRUE(within_bound(run(context(), c, kernel().name, operands, memory),
                             judge(context(), c, operands), {accumulator(kernel()), Dtype::f32}));
  }
}

// A line along x has the taps (kx, 1, 1) and no other.
bool on_line(int tap) { return tap / 3 % 3 == 1 && tap % 3 == 1; }

TEST_P(Kernels, NeverMultiplyAnAbsentNeighbour) {
  for (const Pass pass : {Pass::forward, Pass::grad_input}) {
    const Case c = accepted("subm3 6->17 line:33", pass);
    Operands operands = make_operands(c, Fill::reals);
    Operands poisoned = operands;
    for (size_t i = 0; i < operands.w.size(); ++i) {
      const int tap = static_cast<int>(i / 17 / 6);
      if (on_line(tap)) continue;
      operands.w[i] = 0;
      poisoned.w[i] = tap % 2 == 0 ? HUGE_VAL : std::nan("");
    }
    SCOPED_TRACE(c.problem.text());
    EXPECT_TRUE(same_bits(run(context(), c, kernel().name, poisoned),
                          run(context(), c, kernel().name, operands)));
  }
}

// Which elements of the result are NaN when one operand value is: those whose sums have it as a
// term. The reference rows of the brute force say so.
TEST_P(Kernels, SpreadNanToTheSumsThatHaveIt) {
  for (const char* layer : {"subm3 6->17 line:33", "conv3s2p1 17->6 random:129:8"}) {
    for (const Pass pass : passes) {
      const Case c = accepted(layer, pass);
      SCOPED_TRACE(c.problem.text());
      Operands operands = make_operands(c, Fill::reals);
      operands.x[5 * c.problem.c_in + 2] = std::nan("");
      operands.dy[7 * c.problem.c_out + 3] = HUGE_VAL;
      operands.bias[1] = -HUGE_VAL;
      const std::vector<double> expected = brute_force(c, operands);
      const std::vector<double> actual = run(context(), c, kernel().name, operands);
      int64_t nans = 0;
      for (size_t i = 0; i < expected.size(); ++i) {
        nans += std::isfinite(expected[i]) ? 0 : 1;
        ASSERT_EQ(std::isnan(actual[i]), std::isnan(expected[i])) << "element " << i;
        if (std::isinf(expected[i])) {
          ASSERT_EQ(actual[i], expected[i]) << "element " << i;
        }
      }
      EXPECT_GT(nans, 0);
      EXPECT_LT(nans, static_cast<int64_t>(expected.size()));
    }
  }
}

// Schedules without slices visit the taps of a row in the same order, so only the engine decides
// the bits.
TEST(Engines, GiveTheSameBitsForEveryScheduleWithoutSlices) {
  const char* list[] = {"subm3 6->20 random:2500:18", "subm7 3->6 random:300:7",
                        "conv3s2p1 33->16 random:2500:18", "inv2s2 16->70 random:2500:18"};
  for (size_t i = 0; i < std::size(list); i += layer_step) {
    for (const Pass pass : {Pass::forward, Pass::grad_input}) {
      for (const Dtype dtype : {Dtype::f32, Dtype::f16, Dtype::bf16}) {
        const Case c = make_case(context(), problem_text(pass, dtype, list[i]));
        const Operands operands = make_operands(c, Fill::reals);
        std::map<const void*, std::vector<double>> of_engine;
        for (const Kernel& kernel : registry(DeviceKind::cpu)) {
          if (kernel.slices > 1 || !can_run(context(), c, kernel)) continue;
          SCOPED_TRACE(kernel.name + " on " + c.problem.text());
          const std::vector<double> result = run(context(), c, kernel.name, operands);
          EXPECT_TRUE(
              same_bits(result, of_engine.try_emplace(kernel.family, result).first->second));
        }
      }
    }
  }
}

// Enough rows for the largest tiles; by the engine that is chosen.
TEST(Engines, GiveTheSameBitsForLargeTilesAndAnyThreads) {
  const Context threads[] = {Context::cpu(1), Context::cpu(2), Context::cpu(7)};
  for (const Pass pass : passes) {
    const Case c =
        make_case(context(), problem_text(pass, Dtype::f32, "subm3 6->16 random:33000:60"));
    const Operands operands = make_operands(c, Fill::reals);
    const void* family =
        choose(Plan::make(context(), c.map, plan_options(c.problem, {})).problem(context(), pass),
               {})
            .family;
    std::vector<double> once;
    for (const Kernel& kernel : registry(DeviceKind::cpu)) {
      if (kernel.family != family || kernel.slices > 1) continue;
      SCOPED_TRACE(kernel.name + " on " + c.problem.text());
      // Weight gradients add up the rows of a schedule in its order.
      if (pass == Pass::grad_weight) once.clear();
      for (const Context& ctx : threads) {
        const std::vector<double> result = run(ctx, c, kernel.name, operands);
        if (once.empty()) once = result;
        EXPECT_TRUE(same_bits(result, once)) << ctx.threads << " threads";
      }
    }
  }
}

// Weights past the 24 MiB that are packed at once, and weight gradients past the 32 MiB of partial
// sums; once an engine, as schedules have no part in it.
TEST(Engines, TakeWeightsThatDoNotFitTheirBudgets) {
  for (const Pass pass : passes) {
    const Case c = make_case(context(), problem_text(pass, Dtype::f32, "subm3 600->576 line:3"));
    const Operands operands = make_operands(c, Fill::integers);
    const Sums expected = judge(context(), c, operands);
    for (const Kernel& kernel : registry(DeviceKind::cpu)) {
      const bool first = kernel.algorithm == Algorithm::implicit_gemm && !kernel.reference;
      if (!first || !can_run(context(), c, kernel)) continue;
      EXPECT_TRUE(within_bound(run(context(), c, kernel.name, operands), expected,
                               {accumulator(kernel), Dtype::f32}))
          << kernel.name << " on " << c.problem.text();
    }
  }
}

// Rows whose partial sums go past the 24 MiB that slices may take.
TEST(Engines, TakeRowsThatDoNotFitTheirBudgets) {
  const Case c = make_case(context(), "forward f32 subm3x1x1 3->192 line:12000");
  const Operands operands = make_operands(c, Fill::integers);
  const Sums expected = judge(context(), c, operands);
  for (const Kernel& kernel : registry(DeviceKind::cpu)) {
    if (kernel.slices == 1 || !can_run(context(), c, kernel)) continue;
    EXPECT_TRUE(within_bound(run(context(), c, kernel.name, operands), expected,
                             {accumulator(kernel), Dtype::f32}))
        << kernel.name;
  }
}

TEST(Registry, NamesAreDistinct) {
  std::map<std::string, int> counts;
  for (const Kernel& kernel : registry(DeviceKind::cpu))
    EXPECT_EQ(++counts[kernel.name], 1) << kernel.name;
}

TEST(Reference, AgreesWithTheRelationBetweenCoordinates) {
  for (const std::string& layer : layers()) {
    for (const Pass pass : passes) {
      const Case c = make_case(context(), problem_text(pass, Dtype::f64, layer));
      SCOPED_TRACE(c.problem.text());
      const Operands operands = make_operands(c, Fill::integers);
      EXPECT_TRUE(
          same_bits(run(context(), c, "reference_cpu", operands), brute_force(c, operands)));
    }
  }
}

// Double sums, then one rounding: the 16-bit result is the double result, rounded.
TEST(Reference, RoundsOnce) {
  for (const Dtype dtype : {Dtype::f32, Dtype::f16, Dtype::bf16}) {
    for (const Pass pass : passes) {
      const Case c = make_case(context(), problem_text(pass, dtype, "subm3 33->16 shell:6"));
      const Operands operands = make_operands(c, Fill::reals);
      std::vector<double> expected =
          run(context(), c.with(pass, Dtype::f64), "reference_cpu", operands);
      for (double& value : expected) value = rounded(value, dtype);
      EXPECT_TRUE(same_bits(run(context(), c, "reference_cpu", operands), expected))
          << c.problem.text();
    }
  }
}

// The bound must tell a correct f32 sum from one with a lost term, a truncated operand or 16-bit
// partial sums.
TEST(Bound, RejectsWhatIsWrong) {
  Random random("bound");
  const std::vector<double> a = draw(64, Fill::reals, Dtype::f32, &random);
  const std::vector<double> b = draw(64, Fill::reals, Dtype::f32, &random);
  Sums sums{.values = {0}, .magnitudes = {0}, .terms = {64}};
  float good = 0;
  double truncated = 0;
  double narrow = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    sums.values[0] += a[i] * b[i];
    sums.magnitudes[0] += std::fabs(a[i] * b[i]);
    good += static_cast<float>(a[i]) * static_cast<float>(b[i]);
    truncated += rounded(a[i], Dtype::bf16) * b[i];
    narrow = rounded(narrow + a[i] * b[i], Dtype::f16);
  }
  const Arithmetic f32{Dtype::f32, Dtype::f32};
  EXPECT_TRUE(within_bound({good}, sums, f32));
  EXPECT_FALSE(within_bound({good - a[9] * b[9]}, sums, f32));
  EXPECT_FALSE(within_bound({truncated}, sums, f32));
  EXPECT_FALSE(within_bound({narrow}, sums, f32));
  EXPECT_FALSE(within_bound({std::nan("")}, sums, f32));
  EXPECT_TRUE(within_bound({rounded(good, Dtype::f16)}, sums, {Dtype::f32, Dtype::f16}));
  EXPECT_FALSE(within_bound({rounded(good, Dtype::bf16)}, sums, {Dtype::f32, Dtype::f16}));
}

}  // namespace
}  // namespace voxgemm::test
