// SPDX-License-Identifier: Apache-2.0
//
// What comes with the library beside the formulas: corrections of them, and pairs that are guessed.
#include "conv/correction.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "conv/known.h"
#include "conv/machines.h"
#include "support/run.h"
#include "voxgemm/choose.h"

namespace voxgemm::test {
namespace {

Problem problem_of(const std::string& text, int64_t rows = 32768) {
  Problem problem = Problem::parse(text);
  problem.n_in = problem.n_out = rows;
  return problem;
}

size_t row_of(const std::string& kernel) {
  return find_kernel(DeviceKind::cpu, kernel) - registry(DeviceKind::cpu).data();
}

TEST(Correction, IsOneAtTheMiddleOfAllSizes) {
  EXPECT_EQ(sizes_for_correction(problem_of("forward f32 subm3 64->64")), (Correction{1}));
}

TEST(Correction, CountsDoublingsOfThePassesOwnSizes) {
  EXPECT_EQ(sizes_for_correction(problem_of("forward f32 subm3 128->16", 65536)),
            (Correction{1, 1, 1, 1, 1, -2, 2, 0}));
  EXPECT_EQ(sizes_for_correction(problem_of("grad_input f32 subm3 128->16", 16384)),
            (Correction{1, -1, 1, -2, 2, 1, 1, 0}));
}

TEST(Correction, EndsWhereNothingWasMeasured) {
  const auto of = [](const std::string& text, int64_t rows) {
    return sizes_for_correction(problem_of(text, rows));
  };
  EXPECT_EQ(of("forward f32 subm3 1024->1", int64_t{1} << 40),
            of("forward f32 subm3 4096->4", 1 << 30));
  EXPECT_EQ(of("forward f32 subm3 64->64", 0), of("forward f32 subm3 64->64", 1));
}

TEST(Correction, IsReadFromLines) {
  const std::string kernel = "implicit_gemm_cpu/f32/portable";
  const std::string lines = "forward " + kernel + " 1 2 3 4 5 6 7 8\n" +         //
                            "grad_weight " + kernel + " -1.5 0 0 0 0 0 0 0\n" +  //
                            "forward masked_implicit_gemm_cpu/f32/portable 1 2 3 4 5 6 7\n" +
                            "forward a_kernel_of_tomorrow/f32 1 1 1 1 1 1 1 1\n" +
                            "both explicit_gemm_cpu/f32/portable 1 1 1 1 1 1 1 1\n\n";
  const Corrections all = read_corrections(lines, DeviceKind::cpu);
  const Correction numbers = {1, 2, 3, 4, 5, 6, 7, 8};
  for (const Pass pass : {Pass::forward, Pass::grad_input}) {
    EXPECT_EQ(all[static_cast<size_t>(pass)][row_of(kernel)], numbers);
  }
  EXPECT_EQ(all[static_cast<size_t>(Pass::grad_weight)][row_of(kernel)], (Correction{-1.5}));
  int others = 0;
  for (const auto& of_pass : all) {
    for (const Correction& correction : of_pass) others += correction != Correction{};
  }
  EXPECT_EQ(others, 3);
}

// They multiply the formula's seconds, also where measured times do not count.
TEST(Correction, ThatIsShippedIsPartOfAPrediction) {
  std::vector<Problem> problems;
  for (const char* text : {"forward f32 subm3 8->200", "grad_weight bf16 conv2s2 16->24"}) {
    for (const int architecture : {0, 80, 90}) {
      problems.push_back(problem_of(text, 5000));
      if (architecture == 0) continue;
      problems.back().device.kind = DeviceKind::cuda;
      problems.back().architecture = architecture;
    }
  }
  for (const Problem& problem : problems) {
    const Correction sizes = sizes_for_correction(problem);
    for (const Candidate& candidate : candidates(problem, {.measured = false})) {
      if (!candidate.reason.empty()) continue;
      const Kernel& kernel = *find_kernel(problem.device.kind, candidate.kernel);
      Problem with_pairs = problem;
      with_pairs.pairs = std::llround(likely_pairs(problem));
      double power = 0;
      const Correction& correction = shipped_correction(kernel, problem);
      if (problem.architecture != 90) {
        EXPECT_EQ(correction, Correction{}) << "they were fitted elsewhere";
      }
      for (size_t term = 0; term < sizes.size(); ++term) power += correction[term] * sizes[term];
      EXPECT_DOUBLE_EQ(candidate.seconds, std::exp2(power) * kernel.cost(kernel, with_pairs))
          << candidate.kernel;
    }
  }
}

// A file of which most lines name no kernel any more has to be fitted again.
TEST(Correction, ThatIsShippedIsOfKernelsThatExist) {
  const std::string_view lines = machines::hopper;
  if (registry(DeviceKind::cuda).empty()) GTEST_SKIP() << "there are no CUDA kernels in this build";
  const Corrections all = read_corrections(lines, DeviceKind::cuda);
  int64_t used = 0;
  for (const Pass pass : {Pass::forward, Pass::grad_weight}) {
    const auto& of_pass = all[static_cast<size_t>(pass)];
    used += std::count_if(of_pass.begin(), of_pass.end(),
                          [](const Correction& each) { return each != Correction{}; });
  }
  const auto given = std::count(lines.begin(), lines.end(), '\n');
  EXPECT_GT(given, 10);
  EXPECT_GE(used, given * 3 / 4) << given << " lines";
}

// Only maps on the CPU tell their pairs; they stand for those of a device.
double likely_over_real(const std::string& text) {
  const Case c = make_case(context(), text);
  Problem problem =
      Plan::make(context(), c.map, plan_options(c.problem, {})).problem(context(), c.problem.pass);
  const auto real = static_cast<double>(problem.pairs);
  problem.pairs = -1;
  return likely_pairs(problem) / real;
}

TEST(LikelyPairs, AreTheRealOnesWhereTheyAreKnown) {
  Problem problem = problem_of("forward f32 subm3 4->4");
  problem.pairs = 7;
  EXPECT_EQ(likely_pairs(problem), 7);
}

TEST(LikelyPairs, OfWindowsThatDoNotOverlapAreExact) {
  for (const char* pass : {"forward ", "grad_input ", "grad_weight "}) {
    for (const char* operation : {"conv2s2", "inv2s2", "conv3s3", "subm1"}) {
      EXPECT_DOUBLE_EQ(likely_over_real(join(pass, "f32 ", operation, " 4->4 random:300:40")), 1)
          << pass << operation;
    }
  }
}

TEST(LikelyPairs, OfLayersThatDownsampleAreNearlyExact) {
  for (const char* pass : {"forward ", "grad_input ", "grad_weight "}) {
    for (const char* operation : {"conv3s2p1", "inv3s2p1"}) {
      for (const char* cloud : {"shell:24", "random:300:40"}) {
        const double ratio = likely_over_real(join(pass, "f32 ", operation, " 4->4 ", cloud));
        EXPECT_NEAR(std::log2(ratio), 0, 0.2) << pass << operation << " " << cloud;
      }
    }
  }
}

TEST(LikelyPairs, OfASurface) {
  for (const char* operation : {"subm3", "subm5"}) {
    const double ratio = likely_over_real(join("forward f32 ", operation, " 4->4 shell:40"));
    EXPECT_NEAR(std::log2(ratio), 0, 0.25) << operation;
  }
}

}  // namespace
}  // namespace voxgemm::test
