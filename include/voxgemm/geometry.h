// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>

#include "voxgemm/types.h"

namespace voxgemm {

using Int3 = std::array<int32_t, 3>;

// Kernel size, stride, padding and dilation per axis (x, y, z), and the one relation between the
// sides of a convolution, per axis:
//   in = out * stride - padding + tap * dilation,   0 <= tap < size.
// Tap indices are (kx * size_y + ky) * size_z + kz.
struct VOXGEMM_EXPORT Geometry {
  Int3 size = {3, 3, 3};
  Int3 stride = {1, 1, 1};
  Int3 padding = {0, 0, 0};
  Int3 dilation = {1, 1, 1};
  bool operator==(const Geometry&) const = default;

  // Stride 1 and the padding under which tap size/2 of every axis reads the output's own voxel.
  static Geometry submanifold(Int3 size, Int3 dilation = {1, 1, 1});

  int taps() const { return size[0] * size[1] * size[2]; }
  Int3 tap(int index) const {
    return {index / (size[1] * size[2]), index / size[2] % size[1], index % size[2]};
  }
  // The tap with the opposite offset; only a submanifold geometry of odd sizes has one for every
  // tap.
  int mirrored(int index) const { return taps() - 1 - index; }
  bool mirrors() const;

  // in - out * stride of a tap: the offset that is added to a scaled output coordinate.
  int64_t offset(int axis, int tap_on_axis) const {
    return static_cast<int64_t>(tap_on_axis) * dilation[axis] - padding[axis];
  }
  // Output extent for an input extent, as torch's Conv3d; 0 where the kernel does not fit. Throws
  // as validate() does, and where an extent needs more than 31 bits.
  Int3 out_shape(const Int3& in_shape) const;

  // "3", "3x1x3", "3s2p1", "2s2", "3d2": what differs from the defaults.
  std::string text() const;
  // Throws unless sizes, strides and dilations are >= 1, paddings >= 0 and taps() <= 4096.
  void validate() const;
};

// Which output voxels a strided convolution has.
enum class OutputRule {
  reached,  // every voxel that some input voxel reaches through some tap (torch, spconv, FlexGEMM)
  floor,    // floor(in / stride) (MinkowskiEngine, WarpConvNet)
};

}  // namespace voxgemm
