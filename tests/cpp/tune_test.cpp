// SPDX-License-Identifier: Apache-2.0
//
// Tuning with a real clock: what it keeps, never how fast something is.
#include "voxgemm/tune.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <fstream>

#include "conv/known.h"
#include "support/run.h"
#include "tune/judge.h"
#include "voxgemm/error.h"

namespace voxgemm::test {
namespace {

namespace fs = std::filesystem;

// A folder of this process's own, set before anything asks for it.
const std::string& folder() {
  static const std::string made = [] {
    std::string name = (fs::temp_directory_path() / "voxgemm-tune-XXXXXX").string();
    const char* path = mkdtemp(name.data());
    setenv("VOXGEMM_CACHE_DIR", path, 1);
    return std::string(path);
  }();
  return made;
}

class Tune : public testing::Test {
 protected:
  void SetUp() override { folder(); }
  static void TearDownTestSuite() { fs::remove_all(folder()); }

  const Context ctx = Context::cpu(2);
  const Case c = make_case(ctx, "forward f32 conv3s2p1 8->16 random:300:8");
  PlanOptions options(const Filter& filter = {}) const { return plan_options(c.problem, filter); }
  Problem problem(Pass pass, int c_in = 8) const {
    PlanOptions asked = options();
    asked.c_in = c_in;
    return Plan::make(ctx, c.map, asked).problem(ctx, pass);
  }
  static std::vector<Candidate> measured(const Problem& problem) {
    std::vector<Candidate> list = candidates(problem, {});
    std::erase_if(list, [](const Candidate& candidate) { return candidate.measured == 0; });
    return list;
  }
};

TEST_F(Tune, KeepsTheTimesOfThePassAndMeasuresOnlyWhatIsMissing) {
  for (const Pass pass : {Pass::forward, Pass::grad_input, Pass::grad_weight}) {
    EXPECT_TRUE(measured(problem(pass)).empty());
    EXPECT_FALSE(is_tuned(problem(pass), {}));
    const Tuning found = tune(ctx, c.map, options(), pass);
    EXPECT_GE(found.measured, 1);
    EXPECT_EQ(found.not_written, "");
    EXPECT_TRUE(found.wrong.empty());
    EXPECT_EQ(std::count(found.records.begin(), found.records.end(), '\n'), found.measured);
    EXPECT_EQ(measured(problem(pass)).size(), static_cast<size_t>(found.measured));
    EXPECT_TRUE(is_tuned(problem(pass), {}));
    const auto all = candidates(problem(pass), {});
    const auto picked =
        std::find_if(all.begin(), all.end(), [](const Candidate& each) { return each.picked; });
    EXPECT_EQ(picked->by, Chooser::store);
    for (const Candidate& other : measured(problem(pass))) {
      EXPECT_LE(picked->measured, other.measured);
    }
    EXPECT_EQ(tune(ctx, c.map, options(), pass).measured, 0) << "nothing is missing";
    EXPECT_EQ(tune(ctx, c.map, options(), pass, {.again = true}).measured, found.measured);
  }
}

TEST_F(Tune, ExhaustivelyEverythingInsideTheFilter) {
  PlanOptions asked = options();
  asked.c_in = 9;
  asked.filters.fill({.algorithms = {Algorithm::explicit_gemm, Algorithm::implicit_gemm}});
  const Problem of = problem(Pass::forward, 9);
  const Case other = make_case(ctx, "forward f32 conv3s2p1 9->16 random:300:8");
  tune(ctx, other.map, asked, Pass::forward, {.budget_seconds = 60, .exhaustive = true});
  for (const Candidate& candidate : candidates(of, asked.filters[0])) {
    const bool timed = candidate.reason.empty() && candidate.kernel != "reference_cpu";
    EXPECT_EQ(candidate.measured > 0, timed) << candidate.kernel;
  }
  for (const Candidate& candidate : measured(of)) {
    const Kernel* kernel = find_kernel(DeviceKind::cpu, candidate.kernel);
    EXPECT_TRUE(kernel->algorithm == Algorithm::explicit_gemm ||
                kernel->algorithm == Algorithm::implicit_gemm);
  }
}

TEST_F(Tune, NothingWhereThereIsNothingToChoose) {
  EXPECT_EQ(tune(ctx, c.map, options({.kernel = "reference_cpu"}), Pass::forward).measured, 0);
  const Case none = make_case(ctx, "forward f32 subm3 8->16 empty");
  EXPECT_EQ(tune(ctx, none.map, options(), Pass::forward).measured, 0);
  PlanOptions f64 = options();
  f64.dtype = Dtype::f64;
  EXPECT_EQ(tune(ctx, c.map, f64, Pass::forward).measured, 0);
}

TEST_F(Tune, KernelsAreHeldAgainstTheReference) {
  const Case repeats = make_case(ctx, "forward f32 subm3 8->16 repeat:60");
  for (const Case* each : {&c, &repeats}) {
    for (const Dtype dtype : {Dtype::f16, Dtype::bf16, Dtype::f32}) {
      for (const Pass pass : {Pass::forward, Pass::grad_input, Pass::grad_weight}) {
        PlanOptions asked = plan_options(each->problem, {});
        asked.dtype = dtype;
        const Judge judge(ctx, each->map, asked, pass);
        ASSERT_TRUE(judge.has_verdict());
        const Problem problem = Plan::make(ctx, each->map, asked).problem(ctx, pass);
        for (const Candidate& candidate : candidates(problem, {})) {
          if (!candidate.reason.empty()) continue;
          asked.filters[static_cast<size_t>(pass)] = {.kernel = candidate.kernel};
          Plan right = Plan::make(ctx, each->map, asked);
          EXPECT_TRUE(judge.agrees(&right)) << candidate.kernel << " " << problem.text();
        }
        // As a kernel with a fault: one neighbour of the map is missing.
        KernelMap other = each->map;
        other.neighbours = make_matrix(ctx, each->map.taps(), each->map.n_out, Dtype::i32);
        copy_elements(ctx, each->map.neighbours, other.neighbours);
        for (int64_t row = 0; row < other.n_out; ++row) {
          int32_t& at = other.neighbours.row<int32_t>(other.taps() / 2)[row];
          if (at < 0 || row == 0) continue;
          at = -1;
          break;
        }
        other.symmetric = false;
        asked.filters = {};
        asked.transposed = nullptr;
        Plan wrong = Plan::make(ctx, other, asked);
        EXPECT_FALSE(judge.agrees(&wrong)) << problem.text();
      }
    }
  }
  PlanOptions large = plan_options(c.problem, {});
  large.c_in = large.c_out = 4096;
  EXPECT_FALSE(Judge(ctx, c.map, large, Pass::forward).has_verdict()) << "it would take too long";
}

TEST_F(Tune, AtFirstUse) {
  PlanOptions asked = options();
  asked.c_in = 10;
  const Operands operands = make_operands(c.with(Pass::forward, Dtype::f32), Fill::integers);
  EXPECT_FALSE(asked.tune_at_first_use);
  Plan::make(ctx, c.map, asked).kernel(ctx, Pass::forward);
  EXPECT_TRUE(measured(problem(Pass::forward, 10)).empty());
  asked.tune_at_first_use = true;
  const Kernel& kernel = Plan::make(ctx, c.map, asked).kernel(ctx, Pass::forward);
  EXPECT_FALSE(measured(problem(Pass::forward, 10)).empty());
  EXPECT_EQ(kernel.name, choose(problem(Pass::forward, 10), {}).name);
}

TEST_F(Tune, OtherProcessesTakeItsRecordsOver) {
  PlanOptions asked = options();
  asked.c_in = 11;
  const Tuning found = tune(ctx, c.map, asked, Pass::forward);
  // As another would: the same lines of another size class.
  std::string records = found.records;
  for (size_t at = 0; (at = records.find("11->16", at)) != std::string::npos;) {
    records.replace(at, 6, "12->16");
  }
  learn_times({}, records);
  EXPECT_EQ(measured(problem(Pass::forward, 12)).size(), static_cast<size_t>(found.measured));
  EXPECT_EQ(export_times().find("12->16"), std::string::npos) << "in this process only";
  EXPECT_THROW(learn_times({}, "nonsense"), Error);
}

TEST_F(Tune, CalibrationsCorrectPredictions) {
  const Problem of = problem(Pass::forward, 20);
  const auto plain = candidates(of, {.measured = false});
  int corrected = 0;
  // A busy machine needs more time until it has been through every kind of problem.
  for (double budget = 0.5; corrected == 0; budget *= 4) {
    ASSERT_LT(budget, 1000);
    EXPECT_GE(calibrate(ctx, budget).measured, 1);
    EXPECT_NE(export_times().find("calibration of forward"), std::string::npos);
    const auto with = candidates(of, {});
    for (size_t k = 0; k < plain.size(); ++k) corrected += plain[k].seconds != with[k].seconds;
  }
}

TEST_F(Tune, FilesAreShownExportedImportedAndCleared) {
  const std::string there = folder() + "/files";
  const std::string lines =
      R"({"device":"A","problem":"p","kernel":"k","revision":1,"seconds":1.0000e-03})"
      "\n"
      R"({"device":"B","problem":"p","kernel":"k","revision":1,"seconds":2.0000e-03})"
      "\n";
  EXPECT_TRUE(times_files(there).empty());
  EXPECT_EQ(export_times({}, there), "");
  EXPECT_EQ(import_times(lines, there), 2);
  EXPECT_EQ(export_times({}, there), lines);
  EXPECT_EQ(import_times(lines, there), 2);
  std::ofstream(there + "/a.jsonl", std::ios::app) << "torn";
  std::ofstream(there + "/notes.txt") << "not ours";
  EXPECT_EQ(export_times({}, there), lines);
  EXPECT_EQ(export_times("A", there), lines.substr(0, lines.find('\n') + 1));
  const std::vector<TimesFile> files = times_files(there);
  ASSERT_EQ(files.size(), 2U);
  EXPECT_EQ(files[0].path, there + "/a.jsonl");
  EXPECT_EQ(files[0].device, "A");
  EXPECT_EQ(files[0].records, 1);
  EXPECT_EQ(files[0].problems, 1);
  EXPECT_EQ(files[0].superseded, 1);
  EXPECT_EQ(files[0].foreign, 1);
  try {
    import_times(lines + "nonsense\n", there);
    FAIL();
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("line 3"), std::string::npos) << error.what();
  }
  EXPECT_EQ(clear_times(there), 2);
  EXPECT_TRUE(times_files(there).empty());
  EXPECT_TRUE(fs::exists(there + "/notes.txt"));
}

}  // namespace
}  // namespace voxgemm::test
