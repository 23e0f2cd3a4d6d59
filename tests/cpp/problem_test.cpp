// SPDX-License-Identifier: Apache-2.0
#include "voxgemm/problem.h"

#include <gtest/gtest.h>

#include "support/message_of.h"
#include "support/problems.h"

namespace voxgemm::test {
namespace {

TEST(Problem, TextParsesBack) {
  for (const std::string& text : problem_list()) {
    EXPECT_EQ(Problem::parse(text).text(), text);
  }
}

TEST(Problem, ParseFillsEveryField) {
  const Problem p = Problem::parse("grad_input bf16 conv3x2x1s2x1x3p1x0x2d1x4x1 16->33 random:9:4");
  EXPECT_EQ(p.pass, Pass::grad_input);
  EXPECT_EQ(p.dtype, Dtype::bf16);
  EXPECT_EQ(p.operation, Operation::strided);
  EXPECT_EQ(
      p.geometry,
      (Geometry{
          .size = {3, 2, 1}, .stride = {2, 1, 3}, .padding = {1, 0, 2}, .dilation = {1, 4, 1}}));
  EXPECT_EQ(p.c_in, 16);
  EXPECT_EQ(p.c_out, 33);
  EXPECT_EQ(p.cloud, "random:9:4");
}

TEST(Problem, OperationsHaveTheirGeometry) {
  const auto parsed = [](const std::string& operation) {
    return Problem::parse("forward f64 " + operation + " 1->2 odd");
  };
  EXPECT_EQ(parsed("subm5d2").operation, Operation::submanifold);
  EXPECT_EQ(parsed("subm5d2").geometry, Geometry::submanifold({5, 5, 5}, {2, 2, 2}));
  EXPECT_EQ(parsed("subm4").geometry, Geometry::submanifold({4, 4, 4}));
  EXPECT_EQ(parsed("inv2s2").operation, Operation::inverse);
  EXPECT_EQ(parsed("inv2s2").geometry, (Geometry{.size = {2, 2, 2}, .stride = {2, 2, 2}}));
}

TEST(Problem, TextIsShortWhateverWasWritten) {
  const auto text = [](const std::string& long_text) { return Problem::parse(long_text).text(); };
  EXPECT_EQ(text("forward  f32 conv3x3x3s1p0d1   4->4 odd "), "forward f32 conv3 4->4 odd");
  EXPECT_EQ(text("forward f32 subm3s1p0 4->4 odd"), "forward f32 subm3 4->4 odd");
  EXPECT_EQ(text("forward f32 inv2d1p1s2 4->4"), "forward f32 inv2s2p1 4->4");
}

TEST(Problem, CloudMayBeAbsentAndIsNotRead) {
  EXPECT_EQ(Problem::parse("forward f32 subm3 1->1").cloud, "");
  EXPECT_EQ(Problem::parse("forward f32 subm3 1->1 file:/a/b.ply@0.05").cloud,
            "file:/a/b.ply@0.05");
}

TEST(Problem, UsefulFlopsCountPairs) {
  Problem p = Problem::parse("forward f32 subm3 1000->2000 odd");
  p.pairs = int64_t{3} << 32;
  EXPECT_EQ(p.useful_flops(), 2.0 * 1000 * 2000 * 3 * 4294967296.0);
}

std::string message(const std::string& text) {
  return message_of([&] { Problem::parse(text); });
}

struct Bad {
  const char* text;
  const char* word;
  const char* what;
};

class BadProblems : public ::testing::TestWithParam<Bad> {};

TEST_P(BadProblems, AreRefusedWithTheWordAndTheGrammar) {
  const std::string start = join("\"", GetParam().word, "\" is not ", GetParam().what,
                                 "; expected \"PASS DTYPE OPERATION");
  EXPECT_EQ(message(GetParam().text).substr(0, start.size()), start);
}

INSTANTIATE_TEST_SUITE_P(
    Texts,
    BadProblems,
    ::testing::Values(
        Bad{"", "", "a problem"},
        Bad{"forward f32 subm3", "forward f32 subm3", "a problem"},
        Bad{"forward f32 subm3 1->1 odd x", "forward f32 subm3 1->1 odd x", "a problem"},
        Bad{"backward f32 subm3 1->1 odd", "backward", "a pass"},
        Bad{"Forward f32 subm3 1->1 odd", "Forward", "a pass"},
        Bad{"forward f8 subm3 1->1 odd", "f8", "a dtype"},
        Bad{"forward i32 subm3 1->1 odd", "i32", "a dtype"},
        Bad{"forward f32 pool3 1->1 odd", "pool3", "an operation"},
        Bad{"forward f32 subm 1->1 odd", "subm", "an operation"},
        Bad{"forward f32 submx 1->1 odd", "submx", "an operation"},
        Bad{"forward f32 conv3q2 1->1 odd", "conv3q2", "an operation"},
        Bad{"forward f32 conv3s 1->1 odd", "conv3s", "an operation"},
        Bad{"forward f32 conv3s2x 1->1 odd", "conv3s2x", "an operation"},
        Bad{"forward f32 conv3x1 1->1 odd", "conv3x1", "an operation (one number or three)"},
        Bad{"forward f32 conv3x1x1x1 1->1 odd", "conv3x1x1x1", "an operation"},
        Bad{"forward f32 conv99999999999 1->1 odd", "conv99999999999", "an operation"},
        Bad{"forward f32 subm3s2 1->1 odd", "subm3s2",
            "a submanifold operation (its stride is 1, its padding follows from the size)"},
        Bad{"forward f32 subm3p1 1->1 odd", "subm3p1",
            "a submanifold operation (its stride is 1, its padding follows from the size)"},
        Bad{"forward f32 subm3 1 odd", "1", "C_IN->C_OUT"},
        Bad{"forward f32 subm3 1-1 odd", "1-1", "C_IN->C_OUT"},
        Bad{"forward f32 subm3 ->1 odd", "->1", "C_IN->C_OUT"},
        Bad{"forward f32 subm3 1-> odd", "1->", "C_IN->C_OUT"},
        Bad{"forward f32 subm3 0->1 odd", "0->1", "C_IN->C_OUT"},
        Bad{"forward f32 subm3 1->0 odd", "1->0", "C_IN->C_OUT"},
        Bad{"forward f32 subm3 1->-4 odd", "1->-4", "C_IN->C_OUT"},
        Bad{"forward f32 subm3 1->4k odd", "1->4k", "C_IN->C_OUT"},
        Bad{"forward f32 subm3 99999999999->4 odd", "99999999999->4", "C_IN->C_OUT"}),
    [](const auto& info) { return std::to_string(info.index); });

TEST(Problem, GeometriesAreChecked) {
  EXPECT_NE(message("forward f32 conv0 1->1 odd").find("kernel size is 0"), std::string::npos);
  EXPECT_NE(message("forward f32 conv3s0 1->1 odd").find("stride is 0"), std::string::npos);
  EXPECT_NE(message("forward f32 conv3p-1 1->1 odd").find("padding is -1"), std::string::npos);
  EXPECT_NE(message("forward f32 conv3d0 1->1 odd").find("dilation is 0"), std::string::npos);
  EXPECT_NE(message("forward f32 subm17 1->1 odd").find("more than 4096 taps"), std::string::npos);
}

TEST(Names, AreTheOnesInTexts) {
  EXPECT_EQ(name(Dtype::bf16), "bf16");
  EXPECT_EQ(name(Dtype::i64), "i64");
  EXPECT_EQ(name(Pass::grad_weight), "grad_weight");
  EXPECT_EQ(name(Algorithm::explicit_gemm), "explicit_gemm");
  EXPECT_EQ(name(Algorithm::implicit_gemm), "implicit_gemm");
  EXPECT_EQ(name(Algorithm::implicit_gemm_splitk), "implicit_gemm_splitk");
  EXPECT_EQ(name(Algorithm::masked_implicit_gemm), "masked_implicit_gemm");
  EXPECT_EQ(name(Algorithm::masked_implicit_gemm_splitk), "masked_implicit_gemm_splitk");
}

}  // namespace
}  // namespace voxgemm::test
