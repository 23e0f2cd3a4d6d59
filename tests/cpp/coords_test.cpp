// SPDX-License-Identifier: Apache-2.0
#include "voxgemm/coords.h"

#include "conv/kernel.h"

#include <set>

#include "support/message_of.h"
#include "support/random_coords.h"

namespace voxgemm::test {
namespace {

void expect_index(const Context& ctx, const Voxels& voxels, Random& random) {
  const Matrix coords = coords_matrix(ctx, voxels);
  const VoxelIndex index(ctx, coords);
  const auto rows = lowest_rows(voxels);
  ASSERT_EQ(index.rows(), static_cast<int64_t>(voxels.size()));
  ASSERT_EQ(index.unique_voxels(), static_cast<int64_t>(rows.size()));
  for (const Voxel& voxel : voxels) {
    // The voxel itself, one near it, and one anywhere: wrap-around would find the last two by
    // mistake.
    for (int kind = 0; kind < 3; ++kind) {
      Voxel v = voxel;
      for (int32_t& value : v) {
        if (kind == 1) {
          value = static_cast<int32_t>(
              std::clamp<int64_t>(value + random.integer(-9, 9), int32_min, int32_max));
        }
        if (kind == 2) value = static_cast<int32_t>(random.integer(int32_min, int32_max));
      }
      const auto found = rows.find(place(v));
      ASSERT_EQ(index.find(v[0], v[1], v[2], v[3]), found == rows.end() ? -1 : found->second);
    }
  }
}

TEST(VoxelIndex, FindsTheLowestRow) {
  const Context ctx = Context::cpu(1);
  for_two_seconds([&](Random& random) {
    const Voxels voxels = random_voxels(&random, 300);
    SCOPED_TRACE(describe(voxels));
    expect_index(ctx, voxels, random);
  });
}

TEST(VoxelIndex, Empty) {
  const Context ctx = Context::cpu(1);
  const VoxelIndex index(ctx, make_matrix(ctx, 0, 4, Dtype::i32));
  EXPECT_EQ(index.rows(), 0);
  EXPECT_EQ(index.unique_voxels(), 0);
  EXPECT_EQ(index.find(0, 0, 0, 0), -1);
}

TEST(VoxelIndex, Corners) {
  const Context ctx = Context::cpu(1);
  Random random(1);
  // 2^29 bricks on two axes and 2^5 on the third: 63 bits exactly.
  expect_index(
      ctx,
      {{0, int32_min, int32_min, 0}, {0, int32_max, int32_max, 255}, {0, int32_min, int32_max, 7}},
      random);
  expect_index(
      ctx, {{int32_min + 1, 0, int32_min, 0}, {int32_max, 0, -1, 0}, {int32_max, 0, int32_min, 7}},
      random);
}

TEST(VoxelIndex, ExtentsBeyond63Bits) {
  const Context ctx = Context::cpu(1);
  const Voxels voxels = {{0, int32_min, int32_min, 0}, {0, int32_max, int32_max, 256}};
  EXPECT_EQ(message_of([&] { VoxelIndex(ctx, coords_matrix(ctx, voxels)); }),
            "the coordinates span 1 batches of 536870912 x 536870912 x 33 bricks of 8^3 voxels, "
            "expected at most 2^63 bricks in all");
  const Voxels corners = {{int32_min + 1, int32_min, int32_min, int32_min},
                          {int32_max, int32_max, int32_max, int32_max}};
  EXPECT_NE(message_of([&] { VoxelIndex(ctx, coords_matrix(ctx, corners)); }), "no error");
}

TEST(VoxelIndex, CrowdedVoxelsAnyThreads) {
  for (const int threads : {1, 2, 7}) {
    const Context ctx = Context::cpu(threads);
    Random random(2);
    expect_index(ctx, crowded_voxels(40000, 0), random);
    expect_index(ctx, crowded_voxels(40000, 100000000), random);
  }
}

void expect_unique(const Context& ctx, const Voxels& voxels) {
  const UniqueCoords result = unique(ctx, coords_matrix(ctx, voxels));
  std::map<Voxel, int32_t> numbers;
  std::vector<int32_t> coords;
  std::vector<int32_t> first_row;
  std::vector<int32_t> inverse;
  for (size_t r = 0; r < voxels.size(); ++r) {
    const auto [entry, is_new] = numbers.emplace(voxels[r], static_cast<int32_t>(numbers.size()));
    if (is_new) {
      coords.insert(coords.end(), voxels[r].begin(), voxels[r].end());
      first_row.push_back(static_cast<int32_t>(r));
    }
    inverse.push_back(entry->second);
  }
  ASSERT_EQ(elements<int32_t>(result.coords), coords);
  ASSERT_EQ(elements<int32_t>(result.first_row), first_row);
  ASSERT_EQ(elements<int32_t>(result.inverse), inverse);
}

TEST(Unique, OrderOfFirstAppearance) {
  const Context ctx = Context::cpu(1);
  for_two_seconds([&](Random& random) {
    const Voxels voxels = random_voxels(&random, 300);
    SCOPED_TRACE(describe(voxels));
    expect_unique(ctx, voxels);
  });
}

TEST(Unique, CrowdedVoxelsAnyThreads) {
  for (const int threads : {1, 2, 7}) {
    expect_unique(Context::cpu(threads), crowded_voxels(40000, 0));
    expect_unique(Context::cpu(threads), crowded_voxels(40000, 100000000));
  }
}

// The voxels, and rows of padding before, between and behind them.
struct Padded {
  Voxels rows;
  std::vector<int32_t> row_of;  // of each voxel

