// SPDX-License-Identifier: Apache-2.0
#include "conv/correction.h"

#include <algorithm>
#include <cmath>
#include <sstream>

#include "conv/machines.h"

namespace voxgemm {
namespace {

double doublings(double count, double reference, double most) {
  return std::clamp(std::log2(std::max(count, 1.0) / reference), -most, most);
}

}  // namespace

Correction sizes_for_correction(const Problem& problem) {
  const bool backward = problem.pass == Pass::grad_input;
  const double rows = doublings(static_cast<double>(problem.n_out), 32768, 7);
  return {1,
          rows,
          std::abs(rows),
          doublings(backward ? problem.c_out : problem.c_in, 64, 4),
          doublings(backward ? problem.c_in : problem.c_out, 64, 4),
          doublings(problem.geometry.taps(), 27, 5)};
}

Corrections read_corrections(std::string_view lines, DeviceKind kind) {
  const std::vector<Kernel>& rows = registry(kind);
  Corrections all;
  all.fill(std::vector<Correction>(rows.size(), Correction{}));
  std::istringstream text{std::string(lines)};
  for (std::string line; std::getline(text, line);) {
    std::istringstream words(line);
    std::string pass;
    std::string name;
    Correction numbers = {};
    words >> pass >> name;
    for (double& number : numbers) words >> number;
    const Kernel* kernel = find_kernel(kind, name);
    if (!words || kernel == nullptr || (pass != "forward" && pass != "grad_weight")) continue;
    const auto row = static_cast<size_t>(kernel - rows.data());
    const bool forward = pass == "forward";
    all[static_cast<size_t>(forward ? Pass::forward : Pass::grad_weight)][row] = numbers;
    if (forward) all[static_cast<size_t>(Pass::grad_input)][row] = numbers;
  }
  return all;
}

const Correction& shipped_correction(const Kernel& kernel, const Problem& problem) {
  static const Correction none = {};
  const DeviceKind kind = problem.device.kind;
  const auto row = static_cast<size_t>(&kernel - registry(kind).data());
  if (kind == DeviceKind::cpu) {
    static const Corrections of_cpus = read_corrections(machines::cpu, kind);
    return of_cpus[static_cast<size_t>(problem.pass)][row];
  }
  if (problem.architecture / 10 != 9) return none;
  static const Corrections of_hopper = read_corrections(machines::hopper, kind);
  return of_hopper[static_cast<size_t>(problem.pass)][row];
}

}  // namespace voxgemm
