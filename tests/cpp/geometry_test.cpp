// SPDX-License-Identifier: Apache-2.0
#include "voxgemm/geometry.h"

#include <gtest/gtest.h>

#include <limits>

#include "support/message_of.h"

namespace voxgemm {
namespace {

constexpr int32_t int32_max = std::numeric_limits<int32_t>::max();

TEST(Geometry, TapsCountZFastest) {
  const Geometry geometry{.size = {2, 3, 4}};
  EXPECT_EQ(geometry.taps(), 24);
  int index = 0;
  for (int x = 0; x < 2; ++x) {
    for (int y = 0; y < 3; ++y) {
      for (int z = 0; z < 4; ++z) EXPECT_EQ(geometry.tap(index++), (Int3{x, y, z}));
    }
  }
}

TEST(Geometry, SubmanifoldReadsItsOwnVoxel) {
  const Geometry geometry = Geometry::submanifold({3, 4, 1}, {2, 3, 5});
  EXPECT_EQ(geometry.padding, (Int3{2, 6, 0}));
  EXPECT_EQ(geometry.offset(0, 1), 0);
  EXPECT_EQ(geometry.offset(1, 2), 0);
  EXPECT_EQ(geometry.offset(1, 0), -6);
  EXPECT_EQ(geometry.offset(2, 0), 0);
}

TEST(Geometry, MirroredTapsHaveOppositeOffsets) {
  const Geometry geometry = Geometry::submanifold({3, 5, 1}, {1, 2, 3});
  ASSERT_TRUE(geometry.mirrors());
  for (int tap = 0; tap < geometry.taps(); ++tap) {
    const Int3 here = geometry.tap(tap);
    const Int3 there = geometry.tap(geometry.mirrored(tap));
    for (int axis = 0; axis < 3; ++axis) {
      EXPECT_EQ(geometry.offset(axis, here[axis]), -geometry.offset(axis, there[axis]));
    }
  }
  EXPECT_FALSE(Geometry::submanifold({3, 2, 3}).mirrors());
  EXPECT_FALSE((Geometry{.padding = {1, 1, 0}}).mirrors());
  EXPECT_FALSE((Geometry{.stride = {1, 1, 2}, .padding = {1, 1, 1}}).mirrors());
}

TEST(Geometry, OutShapeCountsTheFittingKernels) {
  for (int size = 1; size <= 4; ++size) {
    for (int stride = 1; stride <= 3; ++stride) {
      for (int padding = 0; padding <= 2; ++padding) {
        for (int dilation = 1; dilation <= 3; ++dilation) {
          const Geometry geometry{.size = {size, 1, 1},
                                  .stride = {stride, 1, 1},
                                  .padding = {padding, 0, 0},
                                  .dilation = {dilation, 1, 1}};
          for (int extent = 0; extent <= 12; ++extent) {
            int fitting = 0;
            while (fitting * stride - padding + (size - 1) * dilation < extent + padding) ++fitting;
            EXPECT_EQ(geometry.out_shape({extent, 7, 0}), (Int3{fitting, 7, 0}))
                << geometry.text() << " " << extent;
          }
        }
      }
    }
  }
  EXPECT_THROW((Geometry{.size = {1, 1, 1}, .padding = {1, 0, 0}}).out_shape({int32_max, 1, 1}),
               Error);
}

TEST(Geometry, TextNamesWhatDiffersFromTheDefaults) {
  EXPECT_EQ(Geometry{}.text(), "3");
  EXPECT_EQ((Geometry{.size = {3, 1, 3}}).text(), "3x1x3");
  EXPECT_EQ((Geometry{.stride = {2, 2, 2}, .padding = {1, 1, 1}}).text(), "3s2p1");
  EXPECT_EQ((Geometry{.size = {2, 2, 2}, .stride = {2, 2, 2}}).text(), "2s2");
  EXPECT_EQ((Geometry{.dilation = {2, 2, 2}}).text(), "3d2");
  EXPECT_EQ((Geometry{.stride = {1, 2, 1}, .padding = {0, 0, 1}, .dilation = {1, 1, 12}}).text(),
            "3s1x2x1p0x0x1d1x1x12");
}

std::string refusal(const Geometry& geometry) {
  return test::message_of([&] { geometry.validate(); });
}

TEST(Geometry, ValidateNamesTheValue) {
  EXPECT_EQ(refusal({}), "no error");
  EXPECT_EQ(refusal({.size = {16, 16, 16}}), "no error");
  EXPECT_EQ(
      refusal({.size = {1, 4096, 1}, .stride = {int32_max, 1, 1}, .dilation = {1, 1, int32_max}}),
      "no error");
  EXPECT_EQ(refusal({.size = {3, 0, 3}}), "kernel size is 0 on axis 1, expected 1 or more");
  EXPECT_EQ(refusal({.stride = {1, 1, -2}}), "stride is -2 on axis 2, expected 1 or more");
  EXPECT_EQ(refusal({.padding = {-1, 0, 0}}), "padding is -1 on axis 0, expected 0 or more");
  EXPECT_EQ(refusal({.dilation = {1, 0, 1}}), "dilation is 0 on axis 1, expected 1 or more");
  EXPECT_EQ(refusal({.size = {17, 16, 16}}), "the kernel 17x16x16 has more than 4096 taps");
  EXPECT_EQ(refusal({.size = {int32_max, int32_max, int32_max}}),
            "the kernel 2147483647 has more than 4096 taps");
  EXPECT_THROW(Geometry::submanifold({4, 4, 4}, {int32_max, 1, 1}), Error);
}

}  // namespace
}  // namespace voxgemm
