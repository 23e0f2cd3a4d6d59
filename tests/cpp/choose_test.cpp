// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <algorithm>
#include <map>

#include "conv/kernel.h"
#include "conv/known.h"
#include "conv/ranking.h"
#include "voxgemm/choose.h"
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
      EXPECT_EQ(line.find(", picked by the ") != std::string::npos, c.picked) << line;
    }
  }
}

// Made-up times of the CPU of the tests: of another number of threads than any other test's.
class WarmStore : public testing::Test {
 protected:
  Problem problem(int64_t rows = 10000) const { return problem_of(text, rows, 1000); }
  static Filter only(Algorithm algorithm) { return {.algorithms = {algorithm}}; }
  // The model's favourite inside a filter.
  std::string favourite(const Filter& filter) const {
    Filter cold = filter;
    cold.measured = false;
    return choose(problem(), cold).name;
  }
  void remember(const std::string& kernel, double seconds, int revision = 1) const {
    Store& store = store_of({});
    store.remember({{store.device(), size_class(problem()), kernel, revision, seconds}});
  }
  const Candidate picked_in(const Filter& filter) const {
    return picked(candidates(problem(), filter));
  }
  // Another problem for every test, as a process has one store.
  std::string text = join("forward f32 subm3 64->", 64 + number());

 private:
  static int number() { return testing::UnitTest::GetInstance()->current_test_info()->line(); }
};

TEST_F(WarmStore, TheFastestMeasuredWins) {
  const std::string slow = favourite({});
  EXPECT_EQ(picked_in({}).by, Chooser::model);
  remember(slow, 2e-3);
  EXPECT_EQ(picked_in({}).kernel, slow);
  EXPECT_EQ(picked_in({}).by, Chooser::store);
  std::string fast = favourite(only(Algorithm::explicit_gemm));
  if (fast == slow) fast = favourite(only(Algorithm::implicit_gemm));
  remember(fast, 1e-3);
  const Candidate best = picked_in({});
  EXPECT_EQ(best.kernel, fast);
  EXPECT_EQ(best.measured, 1e-3);
  EXPECT_NE(best.seconds, best.measured);
  EXPECT_NE(explain(problem(), {}).find("1.0000 ms measured, picked by the store"),
            std::string::npos);
  EXPECT_EQ(choose(problem(), {.measured = false}).name, slow);
  EXPECT_EQ(choose(problem(), {.kernel = slow}).name, slow);
}

// Times measured inside one filter are neither the answer of another nor lost to it.
TEST_F(WarmStore, FiltersAreViewsOfOneBodyOfKnowledge) {
  std::vector<Filter> filters = {{}};
  for (const Algorithm algorithm : algorithms) filters.push_back(only(algorithm));
  filters.push_back({.algorithms = {Algorithm::explicit_gemm, Algorithm::implicit_gemm_splitk}});
  std::vector<std::string> cold;
  cold.reserve(filters.size());
  for (const Filter& filter : filters) cold.push_back(favourite(filter));
  // One restricted filter is tuned: of the others only those that have the same favourite know.
  const std::string measured = cold[1];
  remember(measured, 1e-9);
  for (size_t f = 0; f < filters.size(); ++f) {
    EXPECT_EQ(choose(problem(), filters[f]).name, cold[f]) << f;
    const bool knows = cold[f] == measured;
    EXPECT_NE(picked_in(filters[f]).by, knows ? Chooser::model : Chooser::store) << f;
  }
  // Everything is tuned: each filter has the fastest inside it.
  double seconds = 1;
  std::map<std::string, double> times;
  for (const Candidate& candidate : candidates(problem(), {.measured = false})) {
    if (!candidate.reason.empty() || candidate.kernel == "reference_cpu") continue;
    times[candidate.kernel] = seconds *= 0.9;
    remember(candidate.kernel, seconds);
  }
  for (const Filter& filter : filters) {
    const Candidate best = picked_in(filter);
    for (const Candidate& candidate : candidates(problem(), filter)) {
      if (!candidate.reason.empty() || candidate.kernel == "reference_cpu") continue;
      EXPECT_LE(times[best.kernel], times[candidate.kernel]) << candidate.kernel;
    }
    const auto inside = std::count(filter.algorithms.begin(), filter.algorithms.end(),
                                   choose(problem(), filter).algorithm);
    EXPECT_TRUE(filter.algorithms.empty() || inside == 1);
  }
}

