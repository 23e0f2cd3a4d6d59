// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include "support/matrices.h"

namespace voxgemm::test {

// Largest relative error of rounding to a float dtype.
inline double roundoff(Dtype dtype) {
  switch (dtype) {
    case Dtype::f16:
      return std::ldexp(1.0, -11);
    case Dtype::bf16:
      return std::ldexp(1.0, -8);
    case Dtype::f32:
      return std::ldexp(1.0, -24);
    default:
      return std::ldexp(1.0, -53);
  }
}

// Sums of products, computed in double, and what an error bound needs to know about them.
struct Sums {
  std::vector<double> values;
  std::vector<double> magnitudes;  // sums of the absolute products; unused where exact
  // Products (and bias) of a sum, one number for values.size() / terms.size() consecutive sums.
  std::vector<double> terms;
  // Operands are small integers and no partial sum leaves the 24 bits of f32: any order, any
  // fused operation and any accumulator give the exact sums.
  bool exact = false;
  // Relative error of an operand that was itself rounded (repeated rows of dy are added first).
  double operand_error = 0;

  // The same sums in another precision of f32: operands are rounded or split, and a product becomes
  // several.
  Sums in(Precision precision) const {
    Sums other = *this;
    if (precision == Precision::ieee) return other;
    // tf32 has 11 significant bits. Of k bf16 pieces of 8 bits the rest is below 2^-8k of the
    // operand; what bf16x3 and bf16x6 leave out is one, or two and a smaller, product of that size.
    const double rest = std::ldexp(1.0, precision == Precision::tf32     ? -11
                                        : precision == Precision::bf16x3 ? -16
                                                                         : -24);
    const double left_out = precision == Precision::tf32     ? 0
                            : precision == Precision::bf16x3 ? 1
                                                             : 2.01;
    const double products = precision == Precision::tf32     ? 1
                            : precision == Precision::bf16x3 ? 3
                                                             : 6;
    const double error = (1 + rest) * (1 + rest) - 1 + left_out * rest;
    other.operand_error = (1 + operand_error) * (1 + error) - 1;
    for (double& n : other.terms) n *= products;
    // Small integers are exact in every precision.
    return other;
  }
};

struct Arithmetic {
  Dtype accumulator;
  Dtype result;
};

// THE error bound. A sum of n products in arithmetic of relative error u, in any order, each
// product rounded or fused, is off by at most n u / (1 - n u) times the sum of the absolute
// products (every product takes part in at most n roundings), plus one smallest normal number per
// operation where subnormals are flushed. The judge's own sum is off by the same with the u of
// double. Then one rounding to the result's dtype: it is monotone, so the result lies between the
// rounded ends of that interval.
inline double sum_error(const Sums& sums, size_t i, Dtype accumulator) {
  const double terms = sums.terms[i / (sums.values.size() / sums.terms.size())];
  const auto gamma = [&](Dtype dtype) {
    const double nu = terms * roundoff(dtype);
    return nu / (1 - nu);
  };
  if (sums.exact) return 0;
  const double smallest = accumulator == Dtype::f32 ? std::ldexp(1.0, -126) : 0;
  const double relative = (1 + gamma(accumulator)) * (1 + sums.operand_error) - 1;
  return (relative + gamma(Dtype::f64)) * sums.magnitudes[i] + 2 * terms * smallest;
}

// Whether every element of `actual` is within the bound; else the first that is not, in words.
inline ::testing::AssertionResult within_bound(const std::vector<double>& actual,
                                               const Sums& sums,
                                               const Arithmetic& arithmetic) {
  if (actual.size() != sums.values.size()) {
    return ::testing::AssertionFailure()
           << actual.size() << " elements, expected " << sums.values.size();
  }
  for (size_t i = 0; i < actual.size(); ++i) {
    const double exact = sums.values[i];
    const double error = std::isfinite(exact) ? sum_error(sums, i, arithmetic.accumulator) : 0;
    const double low = rounded(exact - error, arithmetic.result);
    const double high = rounded(exact + error, arithmetic.result);
    if (std::isnan(exact) ? std::isnan(actual[i]) : low <= actual[i] && actual[i] <= high) continue;
    return ::testing::AssertionFailure()
           << "element " << i << " of " << actual.size() << " is " << actual[i] << ", expected "
           << exact << ", between " << low << " and " << high;
  }
  return ::testing::AssertionSuccess();
}

// Equality of bits; NaN equals NaN.
inline ::testing::AssertionResult same_bits(const std::vector<double>& actual,
                                            const std::vector<double>& expected) {
  if (actual.size() != expected.size()) {
    return ::testing::AssertionFailure()
           << actual.size() << " elements, expected " << expected.size();
  }
  for (size_t i = 0; i < actual.size(); ++i) {
    const bool both_nan = std::isnan(actual[i]) && std::isnan(expected[i]);
    if (both_nan ||
        (actual[i] == expected[i] && std::signbit(actual[i]) == std::signbit(expected[i]))) {
      continue;
    }
    return ::testing::AssertionFailure() << "element " << i << " of " << actual.size() << " is "
                                         << actual[i] << ", expected " << expected[i];
  }
  return ::testing::AssertionSuccess();
}

}  // namespace voxgemm::test
