// SPDX-License-Identifier: Apache-2.0
// Problems that nobody thought of, for some seconds. A failure prints the problem and the seed;
// --gtest_random_seed=SEED draws the same problems again.
#include <gtest/gtest.h>

#include <chrono>
#include <random>

#include "support/brute_force.h"

namespace voxgemm::test {
namespace {

Int3 axes(Random* random, int low, int high) {
  Int3 values;
  values.fill(static_cast<int32_t>(random->integer(low, high)));
  // Mostly the same on all axes, as in use.
  if (random->integer(0, 2) == 0) {
    for (int32_t& value : values) value = static_cast<int32_t>(random->integer(low, high));
  }
  return values;
}

int channels(Random* random) {
  constexpr int usual[] = {1, 3, 4, 16, 32, 64, 128};
  return random->integer(0, 1) == 0 ? random->pick(usual)
                                    : static_cast<int>(random->integer(1, 80));
}

std::string cloud_text(Random* random) {
  const int extent = static_cast<int>(random->integer(1, 9));
  const int cells = extent * extent * extent;
  const std::string text = join("random:", random->integer(0, std::min(cells, 300)), ":", extent,
                                ":", random->integer(0, 1 << 20));
  const std::string others[] = {
      join("line:", random->integer(0, 200)),   join("gap:", random->integer(0, 200)),
      join("repeat:", random->integer(0, 200)), join("shell:", random->integer(1, 8)),
      join("full:", random->integer(1, 5)),     "street"};
  return random->integer(0, 1) == 0 ? text : random->pick(others);
}

Problem draw_problem(Random* random) {
  constexpr Dtype dtypes[] = {Dtype::f32, Dtype::f16, Dtype::bf16};
  constexpr Operation operations[] = {Operation::submanifold, Operation::strided,
                                      Operation::inverse};
  Problem p;
  p.pass = random->pick(passes);
  p.dtype = random->pick(dtypes);
  p.operation = random->pick(operations);
  const Int3 size = axes(random, 1, 5);
  const Int3 dilation = axes(random, 1, random->integer(0, 3) == 0 ? 3 : 1);
  p.geometry = p.operation == Operation::submanifold
                   ? Geometry::submanifold(size, dilation)
                   : Geometry{size, axes(random, 1, 3), axes(random, 0, 2), dilation};
  p.c_in = channels(random);
  p.c_out = channels(random);
  p.cloud = cloud_text(random);
  return p;
}

void check_problem(const std::string& text, Random* random) {
  const Case c = make_case(context(), text);
  // Enough for every size above, and no single problem takes the whole time.
  if (Problem measured = c.problem; true) {
    measured.pairs = c.map.pairs(context());
    if (measured.useful_flops() > 2e7) return;
  }
  const Operands integers = make_operands(c, Fill::integers, true);
  const Operands reals = make_operands(c, Fill::reals, true);
  const Sums expected_integers = judge(context(), c, integers);
  const Sums expected_reals = judge(context(), c, reals);
  EXPECT_TRUE(same_bits(expected_integers.values, brute_force(c, integers)));
  std::vector<const Kernel*> able;
  for (const Kernel& kernel : registry(DeviceKind::cpu)) {
    if (can_run(context(), c, kernel)) able.push_back(&kernel);
  }
  for (int repeat = 0; repeat < 2; ++repeat) {
    const Kernel& kernel = *random->pick(able);
    const Context ctx = Context::cpu(static_cast<int>(random->integer(1, 5)));
    const Memory memory{.layout = random->pick(layouts), .gap = random->integer(0, 9)};
    SCOPED_TRACE(join(kernel.name, ", ", ctx.threads, " threads"));
    const Arithmetic arithmetic{accumulator(kernel), c.problem.dtype};
    EXPECT_TRUE(
        within_bound(run(ctx, c, kernel.name, integers, memory), expected_integers, arithmetic));
    EXPECT_TRUE(within_bound(run(ctx, c, kernel.name, reals, memory), expected_reals, arithmetic));
  }
}

TEST(RandomProblems, AgreeWithTheReferenceAndTheRelation) {
  // The flag's range is 0 to 99999; 0 is a new seed every time.
  uint64_t seed = GTEST_FLAG_GET(random_seed);
  if (seed == 0) seed = std::random_device()() % 99999 + 1;
  RecordProperty("seed", static_cast<int>(seed));
  Random random(seed);
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(3);
  int count = 0;
  while (!HasFailure() && std::chrono::steady_clock::now() < end) {
    const Problem problem = draw_problem(&random);
    const std::string text = problem.text();
    SCOPED_TRACE(join(text, " (problem ", count++, " of --gtest_random_seed=", seed, ")"));
    EXPECT_EQ(Problem::parse(text).text(), text);
    try {
      check_problem(text, &random);
    } catch (const std::exception& error) {
      ADD_FAILURE() << error.what();
    }
  }
  std::cout << count << " problems of --gtest_random_seed=" << seed << "\n";
}

}  // namespace
}  // namespace voxgemm::test