  Padded(const Voxels& voxels, Random& random) {
    for (size_t i = 0; i <= voxels.size(); ++i) {
      const int64_t more = random.integer(0, 3) == 0 ? random.integer(1, 5) : 0;
      rows.insert(rows.end(), more, Voxel{padding_batch, static_cast<int32_t>(i), 0, -1});
      if (i == voxels.size()) break;
      row_of.push_back(static_cast<int32_t>(rows.size()));
      rows.push_back(voxels[i]);
    }
  }
};

TEST(Padding, IsNoVoxel) {
  const Context ctx = Context::cpu(2);
  for_two_seconds([&](Random& random) {
    const Voxels voxels = random_voxels(&random, 100);
    const Padded padded(voxels, random);
    SCOPED_TRACE(describe(voxels));
    const Matrix plain = coords_matrix(ctx, voxels);
    const Matrix coords = coords_matrix(ctx, padded.rows);
    const VoxelIndex index(ctx, coords);
    ASSERT_EQ(index.unique_voxels(), VoxelIndex(ctx, plain).unique_voxels());
    ASSERT_EQ(index.find(padding_batch, 0, 0, -1), -1);
    const UniqueCoords expected = unique(ctx, plain);
    const UniqueCoords found = unique(ctx, coords);
    ASSERT_EQ(elements<int32_t>(found.coords), elements<int32_t>(expected.coords));
    std::vector<int32_t> inverse(padded.rows.size(), -1);
    for (size_t i = 0; i < voxels.size(); ++i) {
      inverse[padded.row_of[i]] = expected.inverse.as<int32_t>()[i];
    }
    ASSERT_EQ(elements<int32_t>(found.inverse), inverse);
    ASSERT_NO_THROW(validate_coords(ctx, coords_matrix(ctx, Padded({}, random).rows), Int3{}, 0));
    const Geometry down{.size = {2, 2, 2}, .stride = {2, 2, 2}};
    ASSERT_EQ(elements<int32_t>(output_coords(ctx, coords, down)),
              elements<int32_t>(output_coords(ctx, plain, down)));
  });
}

TEST(OutputCoords, WithRoom) {
  const Context ctx = Context::cpu(1);
  const Geometry down{.size = {2, 2, 2}, .stride = {2, 2, 2}};
  const Matrix coords = coords_matrix(ctx, {{0, 0, 0, 0}, {0, 1, 1, 1}, {3, 4, 0, 2}});
  const auto with_room = [&](int64_t voxels) {
    return voxels_of(output_coords(ctx, coords, down, {.max_voxels = voxels}));
  };
  const Voxel padding = {padding_batch, 0, 0, 0};
  const Voxels outputs = {{0, 0, 0, 0}, {3, 2, 0, 1}};
  EXPECT_EQ(with_room(2), outputs);
  EXPECT_EQ(with_room(4), Voxels({outputs[0], outputs[1], padding, padding}));
  EXPECT_EQ(message_of([&] { with_room(1); }), "output_coords found 2 voxels, max_voxels is 1");
  EXPECT_EQ(message_of([&] { with_room(0); }), "max_voxels is 0, expected 1 to 2147483647");
  EXPECT_EQ(
      voxels_of(output_coords(ctx, make_matrix(ctx, 0, 4, Dtype::i32), down, {.max_voxels = 1})),
      Voxels({padding}));
}

int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b < 0 ? 1 : 0); }

