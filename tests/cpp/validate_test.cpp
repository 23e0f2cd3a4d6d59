// SPDX-License-Identifier: Apache-2.0
#include "conv/validate.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <numeric>
#include <utility>
#include <vector>

#include "support/message_of.h"
#include "voxgemm/depthwise.h"
#include "voxgemm/error.h"
#include "voxgemm/hash_table.h"
#include "voxgemm/pooling.h"
#include "voxgemm/sampling.h"
#include "voxgemm/serialize.h"
#include "voxgemm/tune.h"

namespace voxgemm::test {
namespace {

const Context& context() {
  static const Context ctx = Context::cpu(2);
  return ctx;
}

// The 3^3 submanifold map of a line of voxels.
KernelMap line_map(int32_t voxels) {
  const Matrix coords = make_matrix(context(), voxels, 4, Dtype::i32);
  for (int32_t row = 0; row < voxels; ++row) {
    std::copy_n(std::array{0, row, 0, 0}.begin(), 4, coords.row<int32_t>(row));
  }
  return build_submanifold_map(context(), coords, Geometry::submanifold({3, 3, 3}));
}

Matrix counted(int64_t rows, int64_t cols, Dtype dtype = Dtype::f32) {
  Matrix matrix = make_matrix(context(), rows, cols, dtype);
  if (dtype == Dtype::f32) {
    std::iota(matrix.as<float>(), matrix.as<float>() + rows * cols, 1.0F);
  } else {
    std::fill_n(matrix.as<char>(), rows * cols * size_of(dtype), 0);
  }
  return matrix;
}

// The first elements of a matrix as another one.
MatrixRef on(const MatrixRef& memory, int64_t rows, int64_t cols, Dtype dtype = Dtype::f32) {
  return {memory.data, rows, cols, cols, dtype, memory.device};
}

// [taps, c, c] of a matrix, contiguous.
WeightsRef weights_of(const MatrixRef& matrix, int taps, int channels) {
  return {.data = matrix.data,
          .taps = taps,
          .c_in = channels,
          .c_out = channels,
          .tap_stride = int64_t{channels} * channels,
          .in_stride = channels,
          .out_stride = 1};
}

TEST(Apart, TheStrideOfASingleRowIsNothing) {
  const KernelMap map = line_map(1);
  Plan plan = Plan::make(context(), map, {.c_in = 4, .c_out = 4});
  const Matrix x = counted(1, 4);
  const Matrix y = counted(1, 4);
  const Matrix w = counted(108, 4);
  plan.forward(context(), x, weights_of(w, 27, 4), {}, y);
  const std::vector<float> expected(y.as<float>(), y.as<float>() + 4);
  for (const int64_t stride : {int64_t{0}, int64_t{1} << 60}) {
    MatrixRef in = x;
    MatrixRef out = y;
    in.stride = out.stride = stride;
    std::fill_n(y.as<float>(), 4, -1.0F);
    plan.forward(context(), in, weights_of(w, 27, 4), {}, out);
    EXPECT_TRUE(std::equal(expected.begin(), expected.end(), y.as<float>()));
    EXPECT_EQ(message_of([&] { plan.forward(context(), in, weights_of(w, 27, 4), {}, in); }),
              "y shares memory with x");
  }
}

TEST(Apart, WeightsThatRunBackwards) {
  const KernelMap map = line_map(5);
  Plan plan = Plan::make(context(), map, {.c_in = 4, .c_out = 4});
  const Matrix x = counted(5, 4);
  const Matrix y = counted(5, 4);
  const Matrix w = counted(108, 4);
  const Matrix mirrored = counted(108, 4);
  for (int64_t tap = 0; tap < 27; ++tap) {
    std::copy_n(w.row<float>(4 * tap), 16, mirrored.row<float>(4 * (26 - tap)));
  }
  plan.forward(context(), x, weights_of(mirrored, 27, 4), {}, y);
  const std::vector<float> expected(y.as<float>(), y.as<float>() + 20);
  WeightsRef backwards = weights_of(w, 27, 4);
  backwards.data = w.row<float>(104);
  backwards.tap_stride = -16;
  plan.forward(context(), x, backwards, {}, y);
  EXPECT_TRUE(std::equal(expected.begin(), expected.end(), y.as<float>()));
  EXPECT_EQ(message_of([&] { plan.forward(context(), x, backwards, {}, on(w, 5, 4)); }),
            "y shares memory with the weights");
}

TEST(PlanMake, ChecksTheSchedulesOfTheCaller) {
  const KernelMap map = line_map(5);
  const Schedule foreign = Schedule::build(context(), line_map(300), {});
  PlanOptions options{.c_in = 4, .c_out = 4};
  options.schedules[0] = &foreign;
  EXPECT_EQ(message_of([&] { Plan::make(context(), map, options); }),
            "the schedule of forward is of 300 rows and 27 taps, expected 5 and 27");
  options.schedules = {};
  options.build_schedule = nullptr;
  EXPECT_EQ(message_of([&] { Plan::make(context(), map, options); }),
            "build_schedule is empty, expected Schedule::build or another function");
}

TEST(Context, NeedsThreadsAndMemory) {
  Context ctx;
  EXPECT_EQ(message_of([&] { make_matrix(ctx, 1, 1, Dtype::f32); }),
            "the context has no allocate, expected one as of Context::cpu()");
  ctx.threads = 2;
  EXPECT_EQ(message_of([&] { parallel_for(ctx, 2, [](int64_t, int) {}); }),
            "the context has no run, expected one as of Context::cpu()");
}

TEST(KernelMap, WithoutTablesHasNoPairs) {
  EXPECT_EQ(message_of([] { KernelMap{}.pairs(context()); }),
            "the map counts pairs of 0 taps, expected 27");
}

TEST(Geometry, OutShapeOfAnImpossibleOne) {
  EXPECT_EQ(message_of([] {
              Geometry{.stride = {0, 1, 1}}.out_shape({5, 5, 5});
            }),
            "stride is 0 on axis 0, expected 1 or more");
}

TEST(GradBias, RefusesNegativeRowsAndItsInput) {
  const Matrix dy = counted(3, 4);
  EXPECT_EQ(message_of([&] { grad_bias(context(), on(dy, -1, 4), counted(1, 4)); }),
            "dy is -1 x 4, expected 0 or more of each");
  EXPECT_EQ(message_of([&] { grad_bias(context(), dy, on(dy, 1, 4)); }),
            "db shares memory with dy");
}

TEST(Operators, OutputsOnInputs) {
  const Context& ctx = context();
  const KernelMap map = line_map(5);
  const Matrix x = counted(5, 4);
  const Matrix y = counted(5, 4);
  const Matrix w = counted(27, 4);
  const Matrix winners = counted(5, 4, Dtype::i32);
  const auto bias = on(y, 1, 4);
  const auto expect = [&](const char* expected, const std::function<void()>& body) {
    EXPECT_EQ(message_of(body), expected);
  };
  expect("y shares memory with the weights", [&] {
    depthwise_forward(ctx, map, {x, w}, on(w, 5, 4));
  });
  expect("y shares memory with the bias", [&] { depthwise_forward(ctx, map, {x, w, bias}, y); });
  expect("dx shares memory with the weights", [&] {
    depthwise_grad_input(ctx, map, {y, w}, on(w, 5, 4));
  });
  const MatrixRef on_x = on(x, 5, 4, Dtype::i32);
  const MatrixRef on_y = on(y, 5, 4, Dtype::i32);
  expect("winners shares memory with x", [&] { pool(ctx, map, x, Reduction::max, {y, on_x}); });
  expect("winners shares memory with y", [&] { pool(ctx, map, x, Reduction::max, {y, on_y}); });
  expect("dx shares memory with winners", [&] {
    pool_grad(ctx, map, Reduction::max, {y, on_x}, x);
  });
  const MatrixRef segments = on(winners, 5, 1, Dtype::i32);
  expect("y shares memory with segments",
         [&] { segment_reduce(ctx, x, segments, Reduction::sum, {on(winners, 5, 4)}); });
  expect("winners shares memory with segments", [&] {
    segment_reduce(ctx, x, segments, Reduction::max, {y, winners});
  });
  const RowWeights sums{winners, w};
  const RowWeights five{winners, on(w, 5, 4)};
  expect("weights is 27 x 4, expected 5 x 4", [&] { weighted_sum(ctx, x, sums, y); });
  expect("y shares memory with weights", [&] { weighted_sum(ctx, x, five, on(w, 5, 4)); });
  expect("dx shares memory with rows",
         [&] { weighted_sum_grad_input(ctx, y, five, on(winners, 5, 4)); });
  expect("weights shares memory with x",
         [&] { weighted_sum_grad_weights(ctx, five.weights, y, five); });
  const Matrix keys = counted(8, 1, Dtype::i64);
  const Matrix values = counted(8, 1, Dtype::i64);
  const Matrix asked = counted(8, 1, Dtype::i64);
  expect("values shares memory with table_keys", [&] {
    hash_lookup(ctx, {keys, values}, asked, keys);
  });
}

TEST(DepthwiseGradWeight, NamesTheDtypesThatItTakes) {
  const KernelMap map = line_map(5);
  const Matrix x = counted(5, 4);
  const Matrix dw = counted(27, 4, Dtype::f64);
  EXPECT_EQ(message_of([&] { depthwise_grad_weight(context(), map, x, x, dw); }),
            "the weight gradient has dtype f64, expected f32");
}

// What a caller may cast to an enumeration, and how its refusal ends.
struct BadNumber {
  int number;
  std::string text;
  explicit BadNumber(int value)
      : number(value), text(join("is number ", value, ", expected 0 to ")) {}
  template <class Enum>
  Enum as() const {
    return static_cast<Enum>(number);
  }
  void expect(const std::string& what, int last, const std::function<void()>& body) const {
    EXPECT_EQ(message_of(body), join(what, " ", text, last));
  }
};
const BadNumber bad_numbers[] = {BadNumber(9), BadNumber(-1), BadNumber(1 << 30)};

TEST(Enumerators, OfOperators) {
  const Context& ctx = context();
  const KernelMap map = line_map(5);
  const Matrix x = counted(5, 4);
  const Matrix y = counted(5, 4);
  const Matrix segments = counted(5, 1, Dtype::i32);
  const Matrix coords = counted(5, 4, Dtype::i32);
  const Matrix codes = counted(5, 1, Dtype::i64);
  const VoxelIndex index(ctx, coords);
  const Matrix places = counted(5, 3);
  const PointsRef points{.points = places, .batch = {}};
  for (const BadNumber& bad : bad_numbers) {
    const auto reduction = bad.as<Reduction>();
    bad.expect("the reduction", 3, [&] { pool(ctx, map, x, reduction, {y}); });
    bad.expect("the reduction", 3, [&] { pool_grad(ctx, map, reduction, {y}, x); });
    bad.expect("the reduction", 3, [&] { segment_reduce(ctx, x, segments, reduction, {y}); });
    const CurveOptions curve{.curve = bad.as<Curve>()};
    bad.expect("the curve", 2, [&] { curve_encode(ctx, coords, curve, codes); });
    bad.expect("the curve", 2, [&] { curve_decode(ctx, codes, curve, coords); });
    bad.expect("the mode of sampling", 1,
               [&] { sample_map(ctx, index, points, {.mode = bad.as<SampleMode>()}); });
    bad.expect("the rounding of sampling", 1,
               [&] { sample_map(ctx, index, points, {.rounding = bad.as<Rounding>()}); });
    bad.expect("the output rule", 1,
               [&] { output_coords(ctx, coords, {}, {.rule = bad.as<OutputRule>()}); });
    bad.expect("the order of a schedule", 2,
               [&] { Schedule::build(ctx, map, {.order = bad.as<ScheduleOptions::Order>()}); });
  }
}

TEST(Enumerators, OfPlansAndChoices) {
  const Context& ctx = context();
  const KernelMap map = line_map(5);
  const PlanOptions options{.c_in = 4, .c_out = 4};
  Plan plan = Plan::make(ctx, map, options);
  for (const BadNumber& bad : bad_numbers) {
    const auto pass = bad.as<Pass>();
    bad.expect("the pass", 2, [&] { plan.problem(ctx, pass); });
    bad.expect("the pass", 2, [&] { plan.kernel(ctx, pass); });
    bad.expect("the pass", 2, [&] { plan.workspace_bytes(pass); });
    bad.expect("the pass", 2, [&] { tune(ctx, map, options, pass); });
    const auto expect_refused = [&](const std::string& what, int last, const auto& change) {
      Problem problem = plan.problem(ctx, Pass::forward);
      change(&problem);
      bad.expect(what, last, [&] { choice(problem, {}); });
      bad.expect(what, last, [&] { candidates(problem, {}); });
      bad.expect(what, last, [&] { explain(problem); });
      bad.expect(what, last, [&] { explain_json(problem); });
      bad.expect(what, last, [&] { is_tuned(problem, {}); });
    };
    expect_refused("the pass", 2, [&](Problem* p) { p->pass = pass; });
    expect_refused("the dtype", 5, [&](Problem* p) { p->dtype = bad.as<Dtype>(); });
    expect_refused("the precision", 3, [&](Problem* p) { p->precision = bad.as<Precision>(); });
    expect_refused("the operation", 2, [&](Problem* p) { p->operation = bad.as<Operation>(); });
    const auto kind = bad.as<DeviceKind>();
    expect_refused("the kind of device", 1, [&](Problem* p) { p->device.kind = kind; });
    bad.expect("the kind of device", 1, [&] { kernel_names(kind); });
    bad.expect("the kind of device", 1, [&] { learn_times({kind, 0}, ""); });

    const auto made = [&](const auto& change) {
      return [&, change] {
        PlanOptions changed = options;
        change(&changed);
        Plan::make(ctx, map, changed);
      };
    };
    bad.expect("the operation", 2, made([&](auto* o) { o->operation = bad.as<Operation>(); }));
    bad.expect("the precision", 3, made([&](auto* o) { o->precision = bad.as<Precision>(); }));
    EXPECT_EQ(message_of(made([&](auto* o) { o->dtype = bad.as<Dtype>(); })),
              join("dtype is number ", bad.number, ", expected f16, bf16, f32 or f64"));
    const Filter filter{.algorithms = {bad.as<Algorithm>()}};
    const std::string refusal =
        join("the filter names algorithm ", bad.number, ", expected 0 to 4");
    EXPECT_EQ(message_of(made([&](auto* o) { o->filters[1] = filter; })), refusal);
    EXPECT_EQ(message_of([&] { choice(plan.problem(ctx, Pass::forward), filter); }), refusal);
    EXPECT_EQ(message_of([&] { is_tuned(plan.problem(ctx, Pass::forward), filter); }), refusal);
  }
}

TEST(Enumerators, OfMatricesAndContexts) {
  const Context& ctx = context();
  const KernelMap map = line_map(5);
  const Matrix x = counted(5, 4);
  const Matrix y = counted(5, 4);
  const Matrix w = counted(27, 4);
  for (const BadNumber& bad : bad_numbers) {
    bad.expect("the dtype of a matrix", 5, [&] { make_matrix(ctx, 5, 4, bad.as<Dtype>()); });
    MatrixRef odd = x;
    odd.dtype = bad.as<Dtype>();
    const auto expect = [&](const char* what, const char* expected,
                            const std::function<void()>& body) {
      EXPECT_EQ(message_of(body),
                join(what, " has dtype number ", bad.number, ", expected ", expected));
    };
    const char* const floats = "f16, bf16, f32 or f64";
    expect("x", floats, [&] { pool(ctx, map, odd, Reduction::sum, {y}); });
    expect("dx", floats, [&] { pool_grad(ctx, map, Reduction::sum, {y}, odd); });
    expect("x", floats, [&] { depthwise_forward(ctx, map, {odd, w}, y); });
    expect("x", floats, [&] { weighted_sum(ctx, odd, {counted(5, 1, Dtype::i32), w}, y); });
    expect("dy", floats, [&] { grad_bias(ctx, odd, counted(1, 4)); });
    expect("db", floats, [&] { grad_bias(ctx, x, on(odd, 1, 4, odd.dtype)); });
    expect("y", "f32", [&] { pool(ctx, map, x, Reduction::sum, {odd}); });
    expect("codes", "i32 or i64", [&] { sort_codes(ctx, on(odd, 5, 1, odd.dtype)); });

    Context nowhere = ctx;
    nowhere.device.kind = bad.as<DeviceKind>();
    const char* const kind = "the context's kind of device";
    bad.expect(kind, 1, [&] { Plan::make(nowhere, map, {.c_in = 4, .c_out = 4}); });
    bad.expect(kind, 1, [&] { grad_bias(nowhere, x, counted(1, 4)); });
    bad.expect(kind, 1, [&] { unique(nowhere, counted(5, 4, Dtype::i32)); });
  }
}

}  // namespace
}  // namespace voxgemm::test
