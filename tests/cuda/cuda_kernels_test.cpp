// SPDX-License-Identifier: Apache-2.0
// Every CUDA row of the registry on every problem of support/problems.h, against the CPU's
// reference; and what a backward pass needs beside a kernel.

#include <initializer_list>
#include <map>
#include <string>
#include <tuple>

#include "conv/coords.h"
#include "conv/passes.h"
#include "cuda/gpu.h"

namespace voxgemm::test {
namespace {

MatrixRef as_bytes(void* data, int64_t bytes, const Device& device) {
  // Every element has two bytes or more.
  return {.data = data,
          .rows = 1,
          .cols = bytes / 2,
          .stride = bytes / 2,
          .dtype = Dtype::f16,
          .device = device};
}

// The memory of host elements on the device, gaps and odd alignment included.
class Mirror {
 public:
  explicit Mirror(const Elements& elements, Dtype dtype)
      : host_(static_cast<char*>(elements.data()) - size_of(dtype)),
        bytes_(static_cast<int64_t>(elements.bytes().size())),
        memory_(gpu()->allocate(bytes_)),
        data_(static_cast<char*>(memory_.get()) + size_of(dtype)) {
    copy(*gpu(), as_bytes(host_, bytes_, {}), as_bytes(memory_.get(), bytes_, gpu()->device));
  }
  template <class Ref>
  Ref moved(Ref ref) const {
    ref.data = data_;
    ref.device = gpu()->device;
    return ref;
  }
  void fetch() const {
    copy(*gpu(), as_bytes(memory_.get(), bytes_, gpu()->device), as_bytes(host_, bytes_, {}));
  }