std::set<Place> expected_outputs(const Voxels& voxels,
                                 const Geometry& g,
                                 OutputRule rule,
                                 const std::optional<Int3>& shape) {
  std::set<Place> outputs;
  for (const Voxel& v : voxels) {
    for (int tap = 0; tap < g.taps(); ++tap) {
      Place out = {v[0]};
      bool reached = true;
      for (int axis = 0; axis < 3; ++axis) {
        const bool floor = rule == OutputRule::floor;
        const int64_t scaled = v[axis + 1] - (floor ? 0 : g.offset(axis, g.tap(tap)[axis]));
        out[axis + 1] = floor_div(scaled, g.stride[axis]);
        if (floor) continue;
        reached = reached && scaled % g.stride[axis] == 0;
        if (!shape) continue;
        reached = reached && out[axis + 1] >= 0 && out[axis + 1] < g.out_shape(*shape)[axis];
      }
      if (reached) outputs.insert(out);
    }
  }
  return outputs;
}

void expect_outputs(const Context& ctx,
                    const Voxels& voxels,
                    const Geometry& geometry,
                    OutputRule rule,
                    const std::optional<Int3>& shape) {
  const Matrix coords = coords_matrix(ctx, voxels);
  std::vector<int32_t> rows;
  for (const Place& place : expected_outputs(voxels, geometry, rule, shape)) {
    if (*std::max_element(place.begin(), place.end()) > int32_max ||
        *std::min_element(place.begin(), place.end()) < int32_min) {
      const std::string text = message_of([&] {
        output_coords(ctx, coords, geometry, {rule, shape});
      });
      ASSERT_NE(text.find("expected coordinates of 32 bits"), std::string::npos) << text;
      return;
    }
    rows.insert(rows.end(), place.begin(), place.end());
  }
  for (const int threads : {1, 2, 7}) {
    Context workers = ctx;
    workers.threads = threads;
    ASSERT_EQ(elements<int32_t>(output_coords(workers, coords, geometry, {rule, shape})), rows);
  }
}

TEST(OutputCoords, AgreeWithTheDefinition) {
  const Context ctx = Context::cpu(7);
  for_two_seconds([&](Random& random) {
    const Voxels voxels = random_voxels(&random, 60);
    Geometry geometry = random_geometry(&random, false);
    if (random.integer(0, 2) == 0) {
      geometry.stride = geometry.size;
      geometry.dilation = {1, 1, 1};
    }
    std::optional<Int3> shape;
    if (random.integer(0, 1) == 0) {
      shape.emplace();
      for (int32_t& extent : *shape) extent = static_cast<int32_t>(random.integer(0, 40));
    }
    const OutputRule rule = random.integer(0, 3) == 0 ? OutputRule::floor : OutputRule::reached;
    SCOPED_TRACE(geometry.text() + ", " + describe(voxels));
    expect_outputs(ctx, voxels, geometry, rule, shape);
  });
}

TEST(OutputCoords, CrowdedVoxels) {
  const Geometry strided{.size = {3, 3, 3}, .stride = {2, 2, 2}, .padding = {1, 1, 1}};
  const Geometry down{.size = {2, 2, 2}, .stride = {2, 2, 2}};
  const Context ctx = Context::cpu(7);
  for (const int64_t distance : {0, 100000000}) {
    const Voxels voxels = crowded_voxels(20000, distance);
    expect_outputs(ctx, voxels, strided, OutputRule::reached, std::nullopt);
    expect_outputs(ctx, voxels, down, OutputRule::reached, Int3{30, 41, 9});
    expect_outputs(ctx, voxels, strided, OutputRule::floor, std::nullopt);
  }
}

