// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <bit>
#include <type_traits>

#include "core/half.h"

namespace voxgemm::cpu {

// What sums of an element type are kept in.
template <class T>
using Sum = std::conditional_t<std::is_same_v<T, double>, double, float>;

// to_float() without branches, so that loops over a row become vector code.
template <class T>
inline Sum<T> widen(T value) {
  return to_float(value);
}
template <>
inline float widen(Half value) {
  // The fraction and exponent in their f32 places are too small by the difference of the biases,
  // 112, and exact after one product, subnormals too. Infinity and NaN need all exponent bits.
  const uint32_t magnitude = static_cast<uint32_t>(value.bits & 0x7fff) << 13;
  const float scaled = std::bit_cast<float>(magnitude) * 0x1p112f;
  const uint32_t special = magnitude >= 0x0f800000 ? 0x7f800000 : 0;
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000) << 16;
  return std::bit_cast<float>(std::bit_cast<uint32_t>(scaled) | special | sign);
}

}  // namespace voxgemm::cpu
