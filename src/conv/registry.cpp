// SPDX-License-Identifier: Apache-2.0
#include "conv/kernel.h"

#include <string_view>
#include <unordered_map>

#include "conv/validate.h"
#include "voxgemm/choose.h"
#include "voxgemm/error.h"

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

namespace {

bool takes_operands(const Kernel& kernel, const Problem& problem) {
  if (kernel.dtype && *kernel.dtype != problem.dtype) return false;
  return problem.dtype != Dtype::f32 || !kernel.precision || *kernel.precision == problem.precision;
}

bool computes(const Kernel& kernel, Pass pass) {
  if (kernel.passes == Passes::all) return true;
  return (pass == Pass::grad_weight) == (kernel.passes == Passes::weight_gradient);
}

std::string limits_of(const Kernel& kernel, const Problem& problem) {
  if (!kernel.unavailable.empty() || kernel.limits == nullptr) return kernel.unavailable;
  return kernel.limits(kernel, problem);
}

}  // namespace

bool can_run(const Kernel& kernel, const Problem& problem) {
  return takes_operands(kernel, problem) && computes(kernel, problem.pass) &&
         limits_of(kernel, problem).empty();
}

std::string why_not(const Kernel& kernel, const Problem& problem) {
  if (!takes_operands(kernel, problem)) {
    const bool split = kernel.precision && *kernel.precision != Precision::ieee;
    return join("takes ", split ? name(*kernel.precision) : name(*kernel.dtype));
  }
  if (computes(kernel, problem.pass)) return limits_of(kernel, problem);
  return kernel.passes == Passes::convolutions ? "computes no weight gradient"
                                               : "computes the weight gradient only";
}

std::vector<std::string> kernel_names(DeviceKind kind) {
  validate_enumerator(kind, DeviceKind::cuda, "the kind of device");
  std::vector<std::string> names;
  for (const Kernel& kernel : registry(kind)) names.push_back(kernel.name);
  return names;
}

}  // namespace voxgemm
