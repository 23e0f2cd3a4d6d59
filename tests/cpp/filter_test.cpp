// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <cstdlib>

#include "conv/kernel.h"
#include "support/message_of.h"
#include "voxgemm/choose.h"
#include "voxgemm/error.h"
#include "voxgemm/plan.h"

namespace voxgemm {
namespace {

using test::message_of;

using Algorithms = std::vector<Algorithm>;

Algorithms parsed(const std::string& text) { return Filter::parse(text).algorithms; }

TEST(Filter, ReadsNamesListsAndEverything) {
  for (int a = 0; a < algorithm_count; ++a) {
    const auto algorithm = static_cast<Algorithm>(a);
    EXPECT_EQ(parsed(std::string(name(algorithm))), Algorithms{algorithm});
  }
  const Algorithms two = {Algorithm::implicit_gemm, Algorithm::explicit_gemm};
  for (const char* text : {"implicit_gemm,explicit_gemm", "[implicit_gemm, explicit_gemm]",
                           " [ Implicit_GEMM ,\texplicit_gemm,implicit_gemm ] "}) {
    EXPECT_EQ(parsed(text), two) << text;
  }
  for (const char* text : {"auto", "AUTO ", "[auto]", "implicit_gemm, auto"}) {
    EXPECT_EQ(parsed(text), Algorithms{}) << text;
  }
}

TEST(Filter, ReadsEveryKernelsName) {
  for (const std::string& kernel : kernel_names(DeviceKind::cpu)) {
    EXPECT_EQ(Filter::parse(kernel).kernel, kernel);
    EXPECT_TRUE(parsed(kernel).empty());
  }
}

TEST(Filter, RefusesWithTheLegalNames) {
  for (const char* text : {"", "fast", "implicit_gemm,", "[]", "implicit_gemm fast", "[fast]",
                           "implicit_gemm,fast", "masked_implicit_gemm_cpu/f32/none"}) {
    const std::string sentence = message_of([&] { Filter::parse(text); });
    EXPECT_NE(sentence.find("auto, explicit_gemm, implicit_gemm, implicit_gemm_splitk, "
                            "masked_implicit_gemm, masked_implicit_gemm_splitk"),
              std::string::npos)
        << text << ": " << sentence;
  }
  EXPECT_NE(message_of([] { Filter::parse("[implicit_gemm"); }).find("bracket"), std::string::npos);
}

TEST(Filter, ReadsFiltersByPass) {
  const Algorithms one = {Algorithm::implicit_gemm};
  const Algorithms other = {Algorithm::explicit_gemm, Algorithm::masked_implicit_gemm};
  const auto expect = [](const std::string& text, const std::array<Algorithms, 3>& wanted) {
    const Filters filters = parse_filters(text);
    for (size_t p = 0; p < 3; ++p) EXPECT_EQ(filters[p].algorithms, wanted[p]) << text << " " << p;
  };
  expect("implicit_gemm", {one, one, one});
  expect("auto", {});
  expect("backward=implicit_gemm", {Algorithms{}, one, one});
  expect("forward = implicit_gemm; backward = [explicit_gemm, masked_implicit_gemm]",
         {one, other, other});
  expect("grad_weight=implicit_gemm;grad_input=auto", {Algorithms{}, Algorithms{}, one});
  for (const char* text : {"forward=fast", "back=auto", "forward=auto;forward=auto",
                           "backward=auto;grad_input=auto", "forward=auto;implicit_gemm"}) {
    EXPECT_NE(message_of([&] { parse_filters(text); }), "no error") << text;
  }
}

// Read once in a process, so each value is read by a process of its own.
void read_environment(const char* value) {
  setenv("VOXGEMM_ALGORITHM", value, 1);
  try {
    const Filters& filters = environment_filters();
    const bool as_said = filters[0].algorithms.empty() &&
                         filters[1].algorithms == Algorithms{Algorithm::explicit_gemm} &&
                         filters[2].algorithms == filters[1].algorithms &&
                         PlanOptions{}.filters[1].algorithms == filters[1].algorithms;
    std::exit(as_said ? 0 : 1);
  } catch (const Error& error) {
    std::fprintf(stderr, "%s\n", error.what());
    std::exit(2);
  }
}

TEST(FilterDeathTest, OfTheEnvironment) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  EXPECT_EXIT(read_environment("backward=explicit_gemm"), testing::ExitedWithCode(0), "");
  EXPECT_EXIT(read_environment("implicit_gemm"), testing::ExitedWithCode(1), "");
  EXPECT_EXIT(read_environment("magic"), testing::ExitedWithCode(2),
              "VOXGEMM_ALGORITHM is \"magic\": .*auto, explicit_gemm");
  EXPECT_EXIT(read_environment("reference_cpu"), testing::ExitedWithCode(2),
              "a kernel cannot be named here");
}

}  // namespace
}  // namespace voxgemm
