// SPDX-License-Identifier: Apache-2.0
// Coordinates and maps on the device, against the CPU's: the same bits.
#include "conv/coords.h"
#include "cuda/device.h"
#include "cuda/gpu.h"
#include "support/random_coords.h"

namespace voxgemm::test {
namespace {

// The message of the error that `call` throws; empty if it throws none.
template <class Call>
std::string message_of(const Call& call) {
  try {
    call();
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

int64_t repeats_in(const std::vector<int32_t>& first_rows) {
  int64_t repeats = 0;
  for (size_t row = 0; row < first_rows.size(); ++row) {
    if (first_rows[row] != static_cast<int32_t>(row)) ++repeats;
  }
  return repeats;
}

void expect_same_map(const KernelMap& map, const KernelMap& expected) {
  ASSERT_EQ(map.geometry, expected.geometry);
  ASSERT_EQ(map.n_in, expected.n_in);
  ASSERT_EQ(map.n_out, expected.n_out);
  ASSERT_EQ(map.symmetric, expected.symmetric);
  ASSERT_EQ(map.is_transposed, expected.is_transposed);
  const Context& ctx = *gpu();
  ASSERT_EQ(map.neighbours.rows, expected.neighbours.rows);
  ASSERT_EQ(fetched<int32_t>(ctx, map.neighbours), fetched<int32_t>(ctx, expected.neighbours));
  ASSERT_EQ(fetched<int64_t>(ctx, map.pairs_per_tap),
            fetched<int64_t>(ctx, expected.pairs_per_tap));
  ASSERT_EQ(map.pairs(ctx), expected.pairs(context()));
  const std::vector<int32_t> in_first = all_first_rows(ctx, expected.in_first, expected.n_in);
  const std::vector<int32_t> out_first = all_first_rows(ctx, expected.out_first, expected.n_out);
  ASSERT_EQ(fetched<int32_t>(ctx, map.in_first), in_first);
  ASSERT_EQ(fetched<int32_t>(ctx, map.out_first), out_first);
  ASSERT_EQ(fetched<int64_t>(ctx, map.in_repeats), std::vector{repeats_in(in_first)});
  ASSERT_EQ(fetched<int64_t>(ctx, map.out_repeats), std::vector{repeats_in(out_first)});
}

// The map, its transpose and the transpose of that.
void expect_same_maps(const KernelMap& map, const KernelMap& expected) {
  ASSERT_NO_FATAL_FAILURE(expect_same_map(map, expected));
  const KernelMap turned = transpose(*gpu(), map);
  ASSERT_NO_FATAL_FAILURE(expect_same_map(turned, transpose(context(), expected)));
  ASSERT_NO_FATAL_FAILURE(expect_same_map(transpose(*gpu(), turned), expected));
}

KernelMap submanifold_on_device(const MatrixRef& coords, const Geometry& geometry) {
  return build_submanifold_map(*gpu(), coords, geometry);
}

void expect_submanifold(const Voxels& voxels, const Geometry& geometry) {
  SCOPED_TRACE(geometry.text() + ", " + describe(voxels));
  const Context& ctx = *gpu();
  const Matrix coords = coords_on_device(ctx, voxels);
  const KernelMap expected =
      build_submanifold_map(context(), coords_matrix(context(), voxels), geometry);
  const VoxelIndex index(ctx, coords);
  for (const bool is_indexed : {false, true}) {
    const Answer answer;
    const KernelMap map =
        is_indexed ? build_submanifold_map(ctx, index, coords, geometry, answer.numbers())
                   : build_submanifold_map(ctx, coords, geometry, answer.numbers());
    ASSERT_NO_FATAL_FAILURE(expect_same_maps(map, expected));
    ASSERT_NO_FATAL_FAILURE(answer.expect(map));
  }
}

void expect_general(const Voxels& in, const Voxels& out, const Geometry& geometry) {
  SCOPED_TRACE(geometry.text() + ", in " + describe(in) + ", out " + describe(out));
  const Answer answer;
  const KernelMap map = build_kernel_map(*gpu(), coords_on_device(*gpu(), in),
                                         coords_on_device(*gpu(), out), geometry, answer.numbers());
  ASSERT_NO_FATAL_FAILURE(
      expect_same_maps(map, build_kernel_map(context(), coords_matrix(context(), in),
                                             coords_matrix(context(), out), geometry)));
  ASSERT_NO_FATAL_FAILURE(answer.expect(map));
}

void expect_unique(const Voxels& voxels) {
  SCOPED_TRACE(describe(voxels));
  const Context& ctx = *gpu();
  const UniqueCoords expected = unique(context(), coords_matrix(context(), voxels));
  const Matrix coords = coords_on_device(ctx, voxels);
  const UniqueCoords actual = unique(ctx, coords);
  ASSERT_EQ(fetched<int32_t>(ctx, actual.coords), fetched<int32_t>(ctx, expected.coords));
  ASSERT_EQ(fetched<int32_t>(ctx, actual.first_row), fetched<int32_t>(ctx, expected.first_row));
  ASSERT_EQ(fetched<int32_t>(ctx, actual.inverse), fetched<int32_t>(ctx, expected.inverse));
  const auto index = cuda::make_index(ctx, coords);
  ASSERT_EQ(index->rows, static_cast<int64_t>(voxels.size()));
  ASSERT_EQ(index->unique_voxels(), expected.coords.rows);
}

// Of 8^3 voxels, in the smallest box.
double bricks_under(const Voxels& voxels) {
  double bricks = 1;
  for (int axis = 0; axis < 4 && !voxels.empty(); ++axis) {
    const auto [low, high] =
        std::minmax_element(voxels.begin(), voxels.end(),
                            [&](const Voxel& a, const Voxel& b) { return a[axis] < b[axis]; });
    bricks *= (static_cast<double>((*high)[axis]) - (*low)[axis]) / (axis == 0 ? 1 : 8) + 2;
  }
  return bricks;
}

void expect_outputs(const Voxels& voxels,
                    const Geometry& geometry,
                    const OutputOptions& options = {}) {
  SCOPED_TRACE(geometry.text() + ", " + describe(voxels));
  Voxels expected;
  const std::string error = message_of([&] {
    expected =
        voxels_of(output_coords(context(), coords_matrix(context(), voxels), geometry, options));
  });
  Voxels actual;
  const std::string device_error = message_of([&] {
    actual = voxels_of(to_host(
        *gpu(), cuda::output_coords(*gpu(), coords_on_device(*gpu(), voxels), geometry, options)));
  });
  // Where an output does not fit, the CPU names a place and the device a row.
  if (error.find("32") != std::string::npos) {
    ASSERT_NE(device_error.find("32-bit"), std::string::npos) << device_error;
  } else {
    ASSERT_EQ(device_error, error);
  }
  ASSERT_EQ(actual.size(), expected.size());
  ASSERT_EQ(actual, expected);
  // With max_voxels the box may have 2^37 bricks.
  const bool wide = std::max(bricks_under(voxels), bricks_under(expected)) > 1e10;
  if (!error.empty() || options.max_voxels || wide) return;
  OutputOptions with_room = options;
  for (const int64_t more : {1, 1000}) {
    with_room.max_voxels = static_cast<int64_t>(expected.size()) + more;
    expect_outputs(voxels, geometry, with_room);
  }
}

// Named in the test's list, so that the sanitizers' short list can leave the random ones out.
class Clouds : public OnGpu, public ::testing::WithParamInterface<const char*> {};

INSTANTIATE_TEST_SUITE_P(List,
                         Clouds,
                         ::testing::Values("empty",
                                           "odd",
                                           "street",
                                           "extreme",
                                           "full:5",
                                           "full:8",
                                           "full:13",
                                           "line:31",
                                           "line:129",
                                           "shell:8",
                                           "shell:33",
                                           "gap:129",
                                           "repeat:129",
                                           "repeat:1000",
                                           "random:129:6",
                                           "random:1000:900"),
                         [](const auto& info) {
                           std::string name = info.param;
                           std::replace(name.begin(), name.end(), ':', '_');
                           return name;
                         });

const Geometry strided[] = {
    {.size = {2, 2, 2}, .stride = {2, 2, 2}},
    {.size = {3, 3, 3}, .stride = {2, 2, 2}, .padding = {1, 1, 1}},
    {.size = {3, 3, 3}, .padding = {1, 1, 1}},
    {.size = {5, 3, 1}, .stride = {3, 1, 2}, .padding = {2, 0, 0}, .dilation = {2, 1, 1}},
    {.size = {1, 1, 1}, .stride = {3, 3, 3}},
};

TEST_P(Clouds, Unique) { expect_unique(cloud(GetParam())); }

TEST_P(Clouds, Find) {
  const Voxels voxels = cloud(GetParam());
  const Matrix host = coords_matrix(context(), voxels);
  const VoxelIndex expected(context(), host);
  const Matrix coords = coords_on_device(*gpu(), voxels);
  const auto index = cuda::make_index(*gpu(), coords);
  EXPECT_EQ(index->find(0, 1 << 30, 7, 7), expected.find(0, 1 << 30, 7, 7));
  for (size_t i = 0; i < voxels.size(); i += 1 + voxels.size() / 20) {
    const Voxel& v = voxels[i];
    EXPECT_EQ(index->find(v[0], v[1], v[2], v[3]), expected.find(v[0], v[1], v[2], v[3]));
    const auto off = static_cast<int32_t>(static_cast<uint32_t>(v[3]) ^ 1);
    EXPECT_EQ(index->find(v[0], v[1], v[2], off), expected.find(v[0], v[1], v[2], off));
  }
}

TEST_P(Clouds, SubmanifoldMap) {
  const Voxels voxels = cloud(GetParam());
  for (const Int3& size :
       {Int3{3, 3, 3}, Int3{1, 1, 1}, Int3{2, 2, 2}, Int3{5, 5, 5}, Int3{3, 1, 4}}) {
    expect_submanifold(voxels, Geometry::submanifold(size));
  }
  expect_submanifold(voxels, Geometry::submanifold({3, 3, 3}, {2, 1, 5}));
}

TEST_P(Clouds, OutputCoords) {
  const Voxels voxels = cloud(GetParam());
  for (const Geometry& geometry : strided) {
    expect_outputs(voxels, geometry);
    expect_outputs(voxels, geometry, {OutputRule::floor});
    expect_outputs(voxels, geometry, {OutputRule::reached, Int3{9, 7, 12}});
  }
}

TEST_P(Clouds, StridedMap) {
  const Voxels in = cloud(GetParam());
  for (const Geometry& geometry : strided) {
    Voxels out = in;
    const std::string error = message_of(
        [&] { out = voxels_of(output_coords(context(), coords_matrix(context(), in), geometry)); });
    expect_general(in, out, geometry);
    expect_general(out, in, geometry);
  }
}

using Coords = OnGpu;

TEST_F(Coords, AgreeWithTheCpuAtRandom) {
  for_two_seconds([&](Random& random) {
    const Voxels voxels = random_voxels(&random, 150);
    ASSERT_NO_FATAL_FAILURE(expect_unique(voxels));
    OutputOptions options;
    const Geometry geometry = random_geometry(&random, false);
    if (random.integer(0, 2) == 0) options.rule = OutputRule::floor;
    if (random.integer(0, 2) == 0) options.spatial_shape = Int3{30, 20, 100};
    ASSERT_NO_FATAL_FAILURE(expect_outputs(voxels, geometry, options));
  });
}

using Maps = OnGpu;

TEST_F(Maps, AgreeWithTheCpuAtRandom) {
  for_two_seconds([&](Random& random) {
    const Voxels voxels = random_voxels(&random, 150);
    Geometry geometry = random_geometry(&random, true);
    if (random.integer(0, 1) == 0) geometry = Geometry::submanifold({3, 3, 3});
    ASSERT_NO_FATAL_FAILURE(expect_submanifold(voxels, geometry));
    ASSERT_NO_FATAL_FAILURE(
        expect_general(voxels, random_voxels(&random, 150), random_geometry(&random, false)));
  });
}

TEST_F(Maps, ReachBeyondInt32) {
  const Voxels voxels = {{0, int32_min, int32_min, 0},
                         {0, int32_max, int32_max, 0},
                         {0, int32_min, int32_max, 3},
                         {0, int32_max, int32_max, 1},
                         {0, -1, 0, 0}};
  expect_submanifold(voxels, Geometry::submanifold({3, 3, 3}, {int32_max, int32_max, 1}));
  expect_general(voxels, voxels,
                 {.size = {2, 2, 2},
                  .stride = {int32_max, 2, 1},
                  .padding = {int32_max, 1, 0},
                  .dilation = {int32_max, int32_max, int32_max}});
}

TEST_F(Maps, EmptySides) {
  const Voxels one = {{3, -7, 8, 9}};
  for (const auto& [in, out] : {std::pair{Voxels{}, one}, {one, Voxels{}}, {Voxels{}, Voxels{}}}) {
    expect_general(in, out, {.size = {2, 2, 2}, .stride = {2, 2, 2}});
  }
}

TEST_F(Maps, LargestKernels) {
  Random random(3);
  const Voxels voxels = random_voxels(&random, 40);
  expect_submanifold(voxels, Geometry::submanifold({16, 16, 16}));
  expect_submanifold(voxels, Geometry::submanifold({1, 1, 4096}));
}

// Many blocks of threads, few and many bricks, one voxel repeated.
TEST_F(Maps, Crowds) {
  const Voxels same(5000, Voxel{2, -9, 4, 1});
  Voxels eighths;  // voxels in one octant of their bricks only
  for (int i = 0; i < 30000; ++i)
    eighths.push_back({0, 8 * (i % 31), 8 * (i / 31 % 31), 8 * (i / 961)});
  for (const Voxels& voxels :
       {crowded_voxels(90001, 0), crowded_voxels(90001, 100000000), same, eighths}) {
    expect_unique(voxels);
    expect_submanifold(voxels, Geometry::submanifold({3, 3, 3}));
    for (const Geometry& geometry : strided) {
      expect_outputs(voxels, geometry);
      expect_general(
          voxels, voxels_of(output_coords(context(), coords_matrix(context(), voxels), geometry)),
          geometry);
    }
  }
}

// Two keys are needed to sort the widest sets that the index takes.
TEST_F(Coords, WidestBox) {
  Voxels voxels;
  Random random("widest");
  for (int i = 0; i < 3000; ++i) {
    const auto any = [&] { return static_cast<int32_t>(random.integer(int32_min, int32_max)); };
    voxels.push_back({0, any(), any(), static_cast<int32_t>(random.integer(0, 255))});
  }
  voxels.insert(voxels.end(), {{0, int32_min, int32_max, 0}, {0, int32_max, int32_min, 255}});
  expect_unique(voxels);
  expect_submanifold(voxels, Geometry::submanifold({3, 3, 3}));
  expect_outputs(voxels, {.size = {1, 1, 1}}, {OutputRule::floor});
  expect_outputs(voxels, {.size = {2, 2, 2}, .stride = {2, 2, 1}});
}

TEST_F(Coords, TooWideABoxIsAnError) {
  const Voxels voxels = {{0, int32_min, int32_min, int32_min},
                         {0, int32_max, int32_max, int32_max}};
  const std::string expected =
      message_of([&] { unique(context(), coords_matrix(context(), voxels)); });
  const Matrix coords = coords_on_device(*gpu(), voxels);
  EXPECT_NE(expected, "");
  EXPECT_EQ(message_of([&] { unique(*gpu(), coords); }), expected);
  EXPECT_EQ(message_of([&] { cuda::make_index(*gpu(), coords)->unique_voxels(); }), expected);
  EXPECT_EQ(message_of([&] { cuda::make_index(*gpu(), coords)->find(0, 0, 0, 0); }), expected);
  expect_outputs(voxels, {.size = {1, 1, 1}});
  const KernelMap map = submanifold_on_device(coords, Geometry::submanifold({3, 3, 3}));
  EXPECT_EQ(message_of([&] { map.pairs(*gpu()); }),
            "the input coordinates span more than 2^63 bricks of 8^3 voxels");
  for (const int32_t row : fetched<int32_t>(*gpu(), map.neighbours)) ASSERT_EQ(row, -1);
}

TEST_F(Coords, OutputsBeyondInt32AreAnError) {
  EXPECT_EQ(message_of([&] {
              cuda::output_coords(*gpu(),
                                  coords_on_device(*gpu(), {{0, 0, 0, 0}, {0, int32_max, 0, 0}}),
                                  {.padding = {1, 0, 0}}, {});
            }),
            "row 1 of the coordinates reaches an output voxel that 32-bit coordinates cannot hold");
  expect_outputs({{0, int32_max, 0, 0}}, {.padding = {1, 0, 0}});
  expect_outputs({{0, 0, 0, int32_min}}, {.dilation = {1, 1, 3}});
}

// Coordinates that do not stand at a multiple of 16 bytes.
TEST_F(Coords, AnyAlignment) {
  const Voxels voxels = cloud("repeat:1000");
  std::vector<int32_t> shifted(1 + 4 * voxels.size());
  std::memcpy(shifted.data() + 1, voxels.data(), voxels.size() * sizeof(Voxel));
  const MatrixRef host = {.data = shifted.data(),
                          .rows = 1,
                          .cols = static_cast<int64_t>(shifted.size()),
                          .stride = static_cast<int64_t>(shifted.size()),
                          .dtype = Dtype::i32};
  const Matrix memory = to_device(*gpu(), host);
  const MatrixRef coords = {.data = memory.as<int32_t>() + 1,
                            .rows = static_cast<int64_t>(voxels.size()),
                            .cols = 4,
                            .stride = 4,
                            .dtype = Dtype::i32,
                            .device = memory.device};
  const Geometry geometry = Geometry::submanifold({3, 3, 3});
  expect_same_map(submanifold_on_device(coords, geometry),
                  build_submanifold_map(context(), coords_matrix(context(), voxels), geometry));
}

TEST_F(Coords, FirstRowOutside) {
  const Voxels voxels = {{0, 1, 2, 3}, {1, 0, 0, 0}, {0, 5, 9, 2}, {0, -1, 0, 0}};
  const Matrix host = coords_matrix(context(), voxels);
  const Matrix coords = to_device(*gpu(), host);
  using Limits = std::array<int64_t, 4>;
  constexpr int64_t any = int64_t{1} << 32;
  for (const Limits& limits :
       {Limits{any, any, any, any}, Limits{2, any, any, any}, Limits{1, any, any, any},
        Limits{2, 6, any, any}, Limits{2, 5, 10, any}, Limits{any, any, any, 3},
        Limits{0, any, any, any}, Limits{any, any / 2, any, any}}) {
    EXPECT_EQ(cuda::first_row_outside(*gpu(), coords, limits),
              cpu::first_row_outside(context(), host, limits));
  }
}

// Rows of padding before, between and behind the voxels.
Voxels padded(const Voxels& voxels, Random& random) {
  Voxels rows;
  for (size_t i = 0; i <= voxels.size(); ++i) {
    const int64_t more = random.integer(0, 3) == 0 ? random.integer(1, 40) : 0;
    rows.insert(rows.end(), more, Voxel{padding_batch, 1, static_cast<int32_t>(i), -1});
    if (i < voxels.size()) rows.push_back(voxels[i]);
  }
  return rows;
}

TEST_F(Maps, OfPaddedCoordinates) {
  for_two_seconds([&](Random& random) {
    const Voxels voxels = padded(random_voxels(&random, 150), random);
    ASSERT_NO_FATAL_FAILURE(expect_unique(voxels));
    ASSERT_NO_FATAL_FAILURE(expect_submanifold(voxels, Geometry::submanifold({3, 3, 3})));
    ASSERT_NO_FATAL_FAILURE(expect_submanifold(voxels, random_geometry(&random, true)));
    const Geometry geometry = random_geometry(&random, false);
    ASSERT_NO_FATAL_FAILURE(expect_outputs(voxels, geometry));
    ASSERT_NO_FATAL_FAILURE(
        expect_general(voxels, padded(random_voxels(&random, 150), random), geometry));
  });
}

// What a set without room for its voxels leads to.
void expect_failure(const KernelMap& map, const std::string& text) {
  const Context& ctx = *gpu();
  const KernelMap turned = transpose(ctx, map);
  for (KernelMap each : {map, turned}) {
    ASSERT_EQ(message_of([&] { each.pairs(ctx); }), text);
    ASSERT_EQ(message_of([&] { settle(ctx, &each); }), text);
    for (const int32_t row : fetched<int32_t>(ctx, each.neighbours)) ASSERT_EQ(row, -1);
  }
}

TEST_F(Coords, WithoutRoom) {
  const Context& ctx = *gpu();
  const Voxels voxels = crowded_voxels(5000, 1000);
  const Matrix coords = coords_on_device(ctx, voxels);
  const Geometry down{.size = {3, 3, 3}, .stride = {2, 2, 2}, .padding = {1, 1, 1}};
  const int64_t outputs = cuda::output_coords(ctx, coords, down, {}).rows;
  for (const int64_t room : {outputs - 1, outputs / 2, int64_t{1}}) {
    const Matrix out = cuda::output_coords(ctx, coords, down, {.max_voxels = room});
    const Matrix further = cuda::output_coords(ctx, out, down, {.max_voxels = 100});
    ASSERT_EQ(out.rows, room);
    const KernelMap map = build_kernel_map(ctx, coords, out, down);
    const std::string text = message_of([&] { map.pairs(ctx); });
    ASSERT_EQ(text.find("output_coords found at least "), 0U) << text;
    ASSERT_NE(text.find(join(" voxels, max_voxels is ", room)), std::string::npos) << text;
    if (room == outputs - 1) {
      ASSERT_NE(text.find(join(" ", outputs, " ")), std::string::npos) << text;
    }
    expect_failure(map, text);
    expect_failure(submanifold_on_device(out, Geometry::submanifold({3, 3, 3})), text);
    expect_failure(submanifold_on_device(out, Geometry::submanifold({7, 1, 1})), text);
    expect_failure(build_kernel_map(ctx, out, further, down), text);
    expect_failure(submanifold_on_device(further, Geometry::submanifold({3, 3, 3})), text);
    ASSERT_EQ(message_of([&] { unique(ctx, out); }), text);
    ASSERT_EQ(message_of([&] { cuda::output_coords(ctx, out, down, {}); }), text);
  }
  const Matrix edge = coords_on_device(ctx, {{0, int32_max, 0, 0}, {0, 0, 0, 0}});
  const Geometry beyond{.padding = {1, 0, 0}};
  const std::string reason =
      "output_coords with max_voxels was given coordinates whose output voxels span too wide a box "
      "or do not fit 32 bits";
  const Matrix none = cuda::output_coords(ctx, edge, beyond, {.max_voxels = 10});
  expect_failure(build_kernel_map(ctx, edge, none, beyond), reason);
  const Matrix wide =
      coords_on_device(ctx, {{0, int32_min, int32_min, 0}, {0, int32_max, int32_max, 0}});
  const Geometry same{.size = {1, 1, 1}};
  const Matrix nowhere = cuda::output_coords(ctx, wide, same, {.max_voxels = 10});
  expect_failure(build_kernel_map(ctx, wide, nowhere, same), reason);
}

TEST_F(Maps, AreTheSameBitsEveryTime) {
  const Voxels voxels = crowded_voxels(20000, 1000);
  const Matrix coords = coords_on_device(*gpu(), voxels);
  const Geometry geometry{.size = {3, 3, 3}, .stride = {2, 2, 2}, .padding = {1, 1, 1}};
  std::vector<int32_t> first;
  for (int repeat = 0; repeat < 20; ++repeat) {
    const KernelMap fine = submanifold_on_device(coords, Geometry::submanifold({3, 3, 3}));
    const Matrix out = cuda::output_coords(*gpu(), coords, geometry, {});
    std::vector<int32_t> all = fetched<int32_t>(*gpu(), fine.neighbours);
    for (const Matrix& matrix : {fine.in_first, out, unique(*gpu(), coords).inverse}) {
      const auto more = fetched<int32_t>(*gpu(), matrix);
      all.insert(all.end(), more.begin(), more.end());
    }
    if (repeat == 0) first = all;
    ASSERT_EQ(all, first);
  }
}

TEST_F(Maps, ReplayFromAGraphWithOtherCoordinates) {
  const Context ctx = arena_context(*gpu(), size_t{64} << 20);
  const cudaStream_t stream = cuda::stream_of(ctx);
  const Voxels clouds[] = {crowded_voxels(3000, 0), crowded_voxels(3000, 5000),
                           random_cloud(3000, 18, 1)};
  const Geometry fine = Geometry::submanifold({3, 3, 3});
  const Geometry coarse{.size = {2, 2, 2}, .stride = {2, 2, 2}};
  const Matrix coords = coords_on_device(ctx, clouds[0]);
  cuda::check_cuda(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), "begin");
  const KernelMap map = build_submanifold_map(ctx, coords, fine);
  const KernelMap general = build_kernel_map(ctx, coords, coords, coarse);
  const KernelMap turned = transpose(ctx, general);
  EXPECT_NE(message_of([&] { unique(ctx, coords); }), "");
  cudaGraph_t graph = nullptr;
  cuda::check_cuda(cudaStreamEndCapture(stream, &graph), "end");
  cudaGraphExec_t replay = nullptr;
  cuda::check_cuda(cudaGraphInstantiate(&replay, graph, 0), "instantiate");
  for (const Voxels& voxels : clouds) {
    const Matrix host = coords_matrix(context(), voxels);
    copy(ctx, host, coords);
    cuda::check_cuda(cudaGraphLaunch(replay, stream), "launch");
    expect_same_map(map, build_submanifold_map(context(), host, fine));
    const KernelMap expected = build_kernel_map(context(), host, host, coarse);
    expect_same_map(general, expected);
    expect_same_map(turned, transpose(context(), expected));
  }
  cuda::check_cuda(cudaGraphExecDestroy(replay), "destroy");
  cuda::check_cuda(cudaGraphDestroy(graph), "destroy");
}

// Levels of a network whose sizes the host does not know.
TEST_F(Maps, ReplayOutputsFromAGraphWithOtherCoordinates) {
  const Context ctx = arena_context(*gpu(), size_t{64} << 20);
  const cudaStream_t stream = cuda::stream_of(ctx);
  const Geometry down{.size = {3, 3, 3}, .stride = {2, 2, 2}, .padding = {1, 1, 1}};
  const Geometry same = Geometry::submanifold({3, 3, 3});
  constexpr int rows = 3000;
  const OutputOptions room = {.max_voxels = 2000};
  const Matrix coords = make_matrix(ctx, rows, 4, Dtype::i32);
  cuda::check_cuda(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), "begin");
  const Matrix out = cuda::output_coords(ctx, coords, down, room);
  const KernelMap map = build_kernel_map(ctx, coords, out, down);
  const KernelMap turned = transpose(ctx, map);
  const KernelMap inside = build_submanifold_map(ctx, out, same);
  cudaGraph_t graph = nullptr;
  cuda::check_cuda(cudaStreamEndCapture(stream, &graph), "end");
  cudaGraphExec_t replay = nullptr;
  cuda::check_cuda(cudaGraphInstantiate(&replay, graph, 0), "instantiate");
  for (const auto& [count, distance] : {std::pair{300, 0}, {rows, 5000}, {500, 3}, {400, 5000}}) {
    Voxels voxels = crowded_voxels(count, distance);
    voxels.resize(rows, {padding_batch, 0, 0, 0});
    const Matrix host = coords_matrix(context(), voxels);
    copy(ctx, host, coords);
    cuda::check_cuda(cudaGraphLaunch(replay, stream), "launch");
    const int64_t outputs = output_coords(context(), host, down).rows;
    if (outputs > *room.max_voxels) {
      expect_failure(map, join("output_coords found at least ", outputs, " voxels, max_voxels is ",
                               *room.max_voxels));
      continue;
    }
    const Matrix expected_out = output_coords(context(), host, down, room);
    ASSERT_EQ(fetched<int32_t>(ctx, out), fetched<int32_t>(ctx, expected_out));
    const KernelMap expected = build_kernel_map(context(), host, expected_out, down);
    expect_same_map(map, expected);
    expect_same_map(turned, transpose(context(), expected));
    expect_same_map(inside, build_submanifold_map(context(), expected_out, same));
  }
  cuda::check_cuda(cudaGraphExecDestroy(replay), "destroy");
  cuda::check_cuda(cudaGraphDestroy(graph), "destroy");
}

// More entries in the table than 32 bits count: 27 taps of 448^3 rows.
TEST_F(Maps, BigTable) {
  const Context& ctx = *gpu();
  size_t free_bytes = 0;
  size_t total_bytes = 0;
  cuda::check_cuda(cudaMemGetInfo(&free_bytes, &total_bytes), "cudaMemGetInfo");
  if (free_bytes < size_t{40} << 30) GTEST_SKIP() << "needs 40 GiB of device memory";
  constexpr int extent = 448;
  constexpr int64_t rows = int64_t{extent} * extent * extent;
  Matrix host = make_matrix(context(), rows, 4, Dtype::i32);
  for (int64_t row = 0; row < rows; ++row) {
    const auto r = static_cast<int32_t>(row);
    const Voxel voxel = {0, r / extent / extent, r / extent % extent, r % extent};
    std::copy(voxel.begin(), voxel.end(), host.row<int32_t>(row));
  }
  const Geometry geometry = Geometry::submanifold({3, 3, 3});
  const KernelMap map = submanifold_on_device(to_device(ctx, host), geometry);
  const auto on_axis = [](int tap) { return int64_t{tap == 1 ? extent : extent - 1}; };
  const auto pairs = fetched<int64_t>(ctx, map.pairs_per_tap);
  Random random("big");
  for (int tap = 0; tap < 27; ++tap) {
    const Int3 at = geometry.tap(tap);
    EXPECT_EQ(pairs[tap], on_axis(at[0]) * on_axis(at[1]) * on_axis(at[2]));
    for (int piece = 0; piece < 4; ++piece) {
      constexpr int64_t length = 10000;
      const int64_t first = piece == 0 ? rows - length : random.integer(0, rows - length);
      const MatrixRef part = {.data = map.neighbours.row<int32_t>(tap) + first,
                              .rows = 1,
                              .cols = length,
                              .stride = length,
                              .dtype = Dtype::i32,
                              .device = ctx.device};
      const auto neighbours = fetched<int32_t>(ctx, part);
      for (int64_t i = 0; i < length; ++i) {
        const auto* c = host.row<int32_t>(first + i);
        int64_t expected = 0;
        for (int axis = 0; axis < 3; ++axis) {
          const int64_t place = c[axis + 1] + at[axis] - 1;
          expected = place < 0 || place >= extent || expected < 0 ? -1 : expected * extent + place;
        }
        ASSERT_EQ(neighbours[i], expected) << "tap " << tap << ", row " << first + i;
      }
    }
  }
}

}  // namespace
}  // namespace voxgemm::test
