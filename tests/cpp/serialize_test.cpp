// SPDX-License-Identifier: Apache-2.0
#include "voxgemm/serialize.h"

#include <algorithm>
#include <numeric>

#include "support/message_of.h"
#include "support/random_coords.h"
#include "support/run.h"

namespace voxgemm::test {
namespace {

std::vector<int64_t> encoded(const Context& ctx,
                             const Voxels& voxels,
                             const CurveOptions& options) {
  const Matrix coords = coords_matrix(ctx, voxels);
  const Matrix codes = make_matrix(ctx, coords.rows, 1, Dtype::i64);
  curve_encode(ctx, coords, options, codes);
  return elements<int64_t>(codes);
}

// The judge: one bit at a time.
uint64_t interleaved(const Voxel& v, const CurveOptions& options) {
  uint64_t code = 0;
  for (int bit = options.bits - 1; bit >= 0; --bit) {
    for (const int axis : options.axes) {
      code = 2 * code + (static_cast<uint32_t>(v[1 + axis]) >> bit & 1);
    }
  }
  return code | static_cast<uint64_t>(v[0]) << 3 * options.bits;
}

TEST(Serialize, ZOrderInterleavesBits) {
  Random random(1);
  Int3 axes = {0, 1, 2};
  do {
    for (int bits = 0; bits <= 20; ++bits) {
      const CurveOptions options{.bits = bits, .axes = axes};
      Voxels voxels(20);
      for (Voxel& v : voxels) {
        v[0] = static_cast<int32_t>(random.integer(0, 7));
        for (int axis = 1; axis < 4; ++axis) {
          v[axis] = static_cast<int32_t>(random.integer(0, (int64_t{1} << bits) - 1));
        }
      }
      const auto codes = encoded(context(), voxels, options);
      for (size_t r = 0; r < voxels.size(); ++r) {
        ASSERT_EQ(static_cast<uint64_t>(codes[r]), interleaved(voxels[r], options));
      }
    }
  } while (std::next_permutation(axes.begin(), axes.end()));
}

// What makes it a Hilbert curve: it visits every voxel of every aligned cube of 2^k, one step at a
// time, before it goes on.
TEST(Serialize, HilbertVisitsCubesStepByStep) {
  for (int bits = 1; bits <= 4; ++bits) {
    const Voxels voxels = full_cloud(1 << bits);
    const auto codes = encoded(context(), voxels, {.curve = Curve::hilbert, .bits = bits});
    Voxels path(voxels.size());
    for (size_t r = 0; r < voxels.size(); ++r) path.at(codes[r]) = voxels[r];
    EXPECT_EQ(path[0], (Voxel{0, 0, 0, 0}));
    for (size_t i = 1; i < path.size(); ++i) {
      int distance = 0;
      for (int axis = 1; axis < 4; ++axis) distance += std::abs(path[i][axis] - path[i - 1][axis]);
      ASSERT_EQ(distance, 1) << "step " << i << " of " << bits << " bits";
      for (int level = 1; level < bits; ++level) {
        // Places with the same code above 3 * level bits lie in one cube.
        if (i >> 3 * level != (i - 1) >> 3 * level) continue;
        for (int axis = 1; axis < 4; ++axis) {
          ASSERT_EQ(path[i][axis] >> level, path[i - 1][axis] >> level);
        }
      }
    }
  }
}

TEST(Serialize, RowsAreLexicographic) {
  Random random(3);
  Voxels voxels(200);
  for (Voxel& v : voxels) {
    for (int32_t& value : v) value = static_cast<int32_t>(random.integer(0, 30));
  }
  const auto codes = encoded(context(), voxels, {.curve = Curve::rows, .bits = 5});
  for (size_t a = 1; a < voxels.size(); ++a) {
    EXPECT_EQ(codes[a - 1] < codes[a], voxels[a - 1] < voxels[a]);
  }
}

TEST(Serialize, DecodingGivesTheVoxelBack) {
  Random random(4);
  for (const Dtype dtype : {Dtype::i32, Dtype::i64}) {
    for (int curve = 0; curve < curve_count; ++curve) {
      const int most = dtype == Dtype::i32 ? 10 : 21;
      for (int bits = 0; bits <= most; ++bits) {
        const CurveOptions options{.curve = static_cast<Curve>(curve),
                                   .bits = bits,
                                   .axes = {1, 2, 0},
                                   .origin = {-7, 5, int32_max}};
        const int batch_bits = std::min(32, (dtype == Dtype::i32 ? 32 : 64) - 3 * bits);
        Voxels voxels(50);
        for (Voxel& v : voxels) {
          v[0] = static_cast<int32_t>(random.bits() & ((uint64_t{1} << batch_bits) - 1));
          for (int axis = 0; axis < 3; ++axis) {
            // Past the end of int32 coordinates wrap around.
            v[1 + axis] = static_cast<int32_t>(
                static_cast<uint32_t>(options.origin[axis]) +
                static_cast<uint32_t>(random.integer(0, (int64_t{1} << bits) - 1)));
          }
        }
        const Matrix coords = coords_matrix(context(), voxels);
        const Matrix codes = make_matrix(context(), coords.rows, 1, dtype);
        const Matrix back = make_matrix(context(), coords.rows, 4, Dtype::i32);
        curve_encode(context(), coords, options, codes);
        curve_decode(context(), codes, options, back);
        ASSERT_EQ(voxels_of(back), voxels) << bits << " bits of curve " << curve;
      }
    }
  }
}

TEST(Serialize, SortsAsUnsignedStable) {
  Random random(5);
  for (const int64_t rows : {0, 1, 2, 1000, 200000}) {
    std::vector<uint64_t> values(rows);
    for (uint64_t& value : values) {
      value = random.integer(0, 1) == 0 ? random.bits() % 50 : random.bits();
    }
    const Matrix codes = make_matrix(context(), rows, 1, Dtype::i64);
    std::copy(values.begin(), values.end(), codes.as<uint64_t>());
    std::vector<int64_t> expected(rows);
    std::iota(expected.begin(), expected.end(), 0);
    std::stable_sort(expected.begin(), expected.end(),
                     [&](int64_t a, int64_t b) { return values[a] < values[b]; });
    const SortedCodes sorted = sort_codes(context(), codes);
    ASSERT_EQ(elements<int64_t>(sorted.permutation), expected);
    for (int64_t i = 0; i < rows; ++i) {
      ASSERT_EQ(sorted.inverse.as<int64_t>()[sorted.permutation.as<int64_t>()[i]], i);
    }
  }
}

TEST(Serialize, SaysWhatDoesNotFit) {
  const Matrix coords = coords_matrix(context(), full_cloud(2));
  const Matrix codes = make_matrix(context(), coords.rows, 1, Dtype::i32);
  const auto message = [&](const CurveOptions& options) {
    return message_of([&] { curve_encode(context(), coords, options, codes); });
  };
  EXPECT_EQ(message({.bits = 11}),
            "a curve has 11 bits an axis, expected 0 to 10 for codes of i32");
  EXPECT_EQ(message({.bits = 5, .axes = {0, 1, 1}}),
            "the axes of a curve are 0, 1, 1, expected a permutation of 0, 1, 2");
}

}  // namespace
}  // namespace voxgemm::test
