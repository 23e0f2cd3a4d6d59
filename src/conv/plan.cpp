// SPDX-License-Identifier: Apache-2.0
#include "voxgemm/plan.h"

#include <cstring>

#include "conv/kernel.h"
#include "conv/validate.h"
#include "core/dispatch.h"

namespace voxgemm {

struct Plan::State {
  const KernelMap* map = nullptr;
  PlanOptions options;
  std::optional<KernelMap> transposed;               // made for grad_input unless one was given
  std::array<const Kernel*, 3> kernels = {};         // by Pass
  std::array<std::optional<Schedule>, 3> schedules;  // by Pass

  // The map that grad_input runs on as a forward convolution. Symmetric: the map itself with
  // mirrored taps.
  const KernelMap& backward_map(const Context& ctx) {
    if (map->symmetric) return *map;
    if (options.transposed != nullptr) return *options.transposed;
    if (!transposed) transposed = transpose(ctx, *map);
    return *transposed;
  }

  const Schedule& schedule(const Context& ctx,
                           Pass pass,
                           const KernelMap& of,
                           const Problem& problem) {
    auto& slot = schedules[static_cast<int>(pass)];
    if (!slot) {
      const Kernel& kernel = *kernels[static_cast<int>(pass)];
      slot = Schedule::build(ctx, of, kernel.schedule(kernel, problem));
    }
    return *slot;
  }
};

namespace {

constexpr int index(Pass pass) { return static_cast<int>(pass); }

void fill_zero(const Context& ctx, const WeightsRef& w) {
  parallel_for(ctx, w.taps, [&](int64_t tap, int) {
    dispatch_float(w.dtype, [&]<class T>(Type<T>) {
      auto* data = static_cast<T*>(w.data) + tap * w.tap_stride;
      for (int k = 0; k < w.c_in; ++k) {
        for (int n = 0; n < w.c_out; ++n) data[k * w.in_stride + n * w.out_stride] = T{};
      }
    });
  });
}

// dy with the rows of repeated voxels added to the lowest row of each, in row order: the adjoint of
// giving every repeated row a copy of the output.
Matrix merge_repeated(const Context& ctx, const MatrixRef& dy, const MatrixRef& first) {
  Matrix merged = make_matrix(ctx, dy.rows, dy.cols, dy.dtype);
  dispatch_float(dy.dtype, [&]<class T>(Type<T>) {
    for (int64_t r = 0; r < dy.rows; ++r) {
      std::memcpy(merged.row<T>(r), dy.row<T>(r), dy.cols * sizeof(T));
    }
    std::vector<double> sums(static_cast<size_t>(dy.cols));
    std::vector<int32_t> next(dy.rows, -1);  // chains of rows with the same first row
    std::vector<int32_t> last(dy.rows, -1);
    for (int64_t r = 0; r < dy.rows; ++r) {
      const int32_t head = first.as<int32_t>()[r];
      if (head == r) {
        last[r] = head;
      } else {
        next[last[head]] = static_cast<int32_t>(r);
        last[head] = static_cast<int32_t>(r);
      }
    }
    for (int64_t head = 0; head < dy.rows; ++head) {
      if (first.as<int32_t>()[head] != head || next[head] < 0) continue;
      std::fill(sums.begin(), sums.end(), 0.0);
      for (int32_t r = static_cast<int32_t>(head); r >= 0; r = next[r]) {
        for (int64_t c = 0; c < dy.cols; ++c) sums[c] += to_float(dy.row<const T>(r)[c]);
      }
      for (int64_t c = 0; c < dy.cols; ++c) store(sums[c], merged.row<T>(head)[c]);
    }
  });
  return merged;
}

void zero_repeated(const MatrixRef& dx, const MatrixRef& first) {
  for (int64_t r = 0; r < dx.rows; ++r) {
    if (first.as<int32_t>()[r] == r) continue;
    std::memset(dx.row<char>(0) + r * dx.stride * size_of(dx.dtype), 0,
                dx.cols * size_of(dx.dtype));
  }
}

WeightsRef seen_transposed(WeightsRef w) {
  std::swap(w.c_in, w.c_out);
  std::swap(w.in_stride, w.out_stride);
  return w;
}

}  // namespace

Plan::Plan(std::unique_ptr<State> state) : state_(std::move(state)) {}
Plan::~Plan() = default;
Plan::Plan(Plan&&) noexcept = default;
Plan& Plan::operator=(Plan&&) noexcept = default;

Plan Plan::make(const Context&, const KernelMap& map, const PlanOptions& options) {
  validate_plan(map, options);
  auto state = std::make_unique<State>();
  state->map = &map;
  state->options = options;
  return Plan(std::move(state));
}

Problem Plan::problem(const Context& ctx, Pass pass) const {
  const KernelMap& map = *state_->map;
  const bool backward = pass == Pass::grad_input;
  Problem problem;
  problem.pass = pass;
  problem.dtype = state_->options.dtype;
  problem.operation = state_->options.operation;
  problem.geometry = map.geometry;
  problem.c_in = state_->options.c_in;
  problem.c_out = state_->options.c_out;
  problem.n_in = backward ? map.n_out : map.n_in;
  problem.n_out = backward ? map.n_in : map.n_out;
  problem.pairs = map.pairs();
  problem.device = ctx.device;
  problem.threads = ctx.threads;
  return problem;
}

const Kernel& Plan::kernel(const Context& ctx, Pass pass) {
  const Kernel*& slot = state_->kernels[index(pass)];
  if (slot == nullptr) {
    slot = &choose(problem(ctx, pass), state_->options.filters[index(pass)]);
  }
  return *slot;
}

void Plan::forward(const Context& ctx,
                   const MatrixRef& x,
                   const WeightsRef& w,
                   const std::optional<MatrixRef>& bias,
                   const MatrixRef& y) {
  const KernelMap& map = *state_->map;
  const PlanOptions& options = state_->options;
  validate_matrix(ctx, x, {"x", map.n_in, options.c_in, options.dtype});
  validate_weights(ctx, w, map, options);
  if (bias) validate_matrix(ctx, *bias, {"the bias", 1, options.c_out, options.dtype});
  validate_matrix(ctx, y, {"y", map.n_out, options.c_out, options.dtype});
  const Memory result = memory_of(y, "y");
  validate_apart(result, memory_of(x, "x"));
  validate_apart(result, memory_of(w, "the weights"));
  if (bias) validate_apart(result, memory_of(*bias, "the bias"));
  if (y.rows == 0) return;
  const Kernel& picked = kernel(ctx, Pass::forward);
  const Schedule& schedule = state_->schedule(ctx, Pass::forward, map, problem(ctx, Pass::forward));
  picked.launch(picked, ctx, Pass::forward,
                {.schedule = &schedule,
                 .map = &map,
                 .x = x,
                 .w = w,
                 .bias = bias ? bias->data : nullptr,
                 .y = y});
}

void Plan::grad_input(const Context& ctx,
                      const MatrixRef& dy,
                      const WeightsRef& w,
                      const MatrixRef& dx) {
  const KernelMap& map = *state_->map;
  const PlanOptions& options = state_->options;
  validate_matrix(ctx, dy, {"dy", map.n_out, options.c_out, options.dtype});
  validate_weights(ctx, w, map, options);
  validate_matrix(ctx, dx, {"dx", map.n_in, options.c_in, options.dtype});
  validate_apart(memory_of(dx, "dx"), memory_of(dy, "dy"));
  validate_apart(memory_of(dx, "dx"), memory_of(w, "the weights"));
  if (dx.rows == 0) return;
  const Kernel& picked = kernel(ctx, Pass::grad_input);
  const KernelMap& backward = state_->backward_map(ctx);
  const Schedule& schedule =
      state_->schedule(ctx, Pass::grad_input, backward, problem(ctx, Pass::grad_input));
  Matrix merged;
  if (!map.out_first.empty()) merged = merge_repeated(ctx, dy, map.out_first);
  picked.launch(picked, ctx, Pass::grad_input,
                {.schedule = &schedule,
                 .map = &backward,
                 .x = map.out_first.empty() ? dy : static_cast<const MatrixRef&>(merged),
                 .w = seen_transposed(w),
                 .y = dx,
                 .mirror_taps = map.symmetric});
  if (!map.in_first.empty()) zero_repeated(dx, map.in_first);
}

void Plan::grad_weight(const Context& ctx,
                       const MatrixRef& x,
                       const MatrixRef& dy,
                       const WeightsRef& dw) {
  const KernelMap& map = *state_->map;
  const PlanOptions& options = state_->options;
  validate_matrix(ctx, x, {"x", map.n_in, options.c_in, options.dtype});
  validate_matrix(ctx, dy, {"dy", map.n_out, options.c_out, options.dtype});
  validate_weight_gradient(ctx, dw, map, options);
  validate_apart(memory_of(dw, "the weight gradient"), memory_of(x, "x"));
  validate_apart(memory_of(dw, "the weight gradient"), memory_of(dy, "dy"));
  if (map.n_out == 0 || map.n_in == 0) return fill_zero(ctx, dw);
  const Kernel& picked = kernel(ctx, Pass::grad_weight);
  const Schedule& schedule =
      state_->schedule(ctx, Pass::grad_weight, map, problem(ctx, Pass::grad_weight));
  picked.launch(picked, ctx, Pass::grad_weight,
                {.schedule = &schedule, .map = &map, .x = x, .w = dw, .y = dy});
}

void grad_bias(const Context& ctx, const MatrixRef& dy, const MatrixRef& db) {
  validate_matrix(ctx, dy, {"dy", dy.rows, dy.cols, dy.dtype});
  validate_matrix(ctx, db, {"db", 1, dy.cols, db.dtype});
  // Rows are summed in blocks of this size, then the blocks in order: the same for any number of
  // threads.
  constexpr int64_t block = 2048;
  const int64_t blocks = (dy.rows + block - 1) / block;
  std::vector<double> sums(static_cast<size_t>(blocks * dy.cols), 0.0);
  parallel_for(ctx, blocks, [&](int64_t b, int) {
    double* sum = sums.data() + b * dy.cols;
    dispatch_float(dy.dtype, [&]<class T>(Type<T>) {
      for (int64_t r = b * block; r < std::min(dy.rows, (b + 1) * block); ++r) {
        for (int64_t c = 0; c < dy.cols; ++c) sum[c] += to_float(dy.row<const T>(r)[c]);
      }
    });
  });
  std::vector<double> total(static_cast<size_t>(dy.cols), 0.0);
  for (int64_t b = 0; b < blocks; ++b) {
    for (int64_t c = 0; c < dy.cols; ++c) total[c] += sums[b * dy.cols + c];
  }
  dispatch_float(db.dtype, [&]<class T>(Type<T>) {
    for (int64_t c = 0; c < dy.cols; ++c) store(total[c], db.as<T>()[c]);
  });
}

}  // namespace voxgemm
