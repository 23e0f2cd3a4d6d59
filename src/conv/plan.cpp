// SPDX-License-Identifier: Apache-2.0
#include "voxgemm/plan.h"

#include <algorithm>
#include <utility>

#include "conv/backend.h"
#include "conv/kernel.h"
#include "conv/passes.h"
#include "conv/validate.h"
#include "voxgemm/tune.h"

namespace voxgemm {

struct Plan::State {
  const KernelMap* map = nullptr;
  PlanOptions options;
  std::optional<KernelMap> transposed;               // made for grad_input unless one was given
  std::array<const Kernel*, 3> kernels = {};         // by Pass
  std::array<std::optional<Schedule>, 3> schedules;  // by Pass
  std::array<int64_t, 3> workspace_bytes = {};       // by Pass

  // The map that grad_input runs on as a forward convolution. Symmetric: the map itself with
  // mirrored taps.
  const KernelMap& backward_map(const Context& ctx) {
    if (map->symmetric) return *map;
    if (options.transposed != nullptr) return *options.transposed;
    if (!transposed) transposed = transpose(ctx, *map);
    return *transposed;
  }

  const Kernel& kernel(const Context& ctx, const Problem& problem) {
    const auto number = static_cast<size_t>(problem.pass);
    const Filter& filter = options.filters[number];
    if (kernels[number] != nullptr) return *kernels[number];
    const bool measures =
        options.tune_at_first_use && filter.measured && filter.kernel.empty() && !is_capturing(ctx);
    if (measures && !is_tuned(problem, filter)) tune(ctx, *map, options, problem.pass);
    return *(kernels[number] = &choose(problem, filter));
  }

  // Of the map that the problem's pass runs on.
  const Schedule& schedule(const Context& ctx, const KernelMap& of, const Problem& problem) {
    const auto number = static_cast<size_t>(problem.pass);
    const Kernel& picked = kernel(ctx, problem);
    const ScheduleOptions wanted = picked.schedule(picked, problem);
    const Schedule* given = options.schedules[number];
    if (given != nullptr && given->options() == wanted) return *given;
    auto& slot = schedules[number];
    if (!slot) slot = options.build_schedule(ctx, of, wanted);
    return *slot;
  }
};

namespace {

// A pass's context, whose memory is counted: the most bytes it had at once go to `most` when it
// ends. Everything that it gave out has come back by then. Not for several threads.
class Metered {
 public:
  Metered(const Context& ctx, int64_t* most) : context_(ctx), most_(most) {
    context_.allocate_matrix = nullptr;
    context_.allocate = [this, &ctx](size_t bytes) {
      std::shared_ptr<void> memory = ctx.allocate(bytes);
      const auto size = static_cast<int64_t>(bytes);
      peak_ = std::max(peak_, held_ += size);
      void* const place = memory.get();
      return std::shared_ptr<void>(
          place, [this, size, kept = std::move(memory)](void*) { held_ -= size; });
    };
  }
  ~Metered() { *most_ = peak_; }
  Metered(const Metered&) = delete;
  Metered& operator=(const Metered&) = delete;
  const Context& context() const { return context_; }

