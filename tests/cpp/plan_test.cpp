// SPDX-License-Identifier: Apache-2.0
#include "voxgemm/plan.h"

#include <gtest/gtest.h>
#include <sys/mman.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <utility>

#include "support/brute_force.h"
#include "support/message_of.h"

namespace voxgemm::test {
namespace {

// A layer of 3 -> 5 channels from 7 voxels in a line to the 4 of stride 2, every operand in its own
// memory. A test changes one view and calls a pass, which must refuse it and write nothing.
class Arguments : public ::testing::Test {
 protected:
  Arguments()
      : layer(make_case(context(), "forward f32 conv2s2 3->5 line:7")),
        operands(make_operands(layer, Fill::integers)),
        x_buffer({7, 3}, Dtype::f32, operands.x),
        dy_buffer({4, 5}, Dtype::f32, operands.dy),
        w_buffer(weight_shape(layer), Dtype::f32, Layout::out_tap_in, operands.w),
        bias_buffer({1, 5}, Dtype::f32, operands.bias),
        y_buffer({4, 5}, Dtype::f32),
        dx_buffer({7, 3}, Dtype::f32),
        dw_buffer(weight_shape(layer), Dtype::f32, Layout::out_tap_in),
        x(x_buffer.ref()),
        dy(dy_buffer.ref()),
        y(y_buffer.ref()),
        dx(dx_buffer.ref()),
        bias(bias_buffer.ref()),
        w(w_buffer.ref()),
        dw(dw_buffer.ref()) {}

  std::string forward() {
    return untouched([&] { plan.forward(context(), x, w, {bias}, y); });
  }
  std::string grad_input() {
    return untouched([&] { plan.grad_input(context(), dy, w, dx); });
  }
  std::string grad_weight() {
    return untouched([&] { plan.grad_weight(context(), x, dy, dw); });
  }

  std::string untouched(const std::function<void()>& pass) {
    const auto bytes = [&] {
      return std::vector{x_buffer.elements().bytes(), dy_buffer.elements().bytes(),
                         w_buffer.elements().bytes(), bias_buffer.elements().bytes(),
                         y_buffer.elements().bytes(), dx_buffer.elements().bytes(),
                         dw_buffer.elements().bytes()};
    };
    const auto before = bytes();
    std::string message = message_of(pass);
    EXPECT_TRUE(before == bytes()) << "memory was written";
    return message;
  }

  Case layer;
  Operands operands;
  Buffer x_buffer, dy_buffer;
  Weights w_buffer;
  Buffer bias_buffer, y_buffer, dx_buffer;
  Weights dw_buffer;
  Plan plan = Plan::make(context(), layer.map, plan_options(layer.problem, {}));