TEST(ValidateCoords, NamesTheFirstOffendingRow) {
  for (const int threads : {1, 7}) {
    const Context ctx = Context::cpu(threads);
    Voxels voxels(100000, Voxel{1, 9, 4, 2});
    voxels[99000] = {0, 0, -1, 0};
    voxels[60001] = {0, 10, 0, 0};
    voxels[50000] = {2, 0, 0, 0};
    const Matrix coords = coords_matrix(ctx, voxels);
    const Int3 shape = {10, 5, 3};
    EXPECT_EQ(message_of([&] { validate_coords(ctx, coords, shape, 2); }),
              "row 50000 of the coordinates is (batch 2, x 0, y 0, z 0), expected batch 0 to 1 and "
              "spatial "
              "shape (10, 5, 3)");
    EXPECT_EQ(
        message_of([&] { validate_coords(ctx, coords, shape, std::nullopt); }),
        "row 60001 of the coordinates is (batch 0, x 10, y 0, z 0), expected any batch and spatial "
        "shape (10, 5, 3)");
    EXPECT_EQ(message_of([&] { validate_coords(ctx, coords, std::nullopt, 3); }), "no error");
    EXPECT_EQ(message_of([&] {
                validate_coords(ctx, coords, Int3{11, 5, 3}, 3);
              }),
              "row 99000 of the coordinates is (batch 0, x 0, y -1, z 0), expected batch 0 to 2 "
              "and spatial "
              "shape (11, 5, 3)");
  }
}

TEST(ValidateCoords, RefusesImpossibleBounds) {
  const Context ctx = Context::cpu(1);
  const Matrix coords = coords_matrix(ctx, {{0, 0, 0, 0}});
  EXPECT_EQ(message_of([&] { validate_coords(ctx, coords, std::nullopt, -1); }),
            "batch_size is -1, expected 0 or more");
  EXPECT_EQ(message_of([&] {
              validate_coords(ctx, coords, Int3{1, -2, 1}, std::nullopt);
            }),
            "the spatial shape is (1, -2, 1), expected extents >= 0");
  EXPECT_EQ(message_of([&] { validate_coords(ctx, coords, std::nullopt, 0); }),
            "row 0 of the coordinates is (batch 0, x 0, y 0, z 0), expected no batch and any x, y, "
            "z");
}

TEST(ValidateCoords, RefusesOtherMatrices) {
  const Context ctx = Context::cpu(1);
  const auto text = [&](const MatrixRef& m) {
    return message_of([&] { validate_coords(ctx, m, std::nullopt, std::nullopt); });
  };
  MatrixRef coords = coords_matrix(ctx, {{0, 0, 0, 0}, {0, 1, 1, 1}});
  EXPECT_EQ(text(coords), "no error");
  EXPECT_EQ(text(make_matrix(ctx, 2, 3, Dtype::i32)),
            "coordinates have 3 columns, expected 4: batch, x, y, z");
  EXPECT_EQ(text(make_matrix(ctx, 2, 4, Dtype::i64)), "coordinates are i64, expected i32");
  coords.stride = 5;
  EXPECT_EQ(text(coords), "rows of coordinates are 5 elements apart, expected 4: contiguous");
  coords.stride = 4;
  coords.rows = int64_t{1} << 31;
  EXPECT_EQ(text(coords), "coordinates have 2147483648 rows, expected 0 to 2147483647");
}

TEST(Backend, CudaIsRefusedWithoutOne) {
  if (!registry(DeviceKind::cuda).empty()) GTEST_SKIP() << "this build has the CUDA backend";
  Context ctx = Context::cpu(1);
  ctx.device.kind = DeviceKind::cuda;
  MatrixRef coords{.rows = 0, .cols = 4, .stride = 4, .dtype = Dtype::i32, .device = ctx.device};
  EXPECT_EQ(message_of([&] { unique(ctx, coords); }, ErrorCode::unsupported),
            "this build of voxgemm has no CUDA backend, expected a CPU context");
}

}  // namespace
}  // namespace voxgemm::test
