// SPDX-License-Identifier: Apache-2.0
#include "ops.h"

#include <tuple>

namespace voxgemm {

// As many threads as torch has and on its CPUs: torch's own, while these come at once.
Context context_of(const Tensor&) {
  const auto on_torchs = [](int workers, const std::function<void(int)>& body) {
    torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
      for (int64_t worker = begin; worker < end; ++worker) body(static_cast<int>(worker));
    });
  };
  Context ctx = Context::shared(static_cast<int>(torch::stable::get_num_threads()), on_torchs);
  ctx.allocate = torch_memory({});
  ctx.allocate_matrix = torch_matrices({});
  return ctx;
}

namespace {

std::tuple<Tensor, Tensor> parse_problem(const Tensor& text) {
  const Problem problem = Problem::parse(text_of(text));
  Ints numbers = {static_cast<int64_t>(problem.pass), static_cast<int64_t>(problem.dtype),
                  static_cast<int64_t>(problem.precision), static_cast<int64_t>(problem.operation)};
  const Geometry& geometry = problem.geometry;
  for (const Int3& values : {geometry.size, geometry.stride, geometry.padding, geometry.dilation}) {
    numbers.insert(numbers.end(), values.begin(), values.end());
  }
  numbers.insert(numbers.end(), {problem.c_in, problem.c_out});
  const Tensor result = empty_tensor({}, {static_cast<int64_t>(numbers.size())}, ScalarType::Long);
  std::copy(numbers.begin(), numbers.end(), static_cast<int64_t*>(result.mutable_data_ptr()));
  return {result, text_tensor(problem.cloud)};
}

Tensor cpu_info() {
  const Context ctx = Context::cpu(1);
  return info(DeviceKind::cpu, &ctx);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(voxgemm, CPU, m) {
  add_operators(m);
  add_choice_operators(m);
  add_voxel_operators(m);
  m.impl("_parse_problem", TORCH_BOX(&Guarded<&parse_problem>::call));
}

STABLE_TORCH_LIBRARY_IMPL(voxgemm, CompositeExplicitAutograd, m) {
  add_times_operators(m);
  m.impl("_info", TORCH_BOX(&Guarded<&cpu_info>::call));
}

}  // namespace voxgemm