  MatrixRef x, dy, y, dx, bias;
  WeightsRef w, dw;
};

constexpr Device gpu = {DeviceKind::cuda, 1};

TEST_F(Arguments, UnchangedAreTaken) {
  plan.forward(context(), x, w, {bias}, y);
  EXPECT_EQ(y_buffer.values(), brute_force(layer, operands));
}

TEST_F(Arguments, WrongRows) {
  x.rows = 6;
  EXPECT_EQ(forward(), "x is 6 x 3, expected 7 x 3");
  EXPECT_EQ(grad_weight(), "x is 6 x 3, expected 7 x 3");
  dy.rows = 5;
  EXPECT_EQ(grad_input(), "dy is 5 x 5, expected 4 x 5");
  x = x_buffer.ref();
  EXPECT_EQ(grad_weight(), "dy is 5 x 5, expected 4 x 5");
  y.rows = 7;
  EXPECT_EQ(forward(), "y is 7 x 5, expected 4 x 5");
  dy = dy_buffer.ref();
  dx.rows = 4;
  EXPECT_EQ(grad_input(), "dx is 4 x 3, expected 7 x 3");
}

TEST_F(Arguments, WrongChannels) {
  x.cols = 4;
  EXPECT_EQ(forward(), "x is 7 x 4, expected 7 x 3");
  x = x_buffer.ref();
  y.cols = 3;
  EXPECT_EQ(forward(), "y is 4 x 3, expected 4 x 5");
  y = y_buffer.ref();
  bias.cols = 4;
  EXPECT_EQ(forward(), "the bias is 1 x 4, expected 1 x 5");
  bias = bias_buffer.ref();
  w.c_in = 4;
  EXPECT_EQ(forward(), "the weights have 4 input channels, expected 3");
  EXPECT_EQ(grad_input(), "the weights have 4 input channels, expected 3");
  w = w_buffer.ref();
  w.c_out = 3;
  EXPECT_EQ(forward(), "the weights have 3 output channels, expected 5");
  dw.c_out = 6;
  EXPECT_EQ(grad_weight(), "the weights have 6 output channels, expected 5");
}

TEST_F(Arguments, WrongTaps) {
  w.taps = 27;
  EXPECT_EQ(forward(), "the weights have 27 taps, the kernel map has 8");
  EXPECT_EQ(grad_input(), "the weights have 27 taps, the kernel map has 8");
  dw.taps = 1;
  EXPECT_EQ(grad_weight(), "the weights have 1 taps, the kernel map has 8");
}

TEST_F(Arguments, WrongDtypes) {
  x.dtype = Dtype::f16;
  EXPECT_EQ(forward(), "x has dtype f16, expected f32");
  x = x_buffer.ref();
  y.dtype = Dtype::i32;
  EXPECT_EQ(forward(), "y has dtype i32, expected f32");
  y = y_buffer.ref();
  w.dtype = Dtype::f64;
  EXPECT_EQ(forward(), "the weights have dtype f64, expected f32");
  w = w_buffer.ref();
  bias.dtype = Dtype::bf16;
  EXPECT_EQ(forward(), "the bias has dtype bf16, expected f32");
  dy.dtype = Dtype::f64;
  EXPECT_EQ(grad_input(), "dy has dtype f64, expected f32");
  dy = dy_buffer.ref();
  dx.dtype = Dtype::f16;
  EXPECT_EQ(grad_input(), "dx has dtype f16, expected f32");
  dw.dtype = Dtype::f16;
  const std::string message = grad_weight();
  EXPECT_TRUE(message.starts_with("the weight gradient has dtype f16, expected f32")) << message;
}

TEST_F(Arguments, WrongDevices) {
  for (auto* matrix : {&x, &y, &bias}) {
    const MatrixRef before = *matrix;
    matrix->device = gpu;
    const std::string message = forward();
    EXPECT_TRUE(message.ends_with(" is on cuda:1, expected cpu")) << message;
    *matrix = before;
  }
  w.device = gpu;
  EXPECT_EQ(forward(), "the weights are on cuda:1, expected cpu");
  EXPECT_EQ(grad_input(), "the weights are on cuda:1, expected cpu");
  dw.device = gpu;
  EXPECT_EQ(grad_weight(), "the weights are on cuda:1, expected cpu");
  dx.device = gpu;
  w = w_buffer.ref();
  EXPECT_EQ(grad_input(), "dx is on cuda:1, expected cpu");
  dy.device = gpu;
  EXPECT_EQ(grad_input(), "dy is on cuda:1, expected cpu");
  EXPECT_EQ(grad_weight(), "dy is on cuda:1, expected cpu");
}

TEST_F(Arguments, RowsThatOverlapTheNext) {
  x.stride = 2;
  EXPECT_EQ(forward(), "x has rows 2 elements apart, expected at least 3");
  EXPECT_EQ(grad_weight(), "x has rows 2 elements apart, expected at least 3");
  x = x_buffer.ref();
  y.stride = 0;
  EXPECT_EQ(forward(), "y has rows 0 elements apart, expected at least 5");
  dy.stride = -5;
  EXPECT_EQ(grad_input(), "dy has rows -5 elements apart, expected at least 5");
}

TEST_F(Arguments, WithoutMemory) {
  x.data = nullptr;
  EXPECT_EQ(forward(), "x has no memory");
  x = x_buffer.ref();
  y.data = nullptr;
  EXPECT_EQ(forward(), "y has no memory");
  y = y_buffer.ref();
  bias.data = nullptr;
  EXPECT_EQ(forward(), "the bias has no memory");
  w.data = nullptr;
  EXPECT_EQ(forward(), "the weights have no memory");
  EXPECT_EQ(grad_input(), "the weights have no memory");
  dw.data = nullptr;
  EXPECT_EQ(grad_weight(), "the weights have no memory");
}

TEST_F(Arguments, Residual) {
  Buffer residual_buffer({4, 5}, Dtype::f32, operands.dy);
  MatrixRef residual = residual_buffer.ref();
  const auto added = [&] {
    return untouched([&] {
      plan.forward(context(), x, w, {.bias = bias, .residual = residual, .relu = true}, y);
    });
  };
  residual.rows = 3;
  EXPECT_EQ(added(), "the residual is 3 x 5, expected 4 x 5");
  residual = residual_buffer.ref();
  residual.dtype = Dtype::bf16;
  EXPECT_EQ(added(), "the residual has dtype bf16, expected f32");
  residual = y;
  EXPECT_EQ(added(), "y shares memory with the residual");
}

// Views into one memory, the output on the last element of the input; should the check fail, all is
// written inside this memory.
TEST_F(Arguments, OutputsOnInputs) {
  std::vector<float> memory(1000);
  float* const input = memory.data();
  const auto last = [](const MatrixRef& m) { return m.row<float>(m.rows - 1) + m.cols - 1; };
  x.data = input;
  y.data = last(x);
  EXPECT_EQ(forward(), "y shares memory with x");
  std::swap(x.data, y.data);
  x.data = last(y);
  EXPECT_EQ(forward(), "y shares memory with x");
  x = x_buffer.ref();
  bias.data = input;
  y.data = last(bias);
  EXPECT_EQ(forward(), "y shares memory with the bias");
  bias = bias_buffer.ref();
  w.data = input;
  y.data = input + weight_shape(layer).size() - 1;
  EXPECT_EQ(forward(), "y shares memory with the weights");
  dx.data = y.data;
  EXPECT_EQ(grad_input(), "dx shares memory with the weights");
  w = w_buffer.ref();
  dy.data = input;
  dx.data = last(dy);
  EXPECT_EQ(grad_input(), "dx shares memory with dy");
  dw.data = last(dy);
  EXPECT_EQ(grad_weight(), "the weight gradient shares memory with dy");
  dy = dy_buffer.ref();
  x.data = input;
  dw.data = last(x);
  EXPECT_EQ(grad_weight(), "the weight gradient shares memory with x");
}

// An output may follow its input at once.
TEST_F(Arguments, OutputsBehindInputs) {
  std::vector<float> memory(1000);
  x.data = memory.data();
  y.data = x.row<float>(7);
  for (size_t i = 0; i < operands.x.size(); ++i) memory[i] = static_cast<float>(operands.x[i]);
  plan.forward(context(), x, w, {bias}, y);
  const std::vector<double> expected = brute_force(layer, operands);
  for (size_t i = 0; i < expected.size(); ++i) ASSERT_EQ(y.as<float>()[i], expected[i]);
}

// Two column slices of one matrix, as a concatenation has them, share no element.
TEST(Plan, OutputsBesideInputs) {
  const Case c = make_case(context(), "forward f32 subm3 3->5 line:7");
  const Operands operands = make_operands(c, Fill::integers);
  const Buffer whole({7, 8}, Dtype::f32);
  MatrixRef x = whole.ref();
  x.cols = 3;
  MatrixRef y = whole.ref();
  y.cols = 5;
  y.data = x.row<float>(0) + 3;
  for (int64_t i = 0; i < x.rows * x.cols; ++i)
    x.row<float>(i / 3)[i % 3] = static_cast<float>(operands.x[i]);
  const Weights w(weight_shape(c), Dtype::f32, Layout::out_tap_in, operands.w);
  const Buffer bias({1, 5}, Dtype::f32, operands.bias);
  Plan plan = Plan::make(context(), c.map, plan_options(c.problem, {}));
  plan.forward(context(), x, w.ref(), {bias.ref()}, y);
  const std::vector<double> expected = brute_force(c, operands);
  for (int64_t i = 0; i < y.rows * y.cols; ++i) ASSERT_EQ(y.row<float>(i / 5)[i % 5], expected[i]);
  y.data = x.row<float>(0) + 2;
  EXPECT_EQ(message_of([&] { plan.forward(context(), x, w.ref(), {bias.ref()}, y); }),
            "y shares memory with x");
}

TEST(PlanMake, ChecksItsOptions) {
  const Case c = make_case(context(), "forward f32 subm3 3->5 line:7");
  const auto message = [&](const PlanOptions& options) {
    return message_of([&] { Plan::make(context(), c.map, options); });
  };
  EXPECT_EQ(message({.c_in = 0, .c_out = 5}), "c_in is 0, expected at least 1");
  EXPECT_EQ(message({.c_in = 3, .c_out = -1}), "c_out is -1, expected at least 1");
  EXPECT_EQ(message({.c_in = 3, .c_out = 5, .dtype = Dtype::i32}),
            "dtype is i32, expected f16, bf16, f32 or f64");
  KernelMap wrong = c.map;
  wrong.neighbours.rows = 26;
  EXPECT_EQ(message_of([&] { Plan::make(context(), wrong, {.c_in = 3, .c_out = 5}); }),
            "the map's neighbour table is 26 x 7 i32, expected 27 x 7 i32");
  wrong = c.map;
  wrong.n_out = 8;
  EXPECT_EQ(message_of([&] { Plan::make(context(), wrong, {.c_in = 3, .c_out = 5}); }),
            "the map's neighbour table is 27 x 7 i32, expected 27 x 8 i32");
}

TEST(PlanMake, ChecksTheTransposedMap) {
  const Case c = make_case(context(), "grad_input f32 conv2s2 3->5 line:7");
  const KernelMap smaller = transpose(context(), make_case(context(),
                                                           "grad_input f32 conv2s2 3->5 "
                                                           "line:3")
                                                     .map);
  PlanOptions options = plan_options(c.problem, {});
  options.transposed = &smaller;
  EXPECT_EQ(message_of([&] { Plan::make(context(), c.map, options); }),
            "the transposed map has 2 -> 3 rows and 8 taps, expected 4 -> 7 rows and 8 taps");
}

TEST(PlanMake, ImpossibleFilterIsRefusedBeforeAnythingIsWritten) {
  const Case c = make_case(context(), "forward f32 subm3 3->5 line:7");
  const Operands operands = make_operands(c, Fill::integers);
  const std::string of_f16 = "explicit_gemm_cpu/f16/portable";
  for (const Pass pass : passes) {
    for (const std::string& kernel : {std::string("no_such_kernel"), of_f16}) {
      try {
        run(context(), c.with(pass, Dtype::f32), kernel, operands);
        FAIL();
      } catch (const Error& error) {
        const bool known = kernel == of_f16;
        EXPECT_EQ(error.code(), known ? ErrorCode::unsupported : ErrorCode::invalid_argument);
        EXPECT_NE(std::string(error.what()).find(kernel), std::string::npos) << error.what();
      }
    }
  }
}

TEST(PlanKernel, IsTheChosenOne) {
  const Case c = make_case(context(), "forward f16 conv3s2p1 16->33 random:129:8");
  Plan plan =
      Plan::make(context(), c.map,
                 {.c_in = 16,
                  .c_out = 33,
                  .dtype = Dtype::f16,
                  .operation = Operation::strided,
                  .filters = {Filter{.algorithms = {Algorithm::explicit_gemm}, .kernel = ""},
                              Filter{.algorithms = {}, .kernel = "reference_cpu"}, Filter{}}});
  EXPECT_EQ(plan.kernel(context(), Pass::forward).algorithm, Algorithm::explicit_gemm);
  EXPECT_EQ(plan.kernel(context(), Pass::grad_input).name, "reference_cpu");
  const Problem problem = plan.problem(context(), Pass::grad_weight);
  EXPECT_EQ(&plan.kernel(context(), Pass::grad_weight), &choose(problem, {}));
  EXPECT_EQ(problem.text(), "grad_weight f16 conv3s2p1 16->33");
  EXPECT_EQ(problem.n_in, c.map.n_in);
  EXPECT_EQ(problem.n_out, c.map.n_out);
  EXPECT_EQ(problem.pairs, c.map.pairs(context()));
  EXPECT_EQ(problem.threads, context().threads);
  // The backward convolution's sides are exchanged.
  EXPECT_EQ(plan.problem(context(), Pass::grad_input).n_in, c.map.n_out);
  EXPECT_EQ(plan.problem(context(), Pass::grad_input).n_out, c.map.n_in);
}

// Maps that have rows on one side only: outputs are the bias, gradients are zero.
TEST(Plan, RowsOnOneSideOnly) {
  const Geometry geometry{.size = {2, 2, 2}, .stride = {2, 2, 2}};
  const Voxels line = cloud("line:7");
  for (const bool rows_in : {false, true}) {
    Case c{.problem = Problem::parse("forward f32 conv2s2 3->5"),
           .in = rows_in ? line : Voxels{},
           .out = rows_in ? Voxels{} : line,
           .map = {}};
    c.map = build_kernel_map(context(), coords_matrix(context(), c.in),
                             coords_matrix(context(), c.out), geometry);
    for (const Dtype dtype : {Dtype::f16, Dtype::f32, Dtype::f64}) {
      for (const Pass pass : passes) {
        const Case with = c.with(pass, dtype);
        const Operands operands = make_operands(with, Fill::integers);
        EXPECT_TRUE(
            same_bits(run(context(), with, Filter{}, operands), brute_force(with, operands)))
            << with.problem.text();
      }
    }
  }
}

// Matrices without rows need no memory, and the one result that is left is zero.
TEST(Plan, NoRowsAtAll) {
  const Case c = make_case(context(), "grad_weight f32 subm3 3->5 empty");
  Plan plan = Plan::make(context(), c.map, plan_options(c.problem, {}));
  const Weights w(weight_shape(c), Dtype::f32, Layout::slice,
                  std::vector<double>(weight_shape(c).size(), 1));
  const Weights dw(weight_shape(c), Dtype::f32, Layout::slice);
  const MatrixRef x{.rows = 0, .cols = 3, .stride = 3};
  const MatrixRef y{.rows = 0, .cols = 5, .stride = 5};
  plan.forward(context(), x, w.ref(), {}, y);
  plan.grad_input(context(), y, w.ref(), x);
  plan.grad_weight(context(), x, y, dw.ref());
  EXPECT_EQ(dw.values(), std::vector<double>(weight_shape(c).size(), 0));
  EXPECT_EQ(dw.elements().written(), weight_shape(c).size());
}

TEST(Plan, BiasIsOptional) {
  for (const Kernel& kernel : registry(DeviceKind::cpu)) {
    for (const Dtype dtype : {Dtype::f32, Dtype::f16, Dtype::bf16}) {
      const Case c =
          make_case(context(), problem_text(Pass::forward, dtype, "subm3 6->17 line:33"));
      if (!can_run(context(), c, kernel)) continue;
      Operands operands = make_operands(c, Fill::integers);
      operands.bias.assign(17, 0.0);
      Plan plan = Plan::make(context(), c.map,
                             plan_options(c.problem, {.algorithms = {}, .kernel = kernel.name}));
      const Buffer x({33, 6}, dtype, operands.x);
      const Weights w(weight_shape(c), dtype, Layout::tap_in_out, operands.w);
      const Buffer y({33, 17}, dtype);
      plan.forward(context(), x.ref(), w.ref(), {}, y.ref());
      EXPECT_TRUE(
          within_bound(y.values(), judge(context(), c, operands), {accumulator(kernel), dtype}))
          << kernel.name;
    }
  }
}

TEST(Plan, TakesTheTransposedMapOfTheCaller) {
  const Case c = make_case(context(), "grad_input f32 conv3s2p1 16->33 random:129:8");
  const Operands operands = make_operands(c, Fill::reals);
  const KernelMap transposed = transpose(context(), c.map);
  PlanOptions options = plan_options(c.problem, {});
  options.transposed = &transposed;
  Plan plan = Plan::make(context(), c.map, options);
  const Buffer dy({c.map.n_out, 33}, Dtype::f32, operands.dy);
  const Weights w(weight_shape(c), Dtype::f32, Layout::out_tap_in, operands.w);
  const Buffer dx({c.map.n_in, 16}, Dtype::f32);
  plan.grad_input(context(), dy.ref(), w.ref(), dx.ref());
  EXPECT_TRUE(same_bits(dx.values(), run(context(), c, Filter{}, operands)));
}

// A plan computes again with other operands, in any order of passes, also after it was moved.
TEST(Plan, IsUsedAgain) {
  const Case c = make_case(context(), "forward f32 subm3 6->6 shell:6");
  Plan first = Plan::make(context(), c.map, plan_options(c.problem, {}));
  const auto use = [&](Plan* plan, const char* other_operands) {
    Case named = c;
    named.problem.cloud = other_operands;
    const Operands operands = make_operands(named, Fill::integers);
    const Buffer x({c.map.n_in, 6}, Dtype::f32, operands.x);
    const Weights w(weight_shape(c), Dtype::f32, Layout::out_tap_in, operands.w);
    const Buffer bias({1, 6}, Dtype::f32, operands.bias);
    const Buffer y({c.map.n_out, 6}, Dtype::f32);
    const Buffer dx({c.map.n_in, 6}, Dtype::f32);
    plan->grad_input(context(), x.ref(), w.ref(), dx.ref());
    plan->forward(context(), x.ref(), w.ref(), {bias.ref()}, y.ref());
    EXPECT_EQ(y.values(), brute_force(c, operands));
  };
  use(&first, "one");
  use(&first, "two");
  Plan moved = std::move(first);
  use(&moved, "three");
}

// Three rows 2^31 elements and more apart, in address space that is never filled: offsets need 64
// bits.
TEST(Plan, RowsFarApart) {
  constexpr int64_t stride = (int64_t{1} << 31) + 7;
  const Case c = make_case(context(), "forward f16 subm3 6->17 line:3");
  Operands operands = make_operands(c, Fill::integers);
  const size_t bytes = 3 * stride * sizeof(Half);
  const auto reserve = [&] {
    return mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                -1, 0);
  };
  void* const memory[] = {reserve(), reserve()};
  if (memory[0] == MAP_FAILED || memory[1] == MAP_FAILED) {
    GTEST_SKIP() << "no address space for 2 x " << bytes << " bytes";
  }
  const MatrixRef x{.data = memory[0], .rows = 3, .cols = 6, .stride = stride, .dtype = Dtype::f16};
  const MatrixRef y{
      .data = memory[1], .rows = 3, .cols = 17, .stride = stride, .dtype = Dtype::f16};
  for (int64_t i = 0; i < 18; ++i) store(operands.x[i], x.row<Half>(i / 6)[i % 6]);
  const Weights w(weight_shape(c), Dtype::f16, Layout::out_tap_in, operands.w);
  const Buffer bias({1, 17}, Dtype::f16, operands.bias);
  const std::vector<double> expected = brute_force(c, operands);
  // y is the dy of the weight gradient; up to 2048 f16 holds all integers.
  operands.dy = expected;
  const std::vector<double> expected_dw =
      brute_force(c.with(Pass::grad_weight, Dtype::f16), operands);
  for (const Kernel& kernel : registry(DeviceKind::cpu)) {
    if (!can_run(context(), c, kernel)) continue;
    Plan plan = Plan::make(context(), c.map,
                           plan_options(c.problem, {.algorithms = {}, .kernel = kernel.name}));
    for (int64_t r = 0; r < 3; ++r) std::memset(y.row<Half>(r), 0xff, 17 * sizeof(Half));
    plan.forward(context(), x, w.ref(), {bias.ref()}, y);
    for (int64_t i = 0; i < y.rows * y.cols; ++i) {
      ASSERT_EQ(to_float(y.row<Half>(i / 17)[i % 17]), expected[i]) << kernel.name;
    }
    const Weights dw(weight_shape(c), Dtype::f16, Layout::out_tap_in);
    plan.grad_weight(context(), x, y, dw.ref());
    EXPECT_EQ(dw.values(), expected_dw) << kernel.name;
  }
  for (void* part : memory) munmap(part, bytes);
}

TEST(GradBias, SumsRowsInDoubleAndRoundsOnce) {
  for (const int64_t rows : {0, 1, 31, 5000}) {
    for (const Dtype dtype : {Dtype::f16, Dtype::bf16, Dtype::f32, Dtype::f64}) {
      for (const Dtype result : {Dtype::f16, Dtype::f32, Dtype::f64}) {
        Random random(rows);
        const std::vector<double> values = draw(rows * 7, Fill::reals, dtype, &random);
        Sums sums{.values = std::vector<double>(7),
                  .magnitudes = std::vector<double>(7),
                  .terms = {static_cast<double>(rows)}};
        for (int64_t i = 0; i < rows * 7; ++i) {
          sums.values[i % 7] += values[i];
          sums.magnitudes[i % 7] += std::fabs(values[i]);
        }
        const Buffer dy({rows, 7, 2}, dtype, values);
        const Buffer db({1, 7}, result);
        grad_bias(Context::cpu(1), dy.ref(), db.ref());
        EXPECT_TRUE(within_bound(db.values(), sums, {Dtype::f64, result}));
        for (const int threads : {2, 7}) {
          const Buffer again({1, 7}, result);
          grad_bias(Context::cpu(threads), dy.ref(), again.ref());
          EXPECT_TRUE(same_bits(again.values(), db.values())) << threads << " threads";
        }
      }
    }
  }
}

TEST(GradBias, ChecksItsArguments) {
  const Buffer dy({3, 7}, Dtype::f32, std::vector<double>(21, 1));
  const Buffer db({1, 7}, Dtype::f32);
  const auto message = [&](const MatrixRef& from, const MatrixRef& to) {
    std::string text = message_of([&] { grad_bias(context(), from, to); });
    EXPECT_EQ(db.elements().written(), 0);
    return text;
  };
  MatrixRef wrong = db.ref();
  wrong.cols = 6;
  EXPECT_EQ(message(dy.ref(), wrong), "db is 1 x 6, expected 1 x 7");
  wrong = db.ref();
  wrong.dtype = Dtype::i32;
  EXPECT_EQ(message(dy.ref(), wrong), "db has dtype i32, expected f16, bf16, f32 or f64");
  wrong = dy.ref();
  wrong.dtype = Dtype::i64;
  EXPECT_EQ(message(wrong, db.ref()), "dy has dtype i64, expected f16, bf16, f32 or f64");
  wrong = dy.ref();
  wrong.device = gpu;
  EXPECT_EQ(message(wrong, db.ref()), "dy is on cuda:1, expected cpu");
  wrong = dy.ref();
  wrong.data = nullptr;
  EXPECT_EQ(message(wrong, db.ref()), "dy has no memory");
  wrong = dy.ref();
  wrong.stride = 6;
  EXPECT_EQ(message(wrong, db.ref()), "dy has rows 6 elements apart, expected at least 7");
}

// Counts what a context gives out and gets back, beside the plan.
struct Ledger {
  explicit Ledger(Context from) : ctx(std::move(from)) {
    ctx.allocate = [this, allocate = ctx.allocate](size_t bytes) {
      std::shared_ptr<void> memory = allocate(bytes);
      const auto size = static_cast<int64_t>(bytes);
      most = std::max(most, held += size);
      void* const place = memory.get();
      return std::shared_ptr<void>(place, [this, size, memory](void*) { held -= size; });
    };
  }
  Ledger(const Ledger&) = delete;
  Ledger& operator=(const Ledger&) = delete;

  Context ctx;
  int64_t held = 0;
  int64_t most = 0;
};

TEST_F(Arguments, APlanKnowsItsWorkspace) {
  Ledger ledger(context());
  Plan own = Plan::make(ledger.ctx, layer.map, plan_options(layer.problem, {}));  // freed first
  EXPECT_EQ(own.workspace_bytes(Pass::forward), 0);
  const auto expect_counted = [&](Pass pass, const std::function<void()>& run) {
    run();  // makes the schedule and the transposed map, which stay
    const int64_t kept = ledger.held;
    ledger.most = kept;
    run();
    EXPECT_EQ(ledger.held, kept);
    EXPECT_EQ(own.workspace_bytes(pass), ledger.most - kept);
    EXPECT_GT(own.workspace_bytes(pass), 0);
  };
  expect_counted(Pass::forward, [&] { own.forward(ledger.ctx, x, w, {bias}, y); });
  expect_counted(Pass::grad_input, [&] { own.grad_input(ledger.ctx, dy, w, dx); });
  expect_counted(Pass::grad_weight, [&] { own.grad_weight(ledger.ctx, x, dy, dw); });
}

}  // namespace
}  // namespace voxgemm::test