TEST_F(WarmStore, OtherRevisionsKernelsAndSizesDoNotCount) {
  const std::string cold = favourite({});
  remember(cold, 1e-3, 2);
  remember("a_kernel_of_tomorrow/f32", 1e-9);
  remember("reference_cpu", 1e-9);
  EXPECT_EQ(picked_in({}).kernel, cold);
  EXPECT_EQ(picked_in({}).by, Chooser::model);
  remember(cold, 1e-3);
  EXPECT_EQ(picked_in({}).by, Chooser::store);
  // Rows and pairs of the same powers of two; other threads, dtypes, channels and passes are other
  // problems too.
  EXPECT_EQ(picked(candidates(problem(9800), {})).by, Chooser::store);
  for (const Problem& other : {problem(12000), problem(1), problem(0)}) {
    EXPECT_EQ(picked(candidates(other, {})).by, Chooser::model) << other.n_out;
  }
  Problem other = problem();
  other.threads = 999;
  EXPECT_EQ(picked(candidates(other, {})).by, Chooser::model);
}

TEST_F(WarmStore, ANewFavouriteIsNotOutvoted) {
  // Its candidates changed: what the model likes best was never measured.
  const std::string cold = favourite({});
  for (const Candidate& candidate : candidates(problem(), {})) {
    if (candidate.reason.empty() && candidate.kernel != cold) remember(candidate.kernel, 1e-6);
  }
  EXPECT_EQ(picked_in({}).kernel, cold);
  EXPECT_EQ(picked_in({}).by, Chooser::model);
}

TEST_F(WarmStore, ACalibrationCorrectsTheModel) {
  const std::string cold = favourite({});
  const Candidate before = picked_in({});
  Store& store = store_of({});
  store.remember({{store.device(), calibration_of(Pass::forward), cold, 1, 1e6},
                  {store.device(), calibration_of(Pass::grad_input), cold, 1, 1e-6}});
  const std::vector<Candidate> after = candidates(problem(), {});
  EXPECT_NE(picked(after).kernel, cold);
  for (const Candidate& candidate : after) {
    if (candidate.kernel != cold) continue;
    EXPECT_DOUBLE_EQ(candidate.seconds, 1e6 * before.seconds);
  }
  EXPECT_EQ(choose(problem(), {.measured = false}).name, cold);
  store.remember({{store.device(), calibration_of(Pass::forward), cold, 1, 1.0},
                  {store.device(), calibration_of(Pass::grad_input), cold, 1, 1.0}});
  EXPECT_EQ(picked_in({}).kernel, cold);
}

TEST(SizeClass, RoundsToPowersOfTwo) {
  Problem problem = problem_of("forward f16 subm3 64->128", 100000, 4);
  problem.pairs = 900000;
  problem.cloud = "shell:256";
  EXPECT_EQ(size_class(problem), "forward f16 subm3 64->128 2^17->2^17.p2^20.t4");
  EXPECT_EQ(Problem::parse(size_class(problem)).cloud, "2^17->2^17.p2^20.t4");
  problem.device.kind = DeviceKind::cuda;
  problem.pairs = -1;
  problem.n_out = 0;
  EXPECT_EQ(size_class(problem), "forward f16 subm3 64->128 2^17->0");
}

// Made-up kernels 0, 1, 2 ... with predicted and, if not 0, measured times.
int ranked(const std::vector<double>& predicted, const std::vector<double>& measured) {
  Ranking<int> ranking;
  for (size_t k = 0; k < predicted.size(); ++k) {
    ranking.offer(static_cast<int>(k) + 1, predicted[k], false);
  }
  for (size_t k = 0; k < measured.size(); ++k) {
    if (measured[k] > 0) ranking.measured(static_cast<int>(k) + 1, measured[k]);
  }
  return ranking.best() - 1;
}

TEST(Ranking, OfMadeUpCosts) {
  EXPECT_EQ(ranked({3, 1, 2}, {}), 1);
  EXPECT_EQ(ranked({3, 1, 2}, {0, 9, 8}), 2);
  EXPECT_EQ(ranked({3, 1, 2}, {7, 9, 8}), 0);
  EXPECT_EQ(ranked({3, 1, 2}, {7, 0, 8}), 1) << "the favourite was not measured";
  EXPECT_EQ(ranked({1, 1}, {}), 0) << "the first of equals";
  EXPECT_EQ(ranked({2, 1}, {5, 5}), 0);
}

}  // namespace
}  // namespace voxgemm
