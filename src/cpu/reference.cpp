// SPDX-License-Identifier: Apache-2.0
#include "cpu/reference.h"

#include <vector>

#include "core/dispatch.h"

namespace voxgemm::cpu {
namespace {

int32_t neighbour(const ConvArgs& args, int tap, int64_t out) {
  return args.map->neighbours.row<int32_t>(tap)[out];
}

template <class T>
void convolve(const Context& ctx, const ConvArgs& args) {
  // A task is 64 rows: enough work to share, small enough for small clouds.
  constexpr int64_t rows_per_task = 64;
  const WeightsRef& w = args.w;
  const auto* weights = static_cast<const T*>(w.data);
  const auto* bias = static_cast<const T*>(args.bias);
  const int64_t rows = args.y.rows;
  parallel_for(ctx, (rows + rows_per_task - 1) / rows_per_task, [&](int64_t task, int) {
    std::vector<double> sums(w.c_out);
    const int64_t end = std::min(rows, (task + 1) * rows_per_task);
    for (int64_t out = task * rows_per_task; out < end; ++out) {
      sums.assign(w.c_out, 0.0);
      for (int tap = 0; tap < w.taps; ++tap) {
        const int32_t in = neighbour(args, tap, out);
        if (in < 0) continue;
        const T* x = args.x.row<const T>(in);
        const T* matrix = weights + (args.mirror_taps ? w.taps - 1 - tap : tap) * w.tap_stride;
        for (int k = 0; k < w.c_in; ++k) {
          const double factor = to_float(x[k]);
          const T* row = matrix + k * w.in_stride;
          for (int n = 0; n < w.c_out; ++n) sums[n] += factor * to_float(row[n * w.out_stride]);
        }
      }
      T* y = args.y.row<T>(out);
      const T* residual = args.residual.data != nullptr ? args.residual.row<const T>(out) : nullptr;
      for (int n = 0; n < w.c_out; ++n) {
        if (bias != nullptr) sums[n] += to_float(bias[n]);
        if (residual != nullptr) sums[n] += to_float(residual[n]);
        store(args.relu && sums[n] < 0 ? 0.0 : sums[n], y[n]);
      }
    }
  });
}

template <class T, class Result>
void weight_gradient(const Context& ctx, const ConvArgs& args) {
  const WeightsRef& dw = args.w;
  parallel_for(ctx, dw.taps, [&](int64_t tap, int) {
    std::vector<double> sums(static_cast<size_t>(dw.c_in) * dw.c_out, 0.0);
    for (int64_t out = 0; out < args.y.rows; ++out) {
      const int32_t in = neighbour(args, static_cast<int>(tap), out);
      if (in < 0) continue;
      const T* x = args.x.row<const T>(in);
      const T* dy = args.y.row<const T>(out);
      for (int k = 0; k < dw.c_in; ++k) {
        const double factor = to_float(x[k]);
        for (int n = 0; n < dw.c_out; ++n) {
          sums[static_cast<size_t>(k) * dw.c_out + n] += factor * to_float(dy[n]);
        }
      }
    }
    auto* result = static_cast<Result*>(dw.data) + tap * dw.tap_stride;
    for (int k = 0; k < dw.c_in; ++k) {
      for (int n = 0; n < dw.c_out; ++n) {
        store(sums[static_cast<size_t>(k) * dw.c_out + n],
              result[k * dw.in_stride + n * dw.out_stride]);
      }
    }
  });
}

void launch(const Kernel&, const Context& ctx, Pass pass, const ConvArgs& args) {
  dispatch_float(args.x.dtype, [&]<class T>(Type<T>) {
    if (pass != Pass::grad_weight) return convolve<T>(ctx, args);
    dispatch_float(args.w.dtype,
                   [&]<class Result>(Type<Result>) { weight_gradient<T, Result>(ctx, args); });
  });
}

// Three loops of scalar double sums: about 1 GFLOP/s a thread.
double cost(const Kernel&, const Problem& problem) {
  return problem.useful_flops() / (1e9 * problem.threads);
}

ScheduleOptions schedule(const Kernel&, const Problem&) { return {}; }

}  // namespace

Kernel reference_kernel() {
  return {.name = "reference_cpu",
          .reference = true,
          .cost = cost,
          .schedule = schedule,
          .launch = launch};
}

}  // namespace voxgemm::cpu
