// SPDX-License-Identifier: Apache-2.0
#include "ops.h"

namespace voxgemm {
namespace {

Context cuda_context_of(const Device& device) {
  Context ctx;
  ctx.device = device;
  check(aoti_torch_get_current_cuda_stream(device.index, &ctx.stream) == AOTI_TORCH_SUCCESS,
        ErrorCode::device, "torch has no current stream on cuda:", device.index);
  ctx.run = [](int workers, const std::function<void(int)>& body) {
    for (int worker = 0; worker < workers; ++worker) body(worker);
  };
  ctx.allocate = torch_memory(device);
  ctx.allocate_matrix = torch_matrices(device);
  return ctx;
}

Tensor cuda_info(bool has_device) {
  if (!has_device) return info(DeviceKind::cuda, nullptr);
  const Context ctx = cuda_context_of({DeviceKind::cuda, 0});
  return info(DeviceKind::cuda, &ctx);
}

}  // namespace

// The caller's current stream.
Context context_of(const Tensor& tensor) { return cuda_context_of(device_of(tensor)); }

STABLE_TORCH_LIBRARY_IMPL(voxgemm, CUDA, m) {
  add_operators(m);
  add_choice_operators(m);
  add_voxel_operators(m);
}

STABLE_TORCH_LIBRARY_IMPL(voxgemm, CompositeExplicitAutograd, m) {
  m.impl("_cuda_info", TORCH_BOX(&Guarded<&cuda_info>::call));
}

}  // namespace voxgemm
