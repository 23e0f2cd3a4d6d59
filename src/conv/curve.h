// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "core/host_device.h"
#include "voxgemm/serialize.h"

namespace voxgemm {

// Codes of single voxels, and with them what curve_encode() and curve_decode() do with a row.

// CurveOptions for kernels, which std::array is not.
struct CurveRule {
  Curve curve;
  int bits;
  int32_t axes[3];
  int32_t origin[3];

  explicit CurveRule(const CurveOptions& o)
      : curve(o.curve),
        bits(o.bits),
        axes{o.axes[0], o.axes[1], o.axes[2]},
        origin{o.origin[0], o.origin[1], o.origin[2]} {}
};

// Bit i of x becomes bit 3 * i; x has at most 21 bits.
VOXGEMM_HOST_DEVICE inline uint64_t spread_bits(uint64_t x) {
  x = (x | x << 32) & 0x001f00000000ffff;
  x = (x | x << 16) & 0x001f0000ff0000ff;
  x = (x | x << 8) & 0x100f00f00f00f00f;
  x = (x | x << 4) & 0x10c30c30c30c30c3;
  return (x | x << 2) & 0x1249249249249249;
}
VOXGEMM_HOST_DEVICE inline uint32_t gather_bits(uint64_t x) {
  x &= 0x1249249249249249;
  x = (x | x >> 2) & 0x10c30c30c30c30c3;
  x = (x | x >> 4) & 0x100f00f00f00f00f;
  x = (x | x >> 8) & 0x001f0000ff0000ff;
  x = (x | x >> 16) & 0x001f00000000ffff;
  return static_cast<uint32_t>((x | x >> 32) & 0x1fffff);
}

// A voxel's place, axes by falling significance.
struct CurvePoint {
  uint32_t axis[3];

  // The exchange of Skilling's construction at one bit: where axis i has it, the bits below it are
  // flipped on the first axis, else they are swapped between the two.
  VOXGEMM_HOST_DEVICE void exchange(int bit, int i) {
    const uint32_t below = (uint32_t{1} << bit) - 1;
    if ((axis[i] >> bit & 1) != 0) {
      axis[0] ^= below;
      return;
    }
    const uint32_t different = (axis[0] ^ axis[i]) & below;
    axis[0] ^= different;
    axis[i] ^= different;
  }
  VOXGEMM_HOST_DEVICE void to_hilbert(int bits) {
    for (int bit = bits - 1; bit > 0; --bit) {
      for (int i = 0; i < 3; ++i) exchange(bit, i);
    }
    axis[1] ^= axis[0];
    axis[2] ^= axis[1];
    // Bit b: the parity of the last axis's bits above b.
    uint32_t parity = axis[2] >> 1;
    for (int shift = 1; shift < 32; shift *= 2) parity ^= parity >> shift;
    for (uint32_t& value : axis) value ^= parity;
  }
  VOXGEMM_HOST_DEVICE void from_hilbert(int bits) {
    const uint32_t carry = axis[2] >> 1;
    axis[2] ^= axis[1];
    axis[1] ^= axis[0];
    axis[0] ^= carry;
    for (int bit = 1; bit < bits; ++bit) {
      for (int i = 2; i >= 0; --i) exchange(bit, i);
    }
  }
};

VOXGEMM_HOST_DEVICE inline uint64_t curve_code(const CurveRule& rule, const int32_t* voxel) {
  const int bits = rule.bits;
  const uint32_t mask = (uint32_t{1} << bits) - 1;
  const int32_t place[3] = {voxel[1], voxel[2], voxel[3]};
  CurvePoint point;
  for (int i = 0; i < 3; ++i) {
    point.axis[i] = (static_cast<uint32_t>(place[rule.axes[i]]) -
                     static_cast<uint32_t>(rule.origin[rule.axes[i]])) &
                    mask;
  }
  // Two shifts: one by 64 bits would be undefined.
  const uint64_t batch = static_cast<uint64_t>(static_cast<uint32_t>(voxel[0])) << bits << 2 * bits;
  if (rule.curve == Curve::rows) {
    return batch | (uint64_t{point.axis[0]} << bits | point.axis[1]) << bits | point.axis[2];
  }
  if (rule.curve == Curve::hilbert) point.to_hilbert(bits);
  return batch | spread_bits(point.axis[0]) << 2 | spread_bits(point.axis[1]) << 1 |
         spread_bits(point.axis[2]);
}

VOXGEMM_HOST_DEVICE inline void curve_voxel(const CurveRule& rule, uint64_t code, int32_t* voxel) {
  const int bits = rule.bits;
  const uint32_t mask = (uint32_t{1} << bits) - 1;
  const uint64_t batch = code >> bits >> 2 * bits;
  const uint64_t place = code & ((uint64_t{1} << 3 * bits) - 1);
  CurvePoint point;
  if (rule.curve == Curve::rows) {
    for (int i = 0; i < 3; ++i) {
      point.axis[i] = static_cast<uint32_t>(place >> (2 - i) * bits) & mask;
    }
  } else {
    for (int i = 0; i < 3; ++i) point.axis[i] = gather_bits(place >> (2 - i));
    if (rule.curve == Curve::hilbert) point.from_hilbert(bits);
  }
  voxel[0] = static_cast<int32_t>(batch);
  for (int i = 0; i < 3; ++i) {
    voxel[1 + rule.axes[i]] =
        static_cast<int32_t>(point.axis[i] + static_cast<uint32_t>(rule.origin[rule.axes[i]]));
  }
}

template <class Key>
struct CurveEncoder {
  const int32_t* coords;  // [rows, 4]
  CurveRule rule;
  Key* codes;  // [rows]

  VOXGEMM_HOST_DEVICE void operator()(int64_t row) const {
    codes[row] = static_cast<Key>(curve_code(rule, coords + 4 * row));
  }
};

template <class Key>
struct CurveDecoder {
  const Key* codes;  // [rows]
  CurveRule rule;
  int32_t* coords;  // [rows, 4]

  VOXGEMM_HOST_DEVICE void operator()(int64_t row) const {
    curve_voxel(rule, codes[row], coords + 4 * row);
  }
};

}  // namespace voxgemm
