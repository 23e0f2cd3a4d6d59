// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <string_view>

#include "conv/kernel.h"

namespace voxgemm {

// Measured over predicted seconds of a kernel as a power law of a problem's sizes:
//   2^(c[0] + c[1] x[1] + c[2] x[2] + ...), x of sizes_for_correction().
// It mends what a cost model's formula does not say, smoothly, and no more than that: sizes beyond
// those that were measured count as the last measured one.
constexpr int correction_terms = 8;
using Correction = std::array<double, correction_terms>;

Correction sizes_for_correction(const Problem& problem);

// The corrections that come with the library: the lines of src/conv/machines, which bench/choice.py
// fits to the times of one machine, an H200; they are used on all GPUs of compute capability 9.x.
// All zero elsewhere, and for a kernel without a line.
const Correction& shipped_correction(const Kernel& kernel, const Problem& problem);

// By pass and row of the registry. A line is a pass (forward is also grad_input), a kernel's name
// and the numbers; other lines are skipped.
using Corrections = std::array<std::vector<Correction>, 3>;
Corrections read_corrections(std::string_view lines, DeviceKind kind);

}  // namespace voxgemm
