// SPDX-License-Identifier: Apache-2.0
#include "voxgemm/geometry.h"

#include <algorithm>
#include <limits>

#include "voxgemm/error.h"

namespace voxgemm {
namespace {

constexpr int64_t int32_max = std::numeric_limits<int32_t>::max();
constexpr int64_t max_taps = 4096;

// "3" where the axes agree, else "3x1x3".
std::string axes_text(const Int3& values) {
  if (values[0] == values[1] && values[0] == values[2]) return join(values[0]);
  return join(values[0], "x", values[1], "x", values[2]);
}

}  // namespace

Geometry Geometry::submanifold(Int3 size, Int3 dilation) {
  Geometry geometry{.size = size, .dilation = dilation};
  for (int axis = 0; axis < 3; ++axis) {
    const int64_t padding = static_cast<int64_t>(size[axis] / 2) * dilation[axis];
    check(padding <= int32_max, "kernel size ", size[axis], " with dilation ", dilation[axis],
          " needs a padding of ", padding, ", expected at most ", int32_max);
    geometry.padding[axis] = static_cast<int32_t>(padding);
  }
  geometry.validate();
  return geometry;
}

bool Geometry::mirrors() const {
  for (int axis = 0; axis < 3; ++axis) {
    if (stride[axis] != 1 || size[axis] % 2 == 0) return false;
    if (offset(axis, size[axis] / 2) != 0) return false;
  }
  return true;
}

Int3 Geometry::out_shape(const Int3& in_shape) const {
  validate();
  Int3 shape{};
  for (int axis = 0; axis < 3; ++axis) {
    const int64_t reach = static_cast<int64_t>(size[axis] - 1) * dilation[axis] + 1;
    const int64_t room = in_shape[axis] + 2 * static_cast<int64_t>(padding[axis]) - reach;
    const int64_t extent = room < 0 ? 0 : room / stride[axis] + 1;
    check(extent <= int32_max, "the output shape is ", extent, " on axis ", axis,
          ", expected at most ", int32_max);
    shape[axis] = static_cast<int32_t>(extent);
  }
  return shape;
}

std::string Geometry::text() const {
  std::string text = axes_text(size);
  if (stride != Int3{1, 1, 1}) text += join('s', axes_text(stride));
  if (padding != Int3{0, 0, 0}) text += join('p', axes_text(padding));
  if (dilation != Int3{1, 1, 1}) text += join('d', axes_text(dilation));
  return text;
}

void Geometry::validate() const {
  int64_t taps = 1;
  for (int axis = 0; axis < 3; ++axis) {
    check(size[axis] >= 1, "kernel size is ", size[axis], " on axis ", axis,
          ", expected 1 or more");
    check(stride[axis] >= 1, "stride is ", stride[axis], " on axis ", axis, ", expected 1 or more");
    check(padding[axis] >= 0, "padding is ", padding[axis], " on axis ", axis,
          ", expected 0 or more");
    check(dilation[axis] >= 1, "dilation is ", dilation[axis], " on axis ", axis,
          ", expected 1 or more");
    // Saturates, so that three large sizes do not overflow.
    taps = std::min<int64_t>(taps * size[axis], max_taps + 1);
  }
  check(taps <= max_taps, "the kernel ", axes_text(size), " has more than ", max_taps, " taps");
}

}  // namespace voxgemm
