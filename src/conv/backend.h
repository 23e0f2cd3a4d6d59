// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "voxgemm/context.h"

// How src/conv calls one backend or the other.
namespace voxgemm {
namespace cuda {

// Makes a device the current one of this host thread until the guard's end.
class DeviceGuard {
 public:
  explicit DeviceGuard(const Device& device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

}  // namespace cuda

inline bool on_device(const Context& ctx) { return ctx.device.kind == DeviceKind::cuda; }

// Calls the context's backend; on CUDA the context's device is the current one meanwhile.
template <class Result, class... Parameters, class... Arguments>
Result run(const Context& ctx,
           Result (*on_cuda)(const Context&, Parameters...),
           Result (*on_cpu)(const Context&, Parameters...),
           const Arguments&... arguments) {
  if (!on_device(ctx)) return on_cpu(ctx, arguments...);
  const cuda::DeviceGuard guard(ctx.device);
  return on_cuda(ctx, arguments...);
}

}  // namespace voxgemm
