// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "core/host_device.h"
#include "voxgemm/coords.h"

namespace voxgemm {

VOXGEMM_HOST_DEVICE inline int64_t floor_div(int64_t a, int64_t b) {
  // A division takes a GPU some hundred instructions, and a remainder as many.
  if (b == 1) return a;
  const int64_t quotient = a / b;
  return quotient - (quotient * b > a ? 1 : 0);
}

// The outputs of an input on one axis: (in + padding - tap * dilation) / stride where that is
// whole, of those in [least, most].
struct AxisReach {
  int64_t padding = 0;
  int64_t stride = 1;
  int64_t dilation = 1;
  int taps = 1;
  int64_t least = INT64_MIN;
  int64_t most = INT64_MAX;
  // What the next tap's output is behind this one's: dilation / stride.
  int64_t whole_step = 1;
  int64_t rest_of_step = 0;

  // The ends of what the inputs between two ends may reach.
  VOXGEMM_HOST_DEVICE int64_t low(int64_t in) const {
    const int64_t first = -floor_div((taps - 1) * dilation - padding - in, stride);
    return first > least ? first : least;
  }
  VOXGEMM_HOST_DEVICE int64_t high(int64_t in) const {
    const int64_t last = floor_div(in + padding, stride);
    return last < most ? last : most;
  }
};

// As it stands: every input reaches the output at its own place.
struct Reach {
  AxisReach axes[3];
  // Of its taps every input meets one output, floor((in + padding) / stride): the taps lie side by
  // side and are as many as the stride.
  bool single = true;

  Reach() = default;
  Reach(Geometry g, const OutputOptions& options) {
    const bool floor = options.rule == OutputRule::floor;
    // floor(in / stride) is what a kernel as large as its stride reaches.
    if (floor) g = {.size = g.stride, .stride = g.stride};
    single = g.size == g.stride && g.dilation == Int3{1, 1, 1};
    for (int i = 0; i < 3; ++i) {
      axes[i] = {g.padding[i], g.stride[i], g.dilation[i], g.size[i]};
      axes[i].whole_step = g.dilation[i] / g.stride[i];
      axes[i].rest_of_step = g.dilation[i] % g.stride[i];
      if (!options.spatial_shape || floor) continue;
      axes[i].least = 0;
      axes[i].most = g.out_shape(*options.spatial_shape)[i] - 1;
    }
  }
};

}  // namespace voxgemm
