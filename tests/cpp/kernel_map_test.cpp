// SPDX-License-Identifier: Apache-2.0
#include "voxgemm/kernel_map.h"

#include <gtest/gtest.h>

#include "support/message_of.h"
#include "support/random_coords.h"

namespace voxgemm::test {
namespace {

// What a map must hold, from the definition.
struct Expected {
  std::vector<int32_t> neighbours;
  std::vector<int64_t> pairs;
  std::vector<int32_t> in_first;
  std::vector<int32_t> out_first;
};

std::vector<int32_t> first_rows(const Voxels& voxels) {
  const auto lowest = lowest_rows(voxels);
  std::vector<int32_t> rows;
  if (lowest.size() == voxels.size()) return rows;
  for (const Voxel& v : voxels) rows.push_back(lowest.at(place(v)));
  return rows;
}

Expected expected_map(const Voxels& in, const Voxels& out, const Geometry& g) {
  const auto rows = lowest_rows(in);
  Expected map{{}, {}, first_rows(in), first_rows(out)};
  for (int tap = 0; tap < g.taps(); ++tap) {
    map.pairs.push_back(0);
    for (const Voxel& v : out) {
      Place voxel = {v[0]};
      for (int axis = 0; axis < 3; ++axis) {
        voxel[axis + 1] = int64_t{v[axis + 1]} * g.stride[axis] + g.offset(axis, g.tap(tap)[axis]);
      }
      const auto found = rows.find(voxel);
      map.neighbours.push_back(found == rows.end() ? -1 : found->second);
      map.pairs.back() += found == rows.end() ? 0 : 1;
    }
  }
  return map;
}

// Every pair between lowest rows, read from the other side; repeated rows of the new result side as
// the lowest.
Expected expected_transpose(const Expected& map, int64_t n_in, int64_t n_out, int taps) {
  Expected result{{}, {}, map.out_first, map.in_first};
  for (int tap = 0; tap < taps; ++tap) {
    std::vector<int32_t> column(static_cast<size_t>(n_in), -1);
    for (int64_t out = n_out - 1; out >= 0; --out) {
      const int32_t in = map.neighbours[static_cast<size_t>(tap * n_out + out)];
      if (in >= 0) column[static_cast<size_t>(in)] = static_cast<int32_t>(out);
    }
    for (size_t r = 0; r < result.out_first.size(); ++r)
      column[r] = column[static_cast<size_t>(result.out_first[r])];
    result.pairs.push_back(
        std::count_if(column.begin(), column.end(), [](int32_t row) { return row >= 0; }));
    result.neighbours.insert(result.neighbours.end(), column.begin(), column.end());
  }
  return result;
}

void expect_same(const KernelMap& map, const Expected& expected) {
  ASSERT_EQ(elements<int32_t>(map.neighbours), expected.neighbours);
  ASSERT_EQ(elements<int64_t>(map.pairs_per_tap), expected.pairs);
  ASSERT_EQ(elements<int32_t>(map.in_first), expected.in_first);
  ASSERT_EQ(elements<int32_t>(map.out_first), expected.out_first);
  int64_t pairs = 0;
  for (const int64_t count : expected.pairs) pairs += count;
  ASSERT_EQ(map.pairs(Context::cpu(1)), pairs);
}

// The map, its transpose and the transpose of that.
void expect_map(const Context& ctx, const KernelMap& map, const Expected& expected) {
  ASSERT_EQ(map.neighbours.rows, map.taps());
  ASSERT_EQ(map.neighbours.cols, map.n_out);
  ASSERT_FALSE(map.is_transposed);
  expect_same(map, expected);
  const KernelMap turned = transpose(ctx, map);
  ASSERT_TRUE(turned.is_transposed);
  ASSERT_EQ(turned.geometry, map.geometry);
  ASSERT_EQ(turned.symmetric, map.symmetric);
  ASSERT_EQ(turned.n_in, map.n_out);
  ASSERT_EQ(turned.n_out, map.n_in);
  expect_same(turned, expected_transpose(expected, map.n_in, map.n_out, map.taps()));
  const KernelMap back = transpose(ctx, turned);
  ASSERT_FALSE(back.is_transposed);
  expect_same(back, expected);
}

void expect_submanifold(const Context& ctx, const Voxels& voxels, const Geometry& geometry) {
  const KernelMap map = build_submanifold_map(ctx, coords_matrix(ctx, voxels), geometry);
  ASSERT_EQ(map.symmetric, geometry.mirrors());
  ASSERT_EQ(map.n_in, static_cast<int64_t>(voxels.size()));
  ASSERT_EQ(map.n_out, static_cast<int64_t>(voxels.size()));
  expect_map(ctx, map, expected_map(voxels, voxels, geometry));
}

void expect_general(const Context& ctx,
                    const Voxels& in,
                    const Voxels& out,
                    const Geometry& geometry) {
  const KernelMap map =
      build_kernel_map(ctx, coords_matrix(ctx, in), coords_matrix(ctx, out), geometry);
  ASSERT_EQ(map.n_in, static_cast<int64_t>(in.size()));
  ASSERT_EQ(map.n_out, static_cast<int64_t>(out.size()));
  expect_map(ctx, map, expected_map(in, out, geometry));
}

TEST(SubmanifoldMap, AgreesWithTheDefinition) {
  const Context ctx = Context::cpu(1);
  for_two_seconds([&](Random& random) {
    const Voxels voxels = random_voxels(&random, 150);
    Geometry geometry = random_geometry(&random, true);
    if (random.integer(0, 3) != 0)
      geometry = Geometry::submanifold(geometry.size, geometry.dilation);
    if (random.integer(0, 1) == 0) geometry = Geometry::submanifold({3, 3, 3});
    SCOPED_TRACE(geometry.text() + ", " + describe(voxels));
    expect_submanifold(ctx, voxels, geometry);
  });
}

TEST(KernelMap, AgreesWithTheDefinition) {
  const Context ctx = Context::cpu(1);
  for_two_seconds([&](Random& random) {
    const Voxels in = random_voxels(&random, 150);
    const Geometry geometry = random_geometry(&random, false);
    Voxels out = random_voxels(&random, 150);
    if (random.integer(0, 2) != 0) {
      // Outputs that the inputs reach: most pairs. Those of extreme inputs may not exist.
      try {
        out = voxels_of(output_coords(ctx, coords_matrix(ctx, in), geometry));
      } catch (const Error&) {
      }
    }
    if (out.size() > 1000) out.resize(1000);
    SCOPED_TRACE(geometry.text() + ", in " + describe(in) + ", out " + describe(out));
    expect_general(ctx, in, out, geometry);
  });
}

// Far beyond the coordinates and beyond int32: absent, never another voxel.
TEST(KernelMap, ReachesBeyondInt32) {
  const Context ctx = Context::cpu(1);
  const Voxels voxels = {{0, int32_min, int32_min, 0},
                         {0, int32_max, int32_max, 0},
                         {0, int32_min, int32_max, 3},
                         {0, int32_max, int32_max, 1},
                         {0, -1, 0, 0}};
  expect_submanifold(ctx, voxels, Geometry::submanifold({3, 3, 3}));
  expect_submanifold(ctx, voxels, Geometry::submanifold({3, 3, 3}, {int32_max, int32_max, 1}));
  expect_general(ctx, voxels, voxels,
                 {.size = {2, 2, 2},
                  .stride = {int32_max, 2, 1},
                  .padding = {int32_max, 1, 0},
                  .dilation = {int32_max, int32_max, int32_max}});
  expect_general(ctx, {{0, 5, 5, 5}, {0, 13, 5, 5}}, voxels,
                 {.stride = {3, 1, 1}, .padding = {int32_max, int32_max, int32_max}});
}

TEST(KernelMap, EmptySides) {
  const Context ctx = Context::cpu(1);
  const Voxels one = {{3, -7, 8, 9}};
  expect_submanifold(ctx, {}, Geometry::submanifold({3, 3, 3}));
  expect_submanifold(ctx, one, Geometry::submanifold({3, 3, 3}));
  expect_submanifold(ctx, one, Geometry::submanifold({1, 1, 1}));
  expect_general(ctx, {}, one, {.size = {2, 2, 2}, .stride = {2, 2, 2}});
  expect_general(ctx, one, {}, {.size = {2, 2, 2}, .stride = {2, 2, 2}});
  expect_general(ctx, {}, {}, {.size = {2, 2, 2}, .stride = {2, 2, 2}});
}

TEST(KernelMap, LargestKernels) {
  const Context ctx = Context::cpu(1);
  Random random(3);
  const Voxels voxels = random_voxels(&random, 40);
  expect_submanifold(ctx, voxels, Geometry::submanifold({16, 16, 16}));
  expect_submanifold(ctx, voxels, Geometry::submanifold({1, 1, 4096}));
  expect_submanifold(ctx, voxels, Geometry::submanifold({16, 1, 256}, {8, 1, 1000}));
}

// Tables over several tasks and with rows that end inside a block, the same bytes for any number of
// threads.
TEST(KernelMap, CrowdedVoxelsAnyThreads) {
  const Voxels near = crowded_voxels(9001, 0);
  const Voxels far = crowded_voxels(9001, 100000000);
  const Geometry strided{.size = {3, 3, 3}, .stride = {2, 2, 2}, .padding = {1, 1, 1}};
  for (const int threads : {1, 2, 7}) {
    const Context ctx = Context::cpu(threads);
    for (const Voxels* voxels : {&near, &far}) {
      expect_submanifold(ctx, *voxels, Geometry::submanifold({3, 3, 3}));
      expect_submanifold(ctx, *voxels, Geometry::submanifold({2, 3, 5}));
      expect_general(ctx, *voxels, *voxels, strided);
      expect_general(ctx, *voxels,
                     voxels_of(output_coords(ctx, coords_matrix(ctx, *voxels), strided)), strided);
    }
  }
}

TEST(SubmanifoldMap, SharesAnIndex) {
  const Context ctx = Context::cpu(1);
  Random random(6);
  const Voxels voxels = random_voxels(&random, 100);
  const Matrix coords = coords_matrix(ctx, voxels);
  const VoxelIndex index(ctx, coords);
  const Geometry geometry = Geometry::submanifold({3, 3, 3});
  expect_same(build_submanifold_map(ctx, index, coords, geometry),
              expected_map(voxels, voxels, geometry));
}

TEST(SubmanifoldMap, RefusesStridesAndOtherIndices) {
  const Context ctx = Context::cpu(1);
  const Matrix coords = coords_matrix(ctx, {{0, 1, 2, 3}, {0, 1, 2, 4}});
  EXPECT_EQ(message_of([&] {
              build_submanifold_map(ctx, coords, {.stride = {2, 2, 2}});
            }),
            "the geometry of a submanifold map is 3s2, expected stride 1");
  EXPECT_EQ(message_of([&] {
              build_submanifold_map(ctx, VoxelIndex(ctx, make_matrix(ctx, 0, 4, Dtype::i32)),
                                    coords, Geometry::submanifold({3, 3, 3}));
            }),
            "the voxel index has 0 rows, the coordinates have 2");
}

}  // namespace
}  // namespace voxgemm::test
