// SPDX-License-Identifier: Apache-2.0
//
// Choices for a made-up device: nothing runs, so none is needed.
#include <gtest/gtest.h>

#include <algorithm>

#include "conv/kernel.h"
#include "voxgemm/choose.h"

namespace voxgemm {
namespace {

Problem problem_of(const std::string& text) {
  Problem problem = Problem::parse(text);
  problem.n_in = problem.n_out = 100000;
  problem.device.kind = DeviceKind::cuda;
  problem.architecture = 90;
  return problem;
}

bool runs(const Problem& problem, const std::string& kernel, Algorithm algorithm) {
  const auto list = candidates(problem, {.algorithms = {algorithm}, .measured = false});
  return std::any_of(list.begin(), list.end(), [&](const Candidate& candidate) {
    return candidate.kernel == kernel && candidate.reason.empty();
  });
}

TEST(CudaChoose, EverySearchSpaceHasAKernelForEveryPass) {
  for (const char* pass : {"forward", "grad_input", "grad_weight"}) {
    for (const char* dtype : {"f16", "bf16", "f32", "tf32", "bf16x3", "bf16x6"}) {
      for (int a = 0; a < algorithm_count; ++a) {
        const auto algorithm = static_cast<Algorithm>(a);
        const Problem problem = problem_of(std::string(pass) + " " + dtype + " subm3 64->64");
        const Kernel& picked = choose(problem, {.algorithms = {algorithm}, .measured = false});
        EXPECT_FALSE(picked.reference) << problem.text() << " " << name(algorithm);
      }
    }
  }
}

// It reads the map's own table in order and leaves absent pairs out: every space but gathering.
TEST(CudaChoose, WithoutAScheduleAKernelBelongsToSeveralSearchSpaces) {
  const Problem problem = problem_of("grad_weight f16 subm3 64->64");
  for (int a = 0; a < algorithm_count; ++a) {
    const auto algorithm = static_cast<Algorithm>(a);
    EXPECT_EQ(runs(problem, "grad_weight_sm90/f16", algorithm),
              algorithm != Algorithm::explicit_gemm)
        << name(algorithm);
  }
}

TEST(CudaChoose, EveryKernelsNameIsAFilter) {
  for (const std::string& kernel : kernel_names(DeviceKind::cuda)) {
    EXPECT_EQ(Filter::parse(kernel).kernel, kernel);
  }
}

}  // namespace
}  // namespace voxgemm
