// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

namespace voxgemm {

// The two 16-bit float formats as bits; conversions round to nearest even and keep NaN and
// infinity.
struct Half {
  uint16_t bits;
};
struct Bfloat16 {
  uint16_t bits;
};

inline float to_float(float value) { return value; }
inline double to_float(double value) { return value; }

inline float to_float(Bfloat16 value) {
  return std::bit_cast<float>(static_cast<uint32_t>(value.bits) << 16);
}

inline float to_float(Half value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000) << 16;
  const uint32_t exponent = (value.bits >> 10) & 0x1f;
  const uint32_t fraction = value.bits & 0x3ff;
  if (exponent == 0x1f) return std::bit_cast<float>(sign | 0x7f800000 | (fraction << 13));
  if (exponent != 0) {
    return std::bit_cast<float>(sign | ((exponent + 112) << 23) | (fraction << 13));
  }
  // Subnormal halves are multiples of 2^-24.
  const float magnitude = std::ldexp(static_cast<float>(fraction), -24);
  return sign != 0 ? -magnitude : magnitude;
}

inline void store(float value, float& out) { out = value; }
inline void store(double value, double& out) { out = value; }
inline void store(double value, float& out) { out = static_cast<float>(value); }

inline void store(float value, Bfloat16& out) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if ((bits & 0x7fffffff) > 0x7f800000) {
    out.bits = static_cast<uint16_t>((bits >> 16) | 0x40);
    return;
  }
  out.bits = static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline void store(float value, Half& out) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t sign = (bits >> 16) & 0x8000;
  const uint32_t magnitude = bits & 0x7fffffff;
  uint32_t half = 0;
  if (magnitude > 0x7f800000) {
    half = 0x7e00;  // NaN
  } else if (magnitude >= 0x477ff000) {
    half = 0x7c00;  // 65520 and above round to infinity
  } else if (magnitude >= 0x38800000) {
    // Normal: drop 13 bits, rounding to even, and move the exponent's bias from 127 to 15.
    half = (magnitude + 0xfff + ((magnitude >> 13) & 1) - 0x38000000) >> 13;
  } else {
    // Subnormal: a multiple of 2^-24; nearbyint rounds to even.
    half = static_cast<uint32_t>(std::nearbyint(std::ldexp(std::bit_cast<float>(magnitude), 24)));
  }
  out.bits = static_cast<uint16_t>(sign | half);
}

// One rounding from double: through float with the double's inexact bits kept odd (round to odd),
// so that the second rounding decides as if it saw the double.
inline float round_to_odd(double value) {
  const auto nearest = static_cast<float>(value);
  if (static_cast<double>(nearest) == value || std::isnan(value) || std::isinf(nearest)) {
    return nearest;
  }
  uint32_t bits = std::bit_cast<uint32_t>(nearest);
  // Step towards zero where the conversion went away from it, then set the last bit.
  if (std::fabs(static_cast<double>(nearest)) > std::fabs(value)) --bits;
  return std::bit_cast<float>(bits | 1);
}
inline void store(double value, Bfloat16& out) { store(round_to_odd(value), out); }
inline void store(double value, Half& out) { store(round_to_odd(value), out); }

}  // namespace voxgemm