 private:
  char* host_;
  int64_t bytes_;
  std::shared_ptr<void> memory_;
  char* data_;
};

KernelMap on_device(const KernelMap& map) {
  KernelMap result = map;
  const Context& ctx = *gpu();
  result.neighbours = to_device(ctx, map.neighbours);
  result.pairs_per_tap = to_device(ctx, map.pairs_per_tap);
  const auto first = [&](const Matrix& of_side, int64_t rows) {
    const std::vector<int32_t> list = all_first_rows(ctx, of_side, rows);
    Matrix host = make_matrix(context(), rows, 1, Dtype::i32);
    std::copy(list.begin(), list.end(), host.as<int32_t>());
    return to_device(ctx, host);
  };
  result.in_first = first(map.in_first, map.n_in);
  result.out_first = first(map.out_first, map.n_out);
  return result;
}

// The problem as the device's rows of the registry see it.
Problem problem_on_device(const Case& c) {
  Problem p = c.problem;
  const bool backward = p.pass == Pass::grad_input;
  p.n_in = backward ? c.map.n_out : c.map.n_in;
  p.n_out = backward ? c.map.n_in : c.map.n_out;
  p.pairs = c.map.pairs(context());
  p.device = gpu()->device;
  p.architecture = cuda::architecture(p.device);
  return p;
}

// As run() of support/run.h, with a kernel of the device.
std::vector<double> run_on_device(const Case& c,
                                  const Kernel& kernel,
                                  const Operands& operands,
                                  const Memory& memory = {}) {
  const Context& ctx = *gpu();
  const Problem& p = c.problem;
  const Buffer x({c.map.n_in, p.c_in, memory.gap}, p.dtype, operands.x);
  const Buffer dy({c.map.n_out, p.c_out, memory.gap}, p.dtype, operands.dy);
  const Weights w(weight_shape(c), p.dtype, memory.layout, operands.w);
  const Buffer bias({1, p.c_out}, p.dtype, operands.bias);
  const Mirror x_mirror(x.elements(), p.dtype);
  const Mirror dy_mirror(dy.elements(), p.dtype);
  const Mirror w_mirror(w.elements(), p.dtype);
  const Mirror bias_mirror(bias.elements(), p.dtype);
  const bool has_residual = !operands.residual.empty();
  const Buffer residual({has_residual ? c.map.n_out : 0, p.c_out, memory.gap}, p.dtype,
                        operands.residual);
  const Mirror residual_mirror(residual.elements(), p.dtype);
  const KernelMap map = on_device(c.map);
  const Problem problem = problem_on_device(c);
  std::vector<double> result;
  const auto take = [&](const auto& matrix, const Mirror& mirror) {
    mirror.fetch();
    result = matrix.values();
    EXPECT_EQ(matrix.elements().written(), static_cast<int64_t>(result.size()))
        << "elements written";
  };
  if (p.pass == Pass::forward) {
    const Buffer y({c.map.n_out, p.c_out, memory.gap}, p.dtype);
    const Mirror mirror(y.elements(), p.dtype);
    const Schedule schedule = device_schedule(ctx, c.map, map, kernel.schedule(kernel, problem));
    kernel.launch(kernel, ctx, p.pass,
                  {.schedule = &schedule,
                   .map = &map,
                   .x = x_mirror.moved(x.ref()),
                   .w = w_mirror.moved(w.ref()),
                   .bias = bias_mirror.moved(bias.ref()).data,
                   .residual = has_residual ? residual_mirror.moved(residual.ref()) : MatrixRef{},
                   .relu = has_residual,
                   .y = mirror.moved(y.ref())});
    take(y, mirror);
  } else if (p.pass == Pass::grad_input) {
    const Buffer dx({c.map.n_in, p.c_in, memory.gap}, p.dtype);
    const Mirror mirror(dx.elements(), p.dtype);
    const KernelMap backward = map.symmetric ? map : transpose(ctx, map);
    const MatrixRef upstream = dy_mirror.moved(dy.ref());
    const bool repeats = !c.map.out_first.empty();
    Matrix merged;
    if (repeats) merged = cuda::merge_repeated(ctx, upstream, map.out_first);
    const KernelMap host = map.symmetric ? c.map : transpose(context(), c.map);
    const Schedule schedule =
        device_schedule(ctx, host, backward, kernel.schedule(kernel, problem));
    kernel.launch(kernel, ctx, p.pass,
                  {.schedule = &schedule,
                   .map = &backward,
                   .x = repeats ? static_cast<const MatrixRef&>(merged) : upstream,
                   .w = seen_transposed(w_mirror.moved(w.ref())),
                   .y = mirror.moved(dx.ref()),
                   .mirror_taps = map.symmetric});
    cuda::zero_repeated(ctx, mirror.moved(dx.ref()), map.in_first);
    take(dx, mirror);
  } else {
    const Dtype dtype = memory.gradient.value_or(p.dtype);
    const Weights dw(weight_shape(c), dtype, memory.layout);
    const Mirror mirror(dw.elements(), dtype);
    const Schedule schedule = device_schedule(ctx, c.map, map, kernel.schedule(kernel, problem));
    kernel.launch(kernel, ctx, p.pass,
                  {.schedule = &schedule,
                   .map = &map,
                   .x = x_mirror.moved(x.ref()),
                   .w = mirror.moved(dw.ref()),
                   .y = dy_mirror.moved(dy.ref())});
    take(dw, mirror);
  }
  return result;
}

// A dtype and, for f32, the ways its products can be made.
std::vector<Precision> precisions(Dtype dtype) {
  if (dtype != Dtype::f32) return {Precision::ieee};
  return {Precision::ieee, Precision::tf32, Precision::bf16x3, Precision::bf16x6};
}

Dtype sum_dtype(Dtype dtype) { return dtype == Dtype::f64 ? Dtype::f64 : Dtype::f32; }

// One case for each pass and dtype of a layer: a shard then needs few of the kernels, which is what
// takes time where each one is instrumented first.
using LayerCase = std::tuple<std::string, Pass, Dtype>;
class Layers : public OnGpu, public ::testing::WithParamInterface<LayerCase> {};

std::string test_name(const ::testing::TestParamInfo<LayerCase>& info) {
  const auto& [layer, pass, dtype] = info.param;
  std::string text = layer + " " + std::string(name(pass)) + " " + std::string(name(dtype));
  for (char& c : text) c = std::isalnum(static_cast<unsigned char>(c)) != 0 ? c : '_';
  return text;
}

INSTANTIATE_TEST_SUITE_P(
    List,
    Layers,
    ::testing::Combine(::testing::ValuesIn(layers()),
                       ::testing::ValuesIn(passes),
                       ::testing::Values(Dtype::f32, Dtype::f16, Dtype::bf16, Dtype::f64)),
    test_name);

// Runs every kernel that takes the case, each fill `times` times.
void expect_agreement(const LayerCase& layer_case, std::initializer_list<Fill> fills, int times) {
  const auto& [layer, pass, dtype] = layer_case;
  const Case c = make_case(context(), problem_text(pass, dtype, layer));
  const bool empty = c.map.n_in == 0 || c.map.n_out == 0;
  int ran = 0;
  for (const Fill fill : fills) {
    if (empty) continue;
    const Operands operands = make_operands(c, fill, true);
    const Sums expected = judge(context(), c, operands);
    for (const Precision precision : precisions(dtype)) {
      Case precise = c;
      precise.problem.precision = precision;
      for (const Kernel& kernel : cuda::kernels()) {
        if (!can_run(kernel, problem_on_device(precise))) continue;
        SCOPED_TRACE(kernel.name + " on " + precise.problem.text());
        const Memory memory{.layout = layouts[ran++ % std::size(layouts)]};
        const auto once = run_on_device(precise, kernel, operands, memory);
        EXPECT_TRUE(within_bound(once, expected.in(precision), {sum_dtype(dtype), dtype}));
        for (int time = 1; time < times; ++time) {
          EXPECT_TRUE(same_bits(run_on_device(precise, kernel, operands, memory), once));
        }
      }
    }
  }
  EXPECT_EQ(ran > 0, !empty);
}

TEST_P(Layers, EveryKernelAgreesWithTheReference) {
  expect_agreement(GetParam(), {Fill::integers, Fill::reals}, 2);
}

// For compute-sanitizer: one voxel, a last tile in part, one of several slices of channels, groups
// of taps without a pair, repeats, both ways of strided maps.
class ShortLayers : public Layers {};

INSTANTIATE_TEST_SUITE_P(
    List,
    ShortLayers,
    ::testing::Combine(::testing::Values("subm3 16->16 line:1",
                                         "subm3 32->32 line:33",
                                         "subm3 16->33 random:129:6",
                                         "conv3s2p1 6->16 repeat:129",
                                         "inv2s2 16->33 shell:8"),
                       ::testing::ValuesIn(passes),
                       ::testing::Values(Dtype::f32, Dtype::f16, Dtype::bf16, Dtype::f64)),
    test_name);

TEST_P(ShortLayers, EveryKernelAgreesWithTheReference) {
  expect_agreement(GetParam(), {Fill::reals}, 1);
}

using Kernels = OnGpu;

// Rows for several slices of the weight gradient; weights too large for any.
TEST_F(Kernels, ManyRowsAndWideWeights) {
  for (const char* layer :
       {"subm3 6->40 random:9000:26", "conv3s2p1 24->16 random:9000:40", "subm3 600->576 line:3"}) {
    for (const Dtype dtype : {Dtype::f32, Dtype::bf16, Dtype::f64}) {
      for (const Pass pass : passes) {
        const Case c = make_case(context(), problem_text(pass, dtype, layer));
        const Operands operands = make_operands(c, Fill::reals);
        const Sums expected = judge(context(), c, operands);
        for (const Kernel& kernel : cuda::kernels()) {
          if (!can_run(kernel, problem_on_device(c))) continue;
          SCOPED_TRACE(kernel.name + " on " + c.problem.text());
          const auto once = run_on_device(c, kernel, operands);
          EXPECT_TRUE(within_bound(once, expected, {sum_dtype(dtype), dtype}));
          EXPECT_TRUE(same_bits(run_on_device(c, kernel, operands), once));
        }
      }
    }
  }
}

TEST_F(Kernels, WriteWeightGradientsInF32) {
  for (const Dtype dtype : {Dtype::f16, Dtype::bf16}) {
    for (const char* layer :
         {"conv2s2 16->33 shell:8", "subm3 6->40 random:9000:26", "subm3 64->64 random:3600:18"}) {
      const Case c = make_case(context(), problem_text(Pass::grad_weight, dtype, layer));
      const Operands operands = make_operands(c, Fill::reals);
      for (const Kernel& kernel : cuda::kernels()) {
        if (!can_run(kernel, problem_on_device(c))) continue;
        EXPECT_TRUE(within_bound(run_on_device(c, kernel, operands, {.gradient = Dtype::f32}),
                                 judge(context(), c, operands), {Dtype::f32, Dtype::f32}));
      }
    }
  }
}

// A line along x has the taps (kx, 1, 1) and no other. Where channels of several taps share a step
// of the matrix instructions, an absent one makes sums NaN, which are then computed once more and
// in another order: the bits are the same where each tap has its own steps.
TEST_F(Kernels, NeverMultiplyAnAbsentNeighbour) {
  for (const Dtype dtype : {Dtype::f32, Dtype::f16, Dtype::bf16, Dtype::f64}) {
    for (const char* layer : {"subm3 6->17 line:33", "subm3 16->48 line:33"}) {
      for (const Pass pass : {Pass::forward, Pass::grad_input}) {
        const Case c = make_case(context(), problem_text(pass, dtype, layer));
        const auto tap_size = static_cast<size_t>(c.problem.c_in * c.problem.c_out);
        Operands operands = make_operands(c, Fill::reals);
        Operands poisoned = operands;
        for (size_t i = 0; i < operands.w.size(); ++i) {
          const int tap = static_cast<int>(i / tap_size);
          if (tap / 3 % 3 == 1 && tap % 3 == 1) continue;
          operands.w[i] = 0;
          poisoned.w[i] = tap % 2 == 0 ? HUGE_VAL : std::nan("");
        }
        const Sums expected = judge(context(), c, operands);
        for (const Kernel& kernel : cuda::kernels()) {
          if (!can_run(kernel, problem_on_device(c))) continue;
          SCOPED_TRACE(kernel.name + " on " + c.problem.text());
          const auto sums = run_on_device(c, kernel, poisoned);
          EXPECT_TRUE(within_bound(sums, expected, {sum_dtype(dtype), dtype}));
          if (c.problem.c_in % 16 != 0) continue;
          EXPECT_TRUE(same_bits(sums, run_on_device(c, kernel, operands)));
        }
      }
    }
  }
}

// The same of the weight gradient: an output row without a tap adds nothing to it, whatever its dy.
TEST_F(Kernels, NeverMultiplyTheGradientOfAnAbsentNeighbour) {
  for (const Dtype dtype : {Dtype::f32, Dtype::f16, Dtype::bf16, Dtype::f64}) {
    for (const char* layer : {"subm3 6->17 line:33", "subm3 40->64 random:300:9",
                              "subm2 72->64 random:300:9", "subm3 64->136 random:300:9",
                              "subm3 72->136 random:300:9", "subm3x1x1 72->120 random:300:9"}) {
      const Case c = make_case(context(), problem_text(Pass::grad_weight, dtype, layer));
      Operands operands = make_operands(c, Fill::reals);
      for (int64_t row = 0; row < c.map.n_out; row += 7) {
        operands.dy[row * c.problem.c_out + row % c.problem.c_out] =
            row % 2 == 0 ? HUGE_VAL : std::nan("");
      }
      const Sums expected = judge(context(), c, operands);
      for (const Precision precision : precisions(dtype)) {
        Case precise = c;
        precise.problem.precision = precision;
        for (const Kernel& kernel : cuda::kernels()) {
          if (!can_run(kernel, problem_on_device(precise))) continue;
          SCOPED_TRACE(kernel.name + " on " + precise.problem.text());
          EXPECT_TRUE(within_bound(run_on_device(precise, kernel, operands), expected.in(precision),
                                   {sum_dtype(dtype), dtype}));
        }
      }
    }
  }
}

TEST_F(Kernels, GradBiasIsTheCpus) {
  Random random("bias");
  for (const int64_t rows : {0, 1, 2047, 5000}) {
    for (const Dtype dtype : {Dtype::f32, Dtype::f16, Dtype::bf16, Dtype::f64}) {
      constexpr int64_t cols = 37;
      const auto values = draw(rows * cols, Fill::reals, dtype, &random);
      const Buffer dy({rows, cols, 3}, dtype, values);
      const Buffer expected({1, cols}, dtype);
      grad_bias(context(), dy.ref(), expected.ref());
      const Buffer db({1, cols}, dtype);
      const Mirror dy_mirror(dy.elements(), dtype);
      const Mirror db_mirror(db.elements(), dtype);
      cuda::grad_bias(*gpu(), dy_mirror.moved(dy.ref()), db_mirror.moved(db.ref()));
      db_mirror.fetch();
      EXPECT_TRUE(same_bits(db.values(), expected.values())) << rows << " " << name(dtype);
    }
  }
}

}  // namespace
}  // namespace voxgemm::test