 private:
  Context context_;
  int64_t* most_;
  int64_t held_ = 0;
  int64_t peak_ = 0;
};

}  // namespace

Plan::Plan(std::unique_ptr<State> state) : state_(std::move(state)) {}
Plan::~Plan() = default;
Plan::Plan(Plan&&) noexcept = default;
Plan& Plan::operator=(Plan&&) noexcept = default;

Plan Plan::make(const Context& ctx, const KernelMap& map, const PlanOptions& options) {
  validate_plan(ctx, map, options);
  auto state = std::make_unique<State>();
  state->map = &map;
  state->options = options;
  return Plan(std::move(state));
}

Problem Plan::problem(const Context& ctx, Pass pass) const {
  validate_enumerator(pass, Pass::grad_weight, "the pass");
  const KernelMap& map = *state_->map;
  const bool backward = pass == Pass::grad_input;
  Problem problem;
  problem.pass = pass;
  problem.dtype = state_->options.dtype;
  problem.precision = state_->options.precision;
  problem.operation = state_->options.operation;
  problem.geometry = map.geometry;
  problem.c_in = state_->options.c_in;
  problem.c_out = state_->options.c_out;
  problem.n_in = backward ? map.n_out : map.n_in;
  problem.n_out = backward ? map.n_in : map.n_out;
  // A device's pairs are not known to the host, and are not worth waiting for.
  if (!on_device(ctx)) problem.pairs = map.pairs(ctx);
  problem.place(ctx);
  return problem;
}

const Kernel& Plan::kernel(const Context& ctx, Pass pass) {
  return state_->kernel(ctx, problem(ctx, pass));
}

int64_t Plan::workspace_bytes(Pass pass) const {
  validate_enumerator(pass, Pass::grad_weight, "the pass");
  return state_->workspace_bytes[static_cast<size_t>(pass)];
}

namespace {

// On the context's device.
void launch(const Kernel& picked, const Context& ctx, Pass pass, const ConvArgs& args) {
  std::optional<cuda::DeviceGuard> guard;
  if (on_device(ctx)) guard.emplace(ctx.device);
  picked.launch(picked, ctx, pass, args);
}

}  // namespace

void Plan::forward(const Context& ctx,
                   const MatrixRef& x,
                   const WeightsRef& w,
                   const Epilogue& epilogue,
                   const MatrixRef& y) {
  const auto& [bias, residual, relu] = epilogue;
  const KernelMap& map = *state_->map;
  const PlanOptions& options = state_->options;
  validate_matrix(ctx, x, {"x", map.n_in, options.c_in, options.dtype});
  validate_weights(ctx, w, map, options);
  if (bias) validate_matrix(ctx, *bias, {"the bias", 1, options.c_out, options.dtype});
  if (residual) {
    validate_matrix(ctx, *residual, {"the residual", map.n_out, options.c_out, options.dtype});
  }
  validate_matrix(ctx, y, {"y", map.n_out, options.c_out, options.dtype});
  const Memory result = memory_of(y, "y");
  validate_apart(result, memory_of(x, "x"));
  validate_apart(result, memory_of(w, "the weights"));
  if (bias) validate_apart(result, memory_of(*bias, "the bias"));
  if (residual) validate_apart(result, memory_of(*residual, "the residual"));
  if (y.rows == 0) return;
  const Problem asked = problem(ctx, Pass::forward);
  const Kernel& picked = state_->kernel(ctx, asked);
  const Schedule& schedule = state_->schedule(ctx, map, asked);
  const Metered metered(ctx, &state_->workspace_bytes[0]);
  launch(picked, metered.context(), Pass::forward,
         {.schedule = &schedule,
          .map = &map,
          .x = x,
          .w = w,
          .bias = bias ? bias->data : nullptr,
          .residual = residual.value_or(MatrixRef{}),
          .relu = relu,
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
  const Problem asked = problem(ctx, Pass::grad_input);
  const Kernel& picked = state_->kernel(ctx, asked);
  const KernelMap& backward = state_->backward_map(ctx);
  const Schedule& schedule = state_->schedule(ctx, backward, asked);
  const Metered metered(ctx, &state_->workspace_bytes[1]);
  const Context& within = metered.context();
  Matrix merged;
  if (!map.out_first.empty()) {
    merged = run(within, cuda::merge_repeated, cpu::merge_repeated, dy, map.out_first);
  }
  launch(picked, within, Pass::grad_input,
         {.schedule = &schedule,
          .map = &backward,
          .x = map.out_first.empty() ? dy : static_cast<const MatrixRef&>(merged),
          .w = seen_transposed(w),
          .y = dx,
          .mirror_taps = map.symmetric});
  if (map.in_first.empty()) return;
  run(within, cuda::zero_repeated, cpu::zero_repeated, dx, map.in_first);
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
  if (map.n_out == 0 || map.n_in == 0) {
    return run(ctx, cuda::fill_zero, cpu::fill_zero, dw);
  }
  const Problem asked = problem(ctx, Pass::grad_weight);
  const Kernel& picked = state_->kernel(ctx, asked);
  const Schedule& schedule = state_->schedule(ctx, map, asked);
  const Metered metered(ctx, &state_->workspace_bytes[2]);
  launch(picked, metered.context(), Pass::grad_weight,
         {.schedule = &schedule, .map = &map, .x = x, .w = dw, .y = dy});
}

bool is_capturing(const Context& ctx) { return on_device(ctx) && cuda::is_capturing(ctx); }

void grad_bias(const Context& ctx, const MatrixRef& dy, const MatrixRef& db) {
  validate_matrix(ctx, dy, {"dy", dy.rows, dy.cols, float_dtype(dy, "dy")});
  validate_matrix(ctx, db, {"db", 1, dy.cols, float_dtype(db, "db")});
  validate_apart(memory_of(db, "db"), memory_of(dy, "dy"));
  run(ctx, cuda::grad_bias, cpu::grad_bias, dy, db);
}

}  // namespace voxgemm
