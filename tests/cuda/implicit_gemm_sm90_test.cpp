// SPDX-License-Identifier: Apache-2.0
// The Hopper kernel against the CPU's reference, over schedules that the CPU builds.
#include "cuda/kernels/implicit_gemm_sm90.h"

#include "conv/coords.h"
#include "cuda/gpu.h"

namespace voxgemm::test {
namespace {

class OnHopper : public OnGpu {
 protected:
  void SetUp() override {
    OnGpu::SetUp();
    if (IsSkipped()) return;
    if (!cuda::is_hopper(*gpu())) GTEST_SKIP() << "the device is not of compute capability 9.x";
  }
};

class Sm90 : public OnHopper, public ::testing::WithParamInterface<std::string> {};
using Sm90Weights = OnHopper;

Matrix device_matrix(const std::vector<double>& values, int64_t rows, int64_t cols, Dtype dtype) {
  Matrix host = make_matrix(context(), rows, cols, dtype);
  dispatch_float(dtype, [&]<class T>(Type<T>) {
    for (int64_t i = 0; i < rows * cols; ++i) store(values[i], host.as<T>()[i]);
  });
  return to_device(*gpu(), host);
}

std::vector<double> values_of(const MatrixRef& device) {
  const Matrix host = to_host(*gpu(), device);
  std::vector<double> values(host.rows * host.cols);
  dispatch_float(host.dtype, [&]<class T>(Type<T>) {
    for (size_t i = 0; i < values.size(); ++i) values[i] = to_float(host.as<T>()[i]);
  });
  return values;
}

// [taps, c_in, c_out] values in one of the two layouts in use.
struct DeviceWeights {
  Matrix memory;
  WeightsRef ref;
};
DeviceWeights device_weights(const Case& c, const std::vector<double>& values, bool in_contiguous) {
  const int taps = c.map.taps();
  const int c_in = c.problem.c_in;
  const int c_out = c.problem.c_out;
  const int64_t tap_stride = in_contiguous ? c_in : int64_t{c_in} * c_out;
  const int64_t in_stride = in_contiguous ? 1 : c_out;
  const int64_t out_stride = in_contiguous ? int64_t{taps} * c_in : 1;
  std::vector<double> placed(values.size());
  for (int t = 0; t < taps; ++t) {
    for (int k = 0; k < c_in; ++k) {
      for (int n = 0; n < c_out; ++n) {
        placed[t * tap_stride + k * in_stride + n * out_stride] =
            values[(int64_t{t} * c_in + k) * c_out + n];
      }
    }
  }
  DeviceWeights w;
  w.memory = device_matrix(placed, taps, int64_t{c_in} * c_out, c.problem.dtype);
  w.ref = {.data = w.memory.data,
           .taps = taps,
           .c_in = c_in,
           .c_out = c_out,
           .tap_stride = tap_stride,
           .in_stride = in_stride,
           .out_stride = out_stride,
           .dtype = c.problem.dtype,
           .device = gpu()->device};
  return w;
}

std::vector<double> run_sm90(const Case& c,
                             const Operands& operands,
                             int groups,
                             bool in_contiguous) {
  const Context& ctx = *gpu();
  const Problem& p = c.problem;
  const bool backward = p.pass == Pass::grad_input;
  const KernelMap backward_map = backward && !c.map.symmetric ? transpose(context(), c.map) : c.map;
  constexpr int tile = cuda::sm90_tile_rows;
  const ScheduleOptions options{
      .order = ScheduleOptions::Order::by_mask,
      .groups = groups,
      .tile_rows = tile,
      .chunk_rows = static_cast<int>(backward_map.n_out / tile + 1) * tile};
  const Schedule schedule = Schedule::build(context(), backward_map, options);
  const ScheduleParts parts = schedule.parts();
  const Matrix order = to_device(ctx, parts.order);
  const Matrix tiles = to_device(ctx, parts.tiles);
  const Matrix masks = to_device(ctx, parts.masks);
  const Matrix indices = to_device(ctx, parts.indices);
  KernelMap map = backward_map;
  map.neighbours = to_device(ctx, backward_map.neighbours);

  DeviceWeights w = device_weights(c, operands.w, in_contiguous);
  if (backward) {
    std::swap(w.ref.c_in, w.ref.c_out);
    std::swap(w.ref.in_stride, w.ref.out_stride);
  }
  const Matrix x = backward ? device_matrix(operands.dy, c.map.n_out, p.c_out, p.dtype)
                            : device_matrix(operands.x, c.map.n_in, p.c_in, p.dtype);
  const Matrix bias = device_matrix(operands.bias, 1, p.c_out, p.dtype);
  // NaN, so that an element that is not written shows.
  const std::vector<double> nothing(backward_map.n_out * w.ref.c_out, NAN);
  const Matrix y = device_matrix(nothing, backward_map.n_out, w.ref.c_out, p.dtype);
  cuda::sm90_convolve(ctx,
                      {{.order = order,
                        .chunk_tiles = {},
                        .tiles = tiles,
                        .masks = masks,
                        .block_taps = {},
                        .indices = indices},
                       options},
                      {.map = &map,
                       .x = x,
                       .w = w.ref,
                       .bias = backward ? nullptr : bias.data,
                       .y = y,
                       .mirror_taps = backward && c.map.symmetric});
  return values_of(y);
}

INSTANTIATE_TEST_SUITE_P(List,
                         Sm90,
                         ::testing::Values("subm3 16->16 line:1",
                                           "subm3 64->64 random:129:6",
                                           "subm3 8->24 shell:12",
                                           "subm3 72->200 shell:16",
                                           "subm3 128->256 shell:24",
                                           "subm3 320->64 random:500:9",
                                           "conv3s2p1 64->128 random:900:14",
                                           "inv2s2 128->64 shell:16",
                                           "subm1 64->64 shell:12",
                                           "subm3x1x3 32->64 full:7"),
                         [](const auto& info) {
                           std::string name = info.param;
                           for (char& c : name) {
                             c = std::isalnum(static_cast<unsigned char>(c)) != 0 ? c : '_';
                           }
                           return name;
                         });

TEST_P(Sm90, AgreesWithTheReferenceAndItself) {
  for (const Dtype dtype : {Dtype::f16, Dtype::bf16}) {
    for (const Pass pass : {Pass::forward, Pass::grad_input}) {
      const Case c = make_case(context(), problem_text(pass, dtype, GetParam()));
      const Operands operands = make_operands(c, Fill::reals);
      const Sums expected = judge(context(), c, operands);
      for (int groups = 1; groups <= std::min(3, c.map.taps()); ++groups) {
        for (const bool in_contiguous : {true, false}) {
          SCOPED_TRACE(c.problem.text() + ", " + std::to_string(groups) + " groups");
          const auto once = run_sm90(c, operands, groups, in_contiguous);
          EXPECT_TRUE(within_bound(once, expected, {Dtype::f32, dtype}));
          EXPECT_TRUE(same_bits(run_sm90(c, operands, groups, in_contiguous), once));
        }
      }
    }
  }
}

// Rows are zero-filled where a neighbour is absent; an infinite weight must not make NaN of that.
TEST_F(Sm90Weights, AreNotMultipliedWithAbsentNeighbours) {
  for (const int groups : {1, 3}) {
    const Case c =
        make_case(context(), problem_text(Pass::forward, Dtype::bf16, "subm3 64->64 shell:16"));
    Operands operands = make_operands(c, Fill::integers);
    constexpr int tap = 5;
    const int64_t size = int64_t{c.problem.c_in} * c.problem.c_out;
    std::fill_n(operands.w.begin() + tap * size, size, std::numeric_limits<double>::infinity());
    const auto values = run_sm90(c, operands, groups, true);
    int64_t finite = 0;
    for (int64_t row = 0; row < c.map.n_out; ++row) {
      if (c.map.neighbours.row<int32_t>(tap)[row] >= 0) continue;
      for (int n = 0; n < c.problem.c_out; ++n) {
        EXPECT_TRUE(std::isfinite(values[row * c.problem.c_out + n])) << "row " << row;
        ++finite;
      }
    }
    EXPECT_GT(finite, 0);
  }
}

}  // namespace
}  // namespace voxgemm::test
