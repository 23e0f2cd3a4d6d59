// SPDX-License-Identifier: Apache-2.0
// Plans on a CUDA device through the public interface alone, coordinates to gradients: against the
// reference, and every kernel a hundred times beside a load, on two streams and from a replayed
// graph, for the same bits.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <thread>

#include "cuda/device.h"
#include "cuda/gpu.h"

namespace voxgemm::test {
namespace {

// A layer with its operands on a device; maps, outputs and schedules are made there.
class DeviceLayer {
 public:
  DeviceLayer(const Context& ctx, const Case& c, const Operands& operands)
      : problem_(c.problem), map_(build(ctx, c)) {
    const Dtype dtype = c.problem.dtype;
    const auto matrix = [&](const std::vector<double>& values, int64_t rows, int64_t cols) {
      return to_device(ctx, Buffer({rows, cols}, dtype, values).ref());
    };
    const int64_t taps = map_.taps();
    x_ = matrix(operands.x, c.map.n_in, c.problem.c_in);
    dy_ = matrix(operands.dy, c.map.n_out, c.problem.c_out);
    bias_ = matrix(operands.bias, 1, c.problem.c_out);
    w_ = matrix(operands.w, taps * c.problem.c_in, c.problem.c_out);
    const bool forward = problem_.pass == Pass::forward;
    if (problem_.pass == Pass::grad_weight) {
      result_ = make_matrix(ctx, taps * c.problem.c_in, c.problem.c_out, dtype);
    } else {
      result_ = make_matrix(ctx, forward ? c.map.n_out : c.map.n_in,
                            forward ? c.problem.c_out : c.problem.c_in, dtype);
    }
  }

  Plan plan(const Context& ctx, const std::string& kernel) const {
    PlanOptions options = plan_options(problem_, {.kernel = kernel});
    options.precision = problem_.precision;
    return Plan::make(ctx, map_, options);
  }

  // Overwrites the result.
  void run(const Context& ctx, Plan& plan) const {
    if (problem_.pass == Pass::forward) return plan.forward(ctx, x_, weights(w_), {bias_}, result_);
    if (problem_.pass == Pass::grad_input) return plan.grad_input(ctx, dy_, weights(w_), result_);
    plan.grad_weight(ctx, x_, dy_, weights(result_));
  }

  void spoil(const Context& ctx) const {
    const size_t bytes = result_.rows * result_.cols * size_of(result_.dtype);
    if (bytes > 0) cuda::fill_bytes(ctx, result_.data, 0xff, bytes);
  }
  std::vector<char> bytes(const Context& ctx) const {
    const Matrix host = to_host(ctx, result_);
    return {host.as<char>(), host.as<char>() + host.rows * host.cols * size_of(host.dtype)};
  }
  // Into memory of the host, without waiting.
  void fetch(const Context& ctx, char* place, size_t size) const {
    ASSERT_EQ(
        cudaMemcpyAsync(place, result_.data, size, cudaMemcpyDeviceToHost, cuda::stream_of(ctx)),
        cudaSuccess);
  }
  std::vector<double> values(const Context& ctx) const {
    const Matrix host = to_host(ctx, result_);
    std::vector<double> list;
    dispatch_float(host.dtype, [&]<class T>(Type<T>) {
      for (int64_t i = 0; i < host.rows * host.cols; ++i) list.push_back(to_float(host.as<T>()[i]));
    });
    return list;
  }
  Problem problem(const Context& ctx) const { return plan(ctx, "").problem(ctx, problem_.pass); }

 private:
  static KernelMap build(const Context& ctx, const Case& c) {
    const bool inverse = c.problem.operation == Operation::inverse;
    const Matrix fine = coords_on_device(ctx, inverse ? c.out : c.in);
    KernelMap map;
    if (c.problem.operation == Operation::submanifold) {
      map = build_submanifold_map(ctx, fine, c.problem.geometry);
    } else {
      const Matrix coarse = output_coords(ctx, fine, c.problem.geometry);
      map = build_kernel_map(ctx, fine, coarse, c.problem.geometry);
      if (inverse) map = transpose(ctx, map);
    }
    settle(ctx, &map);
    return map;
  }

  WeightsRef weights(const Matrix& memory) const {
    return {.data = memory.data,
            .taps = map_.taps(),
            .c_in = problem_.c_in,
            .c_out = problem_.c_out,
            .tap_stride = int64_t{problem_.c_in} * problem_.c_out,
            .in_stride = problem_.c_out,
            .out_stride = 1,
            .dtype = memory.dtype,
            .device = memory.device};
  }

  Problem problem_;
  KernelMap map_;
  Matrix x_, dy_, bias_, w_, result_;
};

constexpr Dtype dtypes[] = {Dtype::f32, Dtype::f16, Dtype::bf16, Dtype::f64};

class Plans : public OnGpu, public ::testing::WithParamInterface<std::string> {};

INSTANTIATE_TEST_SUITE_P(List, Plans, ::testing::ValuesIn(layers()), [](const auto& info) {
  std::string name = info.param;
  for (char& c : name) c = std::isalnum(static_cast<unsigned char>(c)) != 0 ? c : '_';
  return name;
});

TEST_P(Plans, AgreeWithTheReference) {
  const Context& ctx = *gpu();
  for (const Dtype dtype : dtypes) {
    for (const Pass pass : passes) {
      const Case c = make_case(context(), problem_text(pass, dtype, GetParam()));
      const Operands operands = make_operands(c, Fill::reals);
      const DeviceLayer layer(ctx, c, operands);
      Plan plan = layer.plan(ctx, "");
      layer.spoil(ctx);
      layer.run(ctx, plan);
      SCOPED_TRACE(c.problem.text());
      const Dtype sums = dtype == Dtype::f64 ? Dtype::f64 : Dtype::f32;
      EXPECT_TRUE(within_bound(layer.values(ctx), judge(context(), c, operands), {sums, dtype}));
    }
  }
}

// Keeps another stream of the device busy until it goes out of scope.
class Load {
 public:
  Load() : ctx_(cuda_context(0)), thread_([this] { work(); }) {}
  ~Load() {
    done_ = true;
    thread_.join();
  }
  Load(const Load&) = delete;
  Load& operator=(const Load&) = delete;

