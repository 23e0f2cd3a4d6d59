// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <algorithm>

#include "conv/kernel.h"
#include "voxgemm/error.h"

namespace voxgemm {
namespace {

constexpr Algorithm algorithms[] = {
    Algorithm::explicit_gemm, Algorithm::implicit_gemm, Algorithm::implicit_gemm_splitk,
    Algorithm::masked_implicit_gemm, Algorithm::masked_implicit_gemm_splitk};
static_assert(std::size(algorithms) == algorithm_count);

// A problem with a map of `rows` rows that have a third of their taps; nothing is computed here.
Problem problem_of(const std::string& text, int64_t rows = 10000, int threads = 4) {
  Problem problem = Problem::parse(text);
  problem.n_in = rows;
  problem.n_out = rows;
  problem.pairs = rows * problem.geometry.taps() / 3;
  problem.threads = threads;
  return problem;
}

std::vector<Problem> many_problems() {
  std::vector<Problem> list;
  for (const char* pass : {"forward ", "grad_input ", "grad_weight "}) {
    for (const char* dtype : {"f16 ", "bf16 ", "f32 ", "f64 "}) {
      for (const char* rest : {"subm3 64->128", "subm1 4->4", "conv2s2 1->3", "inv7s2 192->6"}) {
        for (const int64_t rows : {0, 1, 100, 1000000}) {
          for (const int threads : {1, 64}) {
            list.push_back(problem_of(std::string(pass) + dtype + rest, rows, threads));
          }
        }
      }
    }
  }
  return list;
}

const Candidate& picked(const std::vector<Candidate>& list) {
  return *std::find_if(list.begin(), list.end(), [](const auto& c) { return c.picked; });
}

TEST(Choose, PicksOneTheCheapestThatCanRun) {
  for (const Problem& problem : many_problems()) {
    SCOPED_TRACE(problem.text());
    const std::vector<Candidate> list = candidates(problem, {});
    ASSERT_EQ(list.size(), registry(DeviceKind::cpu).size());
    const auto count = std::count_if(list.begin(), list.end(), [](auto& c) { return c.picked; });
    ASSERT_EQ(count, 1);
    const Candidate& best = picked(list);
    EXPECT_EQ(choose(problem, {}).name, best.kernel);
    EXPECT_EQ(best.reason, "");
    EXPECT_GE(best.seconds, 0);
    for (size_t i = 0; i < list.size(); ++i) {
      EXPECT_EQ(list[i].kernel, registry(DeviceKind::cpu)[i].name);
      if (!list[i].reason.empty() || registry(DeviceKind::cpu)[i].reference) continue;
      EXPECT_LE(best.seconds, list[i].seconds) << list[i].kernel;
    }
  }
}

TEST(Choose, DependsOnTheProblemOnly) {
  for (const Problem& problem : many_problems()) {
    EXPECT_EQ(&choose(problem, {}), &choose(problem, {})) << problem.text();
  }
}

TEST(Choose, TakesTheReferenceOnlyWhereNothingElseRuns) {
  for (const Problem& problem : many_problems()) {
    EXPECT_EQ(choose(problem, {}).reference, problem.dtype == Dtype::f64) << problem.text();
  }
}

// The names are the user's search space: each must have a kernel for every problem of the blocked
// dtypes.
TEST(Choose, EveryAlgorithmRunsEveryProblem) {
  for (const Algorithm algorithm : algorithms) {
    for (const Problem& problem : many_problems()) {
      if (problem.dtype == Dtype::f64) continue;
      const Kernel& kernel = choose(problem, {.algorithms = {algorithm}, .kernel = ""});
      EXPECT_FALSE(kernel.reference)
          << name(algorithm) << ", " << problem.text() << ", " << problem.n_out << " rows";
      EXPECT_EQ(kernel.algorithm, algorithm) << problem.text();
    }
  }
}

TEST(Choose, StaysInsideAListOfAlgorithms) {
  const Filter filter{.algorithms = {Algorithm::explicit_gemm, Algorithm::masked_implicit_gemm},
                      .kernel = ""};
  for (const Problem& problem : many_problems()) {
    if (problem.dtype == Dtype::f64) continue;
    SCOPED_TRACE(problem.text());
    const Algorithm chosen = choose(problem, filter).algorithm;
    EXPECT_TRUE(chosen == filter.algorithms[0] || chosen == filter.algorithms[1]);
    for (const Candidate& c : candidates(problem, filter)) {
      if (c.kernel.starts_with("implicit_gemm_cpu/")) {
        EXPECT_EQ(c.reason, "the filter leaves out implicit_gemm");
      }
    }
  }
}

TEST(Choose, F64RunsInEveryFilter) {
  for (const Algorithm algorithm : algorithms) {
    const Problem problem = problem_of("forward f64 subm3 8->8");
    EXPECT_TRUE(choose(problem, {.algorithms = {algorithm}, .kernel = ""}).reference);
  }
}

TEST(Choose, TakesAKernelByName) {
  const Problem problem = problem_of("forward f32 subm3 64->128");
  for (const Candidate& candidate : candidates(problem, {})) {
    if (!candidate.reason.empty()) continue;
    const Filter filter{.algorithms = {}, .kernel = candidate.kernel};
    EXPECT_EQ(choose(problem, filter).name, candidate.kernel);
    EXPECT_EQ(picked(candidates(problem, filter)).kernel, candidate.kernel);
  }
}

// One line for the problem, one for every kernel with its reason.
void expect_unsupported(const Problem& problem, const Filter& filter, const std::string& reason) {
  try {
    choose(problem, filter);
    FAIL() << "something was chosen";
  } catch (const Error& error) {
    const std::string message = error.what();
    EXPECT_EQ(error.code(), ErrorCode::unsupported);
    EXPECT_EQ(message.rfind("no kernel can run this problem inside the filter:\n", 0), 0U)
        << message;
    EXPECT_NE(message.find(explain(problem, filter)), std::string::npos) << message;
    EXPECT_NE(message.find(reason), std::string::npos) << message;
  }
}

TEST(Choose, RefusesWithTheTableWhereNothingRuns) {
  const Problem problem = problem_of("forward f32 subm3 64->128");
  expect_unsupported(problem, {.algorithms = {}, .kernel = "fast_gemm"},
                     "no: the filter asks for fast_gemm");
  // A kernel of another dtype.
  const auto f16 =
      std::find_if(registry(DeviceKind::cpu).begin(), registry(DeviceKind::cpu).end(),
                   [](const Kernel& k) { return k.name.find("/f16/") != std::string::npos; });
  ASSERT_NE(f16, registry(DeviceKind::cpu).end());
  expect_unsupported(problem, {.algorithms = {}, .kernel = f16->name}, "no: takes f16");
}

TEST(Explain, ShowsEveryKernelWithItsCostOrItsReason) {
  for (const Problem& problem : many_problems()) {
    const std::string text = explain(problem);
    EXPECT_EQ(text.rfind(problem.text() + " (", 0), 0U) << text;
    EXPECT_EQ(std::count(text.begin(), text.end(), '\n'),
              static_cast<int64_t>(registry(DeviceKind::cpu).size()) + 1);
    for (const Candidate& c : candidates(problem, {})) {
      const size_t at = text.find((c.picked ? " > " : "   ") + c.kernel + " ");
      ASSERT_NE(at, std::string::npos) << c.kernel << "\n" << text;
      const std::string line = text.substr(at, text.find('\n', at) - at);
      EXPECT_NE(line.find(c.reason.empty() ? " ms predicted" : "no: " + c.reason),
                std::string::npos)
          << line;
      EXPECT_EQ(line.ends_with(", picked"), c.picked) << line;
    }
  }
}

}  // namespace
}  // namespace voxgemm
