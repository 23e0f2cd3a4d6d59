// SPDX-License-Identifier: Apache-2.0
#include "core/half.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <type_traits>
#include <vector>

#include "core/half.h"

namespace voxgemm {
namespace {

// A 16-bit format by its definition: sign, exponent bits, the rest fraction.
struct Format {
  int exponent_bits;

  double decode(uint16_t bits) const {
    const int fraction_bits = 15 - exponent_bits;
    const int bias = (1 << (exponent_bits - 1)) - 1;
    const int exponent = (bits & 0x7fff) >> fraction_bits;
    const int fraction = bits & ((1 << fraction_bits) - 1);
    double value = 0;
    if (exponent == (1 << exponent_bits) - 1) {
      value = fraction == 0 ? HUGE_VAL : std::nan("");
    } else if (exponent == 0) {
      value = std::ldexp(fraction, 1 - bias - fraction_bits);
    } else {
      value = std::ldexp(fraction + (1 << fraction_bits), exponent - bias - fraction_bits);
    }
    return (bits & 0x8000) != 0 ? -value : value;
  }
  uint16_t infinity() const { return ((1 << exponent_bits) - 1) << (15 - exponent_bits); }
};

template <class T>
struct Formats : ::testing::Test {
  static constexpr Format format{std::is_same_v<T, Half> ? 5 : 8};

  template <class From>
  static uint16_t bits_of(From value) {
    T result{};
    store(value, result);
    return result.bits;
  }
};
using Types = ::testing::Types<Half, Bfloat16>;
TYPED_TEST_SUITE(Formats, Types);

TYPED_TEST(Formats, EveryValueIsReadAndComesBack) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const TypeParam value{static_cast<uint16_t>(bits)};
    const double expected = this->format.decode(value.bits);
    const float read = to_float(value);
    if (std::isnan(expected)) {
      ASSERT_TRUE(std::isnan(read)) << bits;
      const uint16_t back = this->bits_of(read);
      ASSERT_TRUE(std::isnan(this->format.decode(back))) << bits;
      ASSERT_EQ(back & 0x8000, value.bits & 0x8000) << "the sign of a NaN";
      continue;
    }
    ASSERT_EQ(read, expected) << bits;
    ASSERT_EQ(this->bits_of(read), bits);
    ASSERT_EQ(this->bits_of(expected), bits);
  }
}

// Between each value and the next greater one: the middle goes to the even one of the two, all else
// to the nearer.
TYPED_TEST(Formats, RoundToNearestEven) {
  for (uint16_t low = 0; low < this->format.infinity(); ++low) {
    const uint16_t high = low + 1;
    const double below = this->format.decode(low);
    // One step beyond the greatest finite value, as if the exponent had no end.
    const double above = high == this->format.infinity() ? 2 * below - this->format.decode(low - 1)
                                                         : this->format.decode(high);
    const double middle = (below + above) / 2;
    const uint16_t even = low % 2 == 0 ? low : high;
    for (const double sign : {1.0, -1.0}) {
      const uint16_t mark = sign < 0 ? 0x8000 : 0;
      ASSERT_EQ(this->bits_of(sign * middle), even | mark) << middle;
      ASSERT_EQ(this->bits_of(sign * std::nextafter(middle, 0.0)), low | mark) << middle;
      ASSERT_EQ(this->bits_of(sign * std::nextafter(middle, HUGE_VAL)), high | mark) << middle;
      if (std::fabs(middle) > std::numeric_limits<float>::max()) continue;
      const auto f = static_cast<float>(sign * middle);
      if (f != sign * middle) continue;  // a middle between subnormals that f32 lacks
      ASSERT_EQ(this->bits_of(f), even | mark) << middle;
      ASSERT_EQ(this->bits_of(std::nextafter(f, 0.0F)), low | mark) << middle;
      ASSERT_EQ(this->bits_of(std::nextafter(f, f * HUGE_VALF)), high | mark) << middle;
    }
  }
}

TYPED_TEST(Formats, KeepInfinityAndOverflowToIt) {
  constexpr double greatest = std::numeric_limits<double>::max();
  for (const double value : {HUGE_VAL, greatest, 3.5e38}) {
    EXPECT_EQ(this->bits_of(value), this->format.infinity()) << value;
    EXPECT_EQ(this->bits_of(-value), this->format.infinity() | 0x8000) << value;
  }
  EXPECT_EQ(this->bits_of(HUGE_VALF), this->format.infinity());
  EXPECT_EQ(this->bits_of(-HUGE_VALF), this->format.infinity() | 0x8000);
}

TYPED_TEST(Formats, KeepTheSignOfZeroAndUnderflowToIt) {
  constexpr double least = std::numeric_limits<double>::denorm_min();
  for (const double value : {0.0, least, 1e-300}) {
    EXPECT_EQ(this->bits_of(value), 0) << value;
    EXPECT_EQ(this->bits_of(-value), 0x8000) << value;
  }
  EXPECT_EQ(this->bits_of(-0.0F), 0x8000);
}

TYPED_TEST(Formats, NanStaysNanWhateverItsBits) {
  for (const uint32_t bits : {0x7f800001U, 0x7fc00000U, 0x7fffffffU, 0xff800001U, 0xffffffffU}) {
    const uint16_t stored = this->bits_of(std::bit_cast<float>(bits));
    EXPECT_TRUE(std::isnan(this->format.decode(stored))) << bits;
    EXPECT_EQ(stored & 0x8000, bits >> 16 & 0x8000) << bits;
  }
  EXPECT_TRUE(std::isnan(this->format.decode(this->bits_of(std::nan("")))));
}

}  // namespace
}  // namespace voxgemm
