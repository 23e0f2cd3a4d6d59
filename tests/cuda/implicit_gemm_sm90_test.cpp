// SPDX-License-Identifier: Apache-2.0
// The Hopper kernels on what cuda_kernels_test.cpp, whose operands are all copied to be aligned,
// leaves out: operands used in place, many turns of a CTA, weights that are not finite.
#include "cuda/kernels/families.h"

#include "conv/coords.h"
#include "conv/passes.h"
#include "cuda/gpu.h"

namespace voxgemm::test {
namespace {

class OnHopper : public OnGpu {
 protected:
  void SetUp() override {
    OnGpu::SetUp();
    if (IsSkipped()) return;
    if (cuda::architecture(gpu()->device) / 10 != 9) {
      GTEST_SKIP() << "the device is not of compute capability 9.x";
    }
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

// A problem with its operands on the device, for several kernels.
class OnDevice {
 public:
  OnDevice(const Case& c, const Operands& operands, bool in_contiguous)
      : backward_(c.problem.pass == Pass::grad_input),
        host_map_(backward_ && !c.map.symmetric ? transpose(context(), c.map) : c.map),
        map_(host_map_),
        problem_(c.problem),
        w_(device_weights(c, operands.w, in_contiguous)),
        x_(backward_ ? device_matrix(operands.dy, c.map.n_out, problem_.c_out, problem_.dtype)
                     : device_matrix(operands.x, c.map.n_in, problem_.c_in, problem_.dtype)),
        bias_(device_matrix(operands.bias, 1, problem_.c_out, problem_.dtype)) {
    if (!operands.residual.empty()) {
      residual_ = device_matrix(operands.residual, c.map.n_out, problem_.c_out, problem_.dtype);
    }
    map_.neighbours = to_device(*gpu(), host_map_.neighbours);
    problem_.n_in = map_.n_in;
    problem_.n_out = map_.n_out;
    problem_.device = gpu()->device;
    problem_.architecture = cuda::architecture(problem_.device);
    if (!backward_) return;
    std::swap(w_.ref.c_in, w_.ref.c_out);
    std::swap(w_.ref.in_stride, w_.ref.out_stride);
  }

  std::vector<const Kernel*> kernels() const {
    static const std::vector<Kernel> family = cuda::implicit_gemm_sm90_kernels();
    std::vector<const Kernel*> able;
    for (const Kernel& kernel : family) {
      if (can_run(kernel, problem_)) able.push_back(&kernel);
    }
    return able;
  }

  std::vector<double> run(const Kernel& kernel, int chunk_rows = 0) {
    ScheduleOptions options = kernel.schedule(kernel, problem_);
    if (chunk_rows > 0) options.chunk_rows = chunk_rows;
    if (!schedule_ || schedule_->options() != options) {
      schedule_ = device_schedule(*gpu(), host_map_, map_, options);
    }
    // NaN, so that an element that is not written shows.
    const std::vector<double> nothing(map_.n_out * w_.ref.c_out, NAN);
    const Matrix y = device_matrix(nothing, map_.n_out, w_.ref.c_out, problem_.dtype);
    kernel.launch(kernel, *gpu(), problem_.pass,
                  {.schedule = &*schedule_,
                   .map = &map_,
                   .x = x_,
                   .w = w_.ref,
                   .bias = backward_ ? nullptr : bias_.data,
                   .residual = residual_,
                   .relu = residual_.data != nullptr,
                   .y = y,
                   .mirror_taps = backward_ && map_.symmetric});
    return values_of(y);
  }

 private:
  bool backward_;
  KernelMap host_map_;
  KernelMap map_;
  Problem problem_;
  DeviceWeights w_;
  Matrix x_;
  Matrix bias_;
  Matrix residual_;
  std::optional<Schedule> schedule_;
};

INSTANTIATE_TEST_SUITE_P(List,
                         Sm90,
                         ::testing::Values("subm3 16->16 line:1",
                                           "subm3 64->64 random:129:6",
                                           "subm3 8->24 shell:12",
                                           "subm3 72->200 shell:16",
                                           "subm3 128->264 shell:16",
                                           "subm3 320->64 random:500:9",
                                           "conv3s2p1 64->128 random:900:14",
                                           "inv2s2 128->64 shell:16",
                                           "subm1 64->64 shell:12",
                                           "subm3x1x3 32->64 full:7",
                                           "subm5 40->16 random:900:12",
                                           // More tiles than an H200 has SMs, and twice as many.
                                           "subm3 8->32 shell:80",
                                           "subm3 32->8 shell:160"),
                         [](const auto& info) {
                           std::string name = info.param;
                           for (char& c : name) {
                             c = std::isalnum(static_cast<unsigned char>(c)) != 0 ? c : '_';
                           }
                           return name;
                         });

struct Arithmetics {
  Dtype dtype;
  Precision precision = Precision::ieee;
};
constexpr Arithmetics arithmetics[] = {{Dtype::f16},
                                       {Dtype::bf16},
                                       {Dtype::f32, Precision::tf32},
                                       {Dtype::f32, Precision::bf16x3},
                                       {Dtype::f32, Precision::bf16x6}};

TEST_P(Sm90, AgreesWithTheReferenceAndItself) {
  for (const auto& [dtype, precision] : arithmetics) {
    for (const Pass pass : {Pass::forward, Pass::grad_input}) {
      Case c = make_case(context(), problem_text(pass, dtype, GetParam()));
      c.problem.precision = precision;
      const Operands operands = make_operands(c, Fill::reals, true);
      const Sums expected = judge(context(), c, operands).in(precision);
      for (const bool in_contiguous : {true, false}) {
        OnDevice layer(c, operands, in_contiguous);
        EXPECT_FALSE(layer.kernels().empty());
        for (const Kernel* kernel : layer.kernels()) {
          SCOPED_TRACE(c.problem.text() + ", " + kernel->name);
          const auto once = layer.run(*kernel);
          EXPECT_TRUE(within_bound(once, expected, {Dtype::f32, dtype}));
          EXPECT_TRUE(same_bits(layer.run(*kernel), once));
          // A row's sum does not depend on where its tile stands, but for the slices of the tile.
          if (in_contiguous || kernel->slices > 1 || c.map.n_out > 1000) continue;
          EXPECT_TRUE(same_bits(layer.run(*kernel, 256), once));
        }
      }
    }
  }
}

// Rows are zero-filled where a neighbour is absent; an infinite weight must not make NaN of that,
// nor of the pieces it is split into.
TEST_F(Sm90Weights, AreNotMultipliedWithAbsentNeighbours) {
  for (const auto& [dtype, precision] : arithmetics) {
    Case c = make_case(context(), problem_text(Pass::forward, dtype, "subm3 64->40 shell:16"));
    c.problem.precision = precision;
    Operands operands = make_operands(c, Fill::integers);
    constexpr int tap = 5;
    const int64_t size = int64_t{c.problem.c_in} * c.problem.c_out;
    std::fill_n(operands.w.begin() + tap * size, size, std::numeric_limits<double>::infinity());
    OnDevice layer(c, operands, true);
    EXPECT_FALSE(layer.kernels().empty());
    for (const Kernel* kernel : layer.kernels()) {
      SCOPED_TRACE(kernel->name);
      const auto values = layer.run(*kernel);
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
}

}  // namespace
}  // namespace voxgemm::test
