// SPDX-License-Identifier: Apache-2.0
#include "conv/correction.h"

#include <algorithm>
#include <charconv>
#include <cmath>

#include "conv/machines.h"

namespace voxgemm {
namespace {

double doublings(double count, double reference, double most) {
  return std::clamp(std::log2(std::max(count, 1.0) / reference), -most, most);
}

std::string_view take_word(std::string_view* line) {
  const size_t end = std::min(line->find(' '), line->size());
  const std::string_view word = line->substr(0, end);
  line->remove_prefix(std::min(end + 1, line->size()));
  return word;
}

bool read_number(std::string_view word, double* number) {
  return std::from_chars(word.data(), word.data() + word.size(), *number).ec == std::errc{};
}

}  // namespace

Correction sizes_for_correction(const Problem& problem) {
  const bool backward = problem.pass == Pass::grad_input;
  const double rows = doublings(static_cast<double>(problem.n_out), 32768, 7);
  const double in = doublings(backward ? problem.c_out : problem.c_in, 64, 4);
  const double out = doublings(backward ? problem.c_in : problem.c_out, 64, 4);
  const double taps = doublings(problem.geometry.taps(), 27, 5);
  return {1, rows, std::abs(rows), in, std::abs(in), out, std::abs(out), taps};
}

Corrections read_corrections(std::string_view lines, DeviceKind kind) {
  const std::vector<Kernel>& rows = registry(kind);
  Corrections all;
  all.fill(std::vector<Correction>(rows.size(), Correction{}));
  while (!lines.empty()) {
    const size_t end = std::min(lines.find('\n'), lines.size());
    std::string_view line = lines.substr(0, end);
    lines.remove_prefix(std::min(end + 1, lines.size()));
    const std::string_view pass = take_word(&line);
    const Kernel* kernel = find_kernel(kind, take_word(&line));
    Correction numbers = {};
    bool whole = true;
    for (double& number : numbers) whole = whole && read_number(take_word(&line), &number);
    if (!whole || kernel == nullptr) continue;
    const auto row = static_cast<size_t>(kernel - rows.data());
    for (const Pass of : {Pass::forward, Pass::grad_input, Pass::grad_weight}) {
      if (pass == name(of) || (pass == name(Pass::forward) && of == Pass::grad_input)) {
        all[static_cast<size_t>(of)][row] = numbers;
      }
    }
  }
  return all;
}

const Correction& shipped_correction(const Kernel& kernel, const Problem& problem) {
  static const Correction none = {};
  const DeviceKind kind = problem.device.kind;
  if (kind == DeviceKind::cpu || problem.architecture / 10 != 9) return none;
  static const Corrections of_hopper = read_corrections(machines::hopper, kind);
  const auto row = static_cast<size_t>(&kernel - registry(kind).data());
  return of_hopper[static_cast<size_t>(problem.pass)][row];
}

}  // namespace voxgemm
