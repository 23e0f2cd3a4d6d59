// SPDX-License-Identifier: Apache-2.0
#include "conv/kernel.h"

#include <string_view>
#include <unordered_map>

#include "voxgemm/choose.h"

namespace voxgemm {

const std::vector<Kernel>& registry(DeviceKind kind) {
  static const std::vector<Kernel> of_cpu = cpu::kernels();
  static const std::vector<Kernel> of_cuda = cuda::kernels();
  return kind == DeviceKind::cuda ? of_cuda : of_cpu;
}

const Kernel* find_kernel(DeviceKind kind, std::string_view name) {
  using Names = std::unordered_map<std::string_view, const Kernel*>;
  const auto names_of = [](DeviceKind of) {
    Names names;
    for (const Kernel& kernel : registry(of)) names.emplace(kernel.name, &kernel);
    return names;
  };
  static const Names of_cpu = names_of(DeviceKind::cpu);
  static const Names of_cuda = names_of(DeviceKind::cuda);
  const Names& names = kind == DeviceKind::cuda ? of_cuda : of_cpu;
  const auto found = names.find(name);
  return found == names.end() ? nullptr : found->second;
}

std::vector<std::string> kernel_names(DeviceKind kind) {
  std::vector<std::string> names;
  for (const Kernel& kernel : registry(kind)) names.push_back(kernel.name);
  return names;
}

}  // namespace voxgemm
