// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <functional>
#include <memory>
#include <optional>

#include "voxgemm/choose.h"
#include "voxgemm/schedule.h"

namespace voxgemm {

struct Kernel;

struct PlanOptions {
  int c_in = 0;
  int c_out = 0;
  Dtype dtype = Dtype::f32;
  Operation operation = Operation::submanifold;
  Precision precision = Precision::ieee;  // of f32
  Filters filters = environment_filters();
  // Measure what is not known when a pass first runs (tune.h); else the cost models choose.
  bool tune_at_first_use = tunes_at_first_use();
  // What the caller has, else made when needed: the transposed map, and by pass a schedule of the
  // map (for grad_input of the transposed one unless the map is symmetric), used if it is cut as
  // the kernel asks. They must outlive the plan.
  const KernelMap* transposed = nullptr;
  std::array<const Schedule*, 3> schedules = {};
  // Makes the schedules that are none of those: Schedule::build, or what keeps them.
  std::function<Schedule(const Context&, const KernelMap&, const ScheduleOptions&)> build_schedule =
      Schedule::build;
};

// What is done to the sums of a forward pass before they are rounded and written once.
struct Epilogue {
  std::optional<MatrixRef> bias = {};      // [1, c_out] of the plan's dtype
  std::optional<MatrixRef> residual = {};  // [n_out, c_out] of the plan's dtype; not y itself
  bool relu = false;                       // max(0, .) of all this; NaN stays NaN
};

// A map with channels and dtype: one kernel and one schedule per pass, chosen when first needed.
// Cheap to make. The map must outlive the plan. Matrices of every pass: features [n, channels] with
// the plan's dtype and contiguous columns; weights with the same dtype; no output may overlap an
// input. Bad arguments throw before anything is written. Maps without rows give outputs without
// rows and zero gradients. A plan is for one thread at a time; several plans may share a map and a
// context. One that was moved from may only be destroyed or assigned to.
class VOXGEMM_EXPORT Plan {
 public:
  static Plan make(const Context& ctx, const KernelMap& map, const PlanOptions& options);
  ~Plan();
  Plan(Plan&&) noexcept;
  Plan& operator=(Plan&&) noexcept;

  // y [n_out, c_out] = relu(conv(x [n_in, c_in], w) + bias + residual), of the last three what the
  // epilogue has.
  void forward(const Context& ctx,
               const MatrixRef& x,
               const WeightsRef& w,
               const Epilogue& epilogue,
               const MatrixRef& y);
  // dx [n_in, c_in], the exact adjoint of forward: repeated voxels included, whose rows of dy are
  // added up and rounded to dy's dtype first.
  void grad_input(const Context& ctx,
                  const MatrixRef& dy,
                  const WeightsRef& w,
                  const MatrixRef& dx);
  // dw [taps, c_in, c_out]: any strides under which no two elements coincide; dtype the plan's, or
  // f32 for f16 and bf16. Sums are f32 (f64 for f64).
  void grad_weight(const Context& ctx,
                   const MatrixRef& x,
                   const MatrixRef& dy,
                   const WeightsRef& dw);

  // The kernel that a pass runs.
  const Kernel& kernel(const Context& ctx, Pass pass);
  Problem problem(const Context& ctx, Pass pass) const;
  // The most bytes of the context's memory that a pass held at once when it last ran, all of which
  // it gave back: 0 before. Maps and schedules, which a plan keeps, are not among them.
  int64_t workspace_bytes(Pass pass) const;

  struct State;

 private:
  explicit Plan(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

// Whether the work of a CUDA context goes into a graph instead of running.
VOXGEMM_EXPORT bool is_capturing(const Context& ctx);

// db [1, channels] = sum of the rows of dy [rows, channels], in double, in an order that does not
// depend on threads; 0 without rows. Each has any float dtype; they do not overlap.
VOXGEMM_EXPORT void grad_bias(const Context& ctx, const MatrixRef& dy, const MatrixRef& db);

}  // namespace voxgemm