 private:
  void work() {
    const Case c = make_case(context(), "forward bf16 subm3 64->64 shell:48");
    const DeviceLayer layer(ctx_, c, make_operands(c, Fill::reals));
    Plan plan = layer.plan(ctx_, "");
    while (!done_) {
      for (int i = 0; i < 20; ++i) layer.run(ctx_, plan);
      synchronize(ctx_);
    }
  }

  Context ctx_;
  std::atomic<bool> done_ = false;
  std::thread thread_;
};

struct Graph {
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t exec = nullptr;
  ~Graph() {
    if (exec != nullptr) cudaGraphExecDestroy(exec);
    if (graph != nullptr) cudaGraphDestroy(graph);
  }
};

// Runs a layer again and again and counts the results that differ from `once`. They are compared by
// the batch, as many as the host's locked memory holds, so that the device never waits for the
// host.
class Repeats {
 public:
  Repeats() {
    check(cudaMallocHost(&memory_, bytes) == cudaSuccess, ErrorCode::out_of_memory,
          "locked memory");
  }
  ~Repeats() { cudaFreeHost(memory_); }
  Repeats(const Repeats&) = delete;
  Repeats& operator=(const Repeats&) = delete;

  template <class Run>
  int differ(const DeviceLayer& layer, const std::vector<char>& once, int count, const Run& run) {
    const Context& ctx = *gpu();
    char* const results = static_cast<char*>(memory_);
    const int batch = static_cast<int>(bytes / std::max<size_t>(once.size(), 1));
    check(batch > 0, ErrorCode::out_of_memory, "a result is larger than the locked memory");
    int different = 0;
    for (int begin = 0; begin < count; begin += batch) {
      const int end = std::min(count, begin + batch);
      for (int i = begin; i < end; ++i) {
        layer.spoil(ctx);
        run();
        layer.fetch(ctx, results + (i - begin) * once.size(), once.size());
      }
      synchronize(ctx);
      for (int i = begin; i < end; ++i) {
        const char* result = results + (i - begin) * once.size();
        different += std::memcmp(result, once.data(), once.size()) != 0 ? 1 : 0;
      }
    }
    return different;
  }

 private:
  static constexpr size_t bytes = size_t{64} << 20;
  void* memory_ = nullptr;
};

void expect_same_bits(const Case& c,
                      const Operands& operands,
                      const Precision precision,
                      Repeats& repeats) {
  const Context& ctx = *gpu();
  Case precise = c;
  precise.problem.precision = precision;
  const DeviceLayer layer(ctx, precise, operands);
  for (const Candidate& candidate : candidates(layer.problem(ctx), {})) {
    if (!candidate.reason.empty()) continue;
    SCOPED_TRACE(candidate.kernel + " on " + precise.problem.text());
    Plan plan = layer.plan(ctx, candidate.kernel);
    layer.run(ctx, plan);
    const std::vector<char> once = layer.bytes(ctx);
    const auto direct = [&] { layer.run(ctx, plan); };
    EXPECT_EQ(repeats.differ(layer, once, 100, direct), 0) << "of 100 repeats";
    Graph captured;
    ASSERT_EQ(cudaStreamBeginCapture(cuda::stream_of(ctx), cudaStreamCaptureModeThreadLocal),
              cudaSuccess);
    layer.run(ctx, plan);
    ASSERT_EQ(cudaStreamEndCapture(cuda::stream_of(ctx), &captured.graph), cudaSuccess);
    ASSERT_EQ(cudaGraphInstantiate(&captured.exec, captured.graph, 0), cudaSuccess);
    const auto replay = [&] {
      ASSERT_EQ(cudaGraphLaunch(captured.exec, cuda::stream_of(ctx)), cudaSuccess);
    };
    EXPECT_EQ(repeats.differ(layer, once, 20, replay), 0) << "of 20 replays";
  }
}

TEST_P(Plans, GiveTheSameBitsAHundredTimesBesideALoad) {
  const Load load;
  Repeats repeats;
  for (const Dtype dtype : dtypes) {
    for (const Pass pass : passes) {
      const Case c = make_case(context(), problem_text(pass, dtype, GetParam()));
      if (c.map.n_in == 0 || c.map.n_out == 0) continue;
      const Operands operands = make_operands(c, Fill::reals);
      expect_same_bits(c, operands, Precision::ieee, repeats);
      if (dtype != Dtype::f32) continue;
      for (const Precision precision : {Precision::tf32, Precision::bf16x3, Precision::bf16x6}) {
        expect_same_bits(c, operands, precision, repeats);
      }
    }
  }
}

}  // namespace
}  // namespace voxgemm::test
