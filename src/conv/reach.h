// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <bit>
#include <cstdint>

#include "core/host_device.h"
#include "voxgemm/coords.h"

namespace voxgemm {

// The outputs of an input on one axis: (in + padding - tap * dilation) / stride where that is
// whole, of those in [least, most].
struct AxisReach {
  int64_t padding = 0;
  int64_t stride = 1;
  int64_t dilation = 1;
  int taps = 1;
  int shift = 0;  // of the stride, where that is a power of two, else -1
  int64_t least = INT64_MIN;
  int64_t most = INT64_MAX;
  // What the next tap's output is behind this one's: dilation / stride.
  int64_t whole_step = 1;
  int64_t rest_of_step = 0;

  // Divided by the stride, rounded down. A division takes a GPU some hundred instructions.
  VOXGEMM_HOST_DEVICE int64_t divided(int64_t place) const {
    if (shift >= 0) return place >> shift;
    const int64_t quotient = place / stride;
    return quotient - (quotient * stride > place ? 1 : 0);
  }
  // Of the first tap, where that is whole.
  VOXGEMM_HOST_DEVICE int64_t first(int64_t in) const { return divided(in + padding); }
  VOXGEMM_HOST_DEVICE bool holds(int64_t out) const { return out >= least && out <= most; }
  // The ends of what the inputs between two ends may reach.
  VOXGEMM_HOST_DEVICE int64_t low(int64_t in) const {
    const int64_t first = -divided((taps - 1) * dilation - padding - in);
    return first > least ? first : least;
  }
  VOXGEMM_HOST_DEVICE int64_t high(int64_t in) const {
    const int64_t last = first(in);
    return last < most ? last : most;
  }
};

// One input's on one axis. The division is once an input, not where axes are combined.
struct AxisWalk {
  const AxisReach& axis;
  int64_t out;   // of the first tap
  int64_t rest;  // of the division

  VOXGEMM_HOST_DEVICE AxisWalk(const AxisReach& reach, int32_t in)
      : axis(reach), out(reach.first(in)), rest(in + reach.padding - out * reach.stride) {}
  // Calls emit(output).
  template <class Emit>
  VOXGEMM_HOST_DEVICE void operator()(const Emit& emit) const {
    AxisWalk at = *this;
    for (int tap = 0; tap < axis.taps; ++tap) {
      if (at.rest == 0 && axis.holds(at.out)) emit(at.out);
      at.out -= axis.whole_step;
      at.rest -= axis.rest_of_step;
      if (at.rest >= 0) continue;
      at.rest += axis.stride;
      --at.out;
    }
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
      const auto stride = static_cast<unsigned>(g.stride[i]);
      const int shift = std::has_single_bit(stride) ? std::countr_zero(stride) : -1;
      axes[i] = {g.padding[i], g.stride[i], g.dilation[i], g.size[i], shift};
      axes[i].whole_step = g.dilation[i] / g.stride[i];
      axes[i].rest_of_step = g.dilation[i] % g.stride[i];
      if (!options.spatial_shape || floor) continue;
      axes[i].least = 0;
      axes[i].most = g.out_shape(*options.spatial_shape)[i] - 1;
    }
  }
  // Calls emit(x, y, z) for every output of an input; is_single: as `single` is.
  template <bool is_single, class Emit>
  VOXGEMM_HOST_DEVICE void walk(const Emit& emit, int32_t in_x, int32_t in_y, int32_t in_z) const {
    if constexpr (is_single) {
      const int64_t x = axes[0].first(in_x);
      const int64_t y = axes[1].first(in_y);
      const int64_t z = axes[2].first(in_z);
      if (axes[0].holds(x) && axes[1].holds(y) && axes[2].holds(z)) emit(x, y, z);
    } else {
      const AxisWalk at[3] = {{axes[0], in_x}, {axes[1], in_y}, {axes[2], in_z}};
      at[0](
          [&](int64_t x) { at[1]([&](int64_t y) { at[2]([&](int64_t z) { emit(x, y, z); }); }); });
    }
  }
};

}  // namespace voxgemm
