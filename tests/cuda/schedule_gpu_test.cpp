// SPDX-License-Identifier: Apache-2.0
// Schedules that the device builds, against the CPU's: the same elements.
#include "conv/schedule.h"
#include "cuda/device.h"
#include "cuda/gpu.h"
#include "support/random_coords.h"

namespace voxgemm::test {
namespace {

using Order = ScheduleOptions::Order;

std::string text(const ScheduleOptions& o) {
  return join(o.groups, " groups, ", o.tile_rows, " tile rows, ", o.chunk_rows, " chunk rows");
}

// One and several groups, tiles a chunk, chunks, slabs of 32 tiles.
std::vector<ScheduleOptions> all_options(int taps) {
  std::vector<ScheduleOptions> list;
  for (const int tile_rows : {64, 128, 192}) {
    for (const int chunk_rows : {tile_rows, 3 * tile_rows, 40 * tile_rows, 70 * tile_rows}) {
      for (int groups = (taps + 31) / 32; groups <= taps; groups = groups * 2 + 1) {
        list.push_back({Order::by_mask, groups, tile_rows, chunk_rows});
      }
    }
  }
  list.push_back({Order::by_mask, taps, 64, one_chunk});
  list.push_back({Order::by_mask, (taps + 31) / 32, 128, one_chunk});
  return list;
}

// The map with its table on the device; nothing else of it is read.
KernelMap on_device(const KernelMap& host) {
  KernelMap map = host;
  map.neighbours = to_device(*gpu(), host.neighbours);
  return map;
}

// The first rows of a matrix, or columns where it is one row.
template <class T>
std::vector<T> fetched_front(const MatrixRef& m, int64_t rows, int64_t cols) {
  MatrixRef front = m;
  front.rows = rows;
  front.cols = cols;
  return fetched<T>(*gpu(), front);
}

void expect_same_parts(const ScheduleParts& parts, const ScheduleParts& expected) {
  const Context& ctx = *gpu();
  const auto expect_same = [&]<class T>(T, const Matrix& matrix, const Matrix& wanted) {
    ASSERT_EQ(matrix.rows, wanted.rows);
    ASSERT_EQ(matrix.cols, wanted.cols);
    ASSERT_EQ(fetched<T>(ctx, matrix), fetched<T>(ctx, wanted));
  };
  expect_same(int32_t{}, parts.order, expected.order);
  expect_same(int32_t{}, parts.tiles, expected.tiles);
  expect_same(int32_t{}, parts.masks, expected.masks);
  const int64_t blocks = expected.block_taps.cols;
  ASSERT_GE(parts.indices.rows, blocks);
  ASSERT_EQ(parts.indices.cols, expected.indices.cols);
  ASSERT_TRUE(parts.chunk_tiles.empty() && parts.block_taps.empty());
  ASSERT_EQ(fetched_front<int32_t>(parts.indices, blocks, parts.indices.cols),
            fetched<int32_t>(ctx, expected.indices));
}

void expect_same_schedule(const KernelMap& host,
                          const KernelMap& device,
                          const ScheduleOptions& options) {
  SCOPED_TRACE(text(options));
  const Schedule expected = Schedule::build(context(), host, options);
  for (int repeat = 0; repeat < 2; ++repeat) {
    const Schedule built = Schedule::build(*gpu(), device, options);
    ASSERT_EQ(built.options(), options);
    ASSERT_EQ(built.rows(), expected.rows());
    ASSERT_EQ(built.taps(), expected.taps());
    ASSERT_NO_FATAL_FAILURE(expect_same_parts(built.parts(), expected.parts()));
  }
}

KernelMap submanifold(const std::string& name, const Int3& size) {
  return build_submanifold_map(context(), coords_matrix(context(), cloud(name)),
                               Geometry::submanifold(size));
}

class ScheduledLayers : public OnGpu, public ::testing::WithParamInterface<std::string> {};

TEST_P(ScheduledLayers, AreTheCpus) {
  const Case c = make_case(context(), problem_text(Pass::forward, Dtype::f32, GetParam()));
  const KernelMap device = on_device(c.map);
  for (const ScheduleOptions& options : all_options(c.map.taps())) {
    ASSERT_NO_FATAL_FAILURE(expect_same_schedule(c.map, device, options));
  }
}

INSTANTIATE_TEST_SUITE_P(List,
                         ScheduledLayers,
                         ::testing::ValuesIn(layers()),
                         [](const auto& info) { return std::to_string(info.index); });

class ScheduledClouds : public OnGpu, public ::testing::WithParamInterface<const char*> {};

// Many slabs in a segment; chunks of about a tenth and one of all rows; keys of every width.
TEST_P(ScheduledClouds, AreTheCpus) {
  const KernelMap map = submanifold(GetParam(), {3, 3, 3});
  const KernelMap device = on_device(map);
  for (const int groups : {1, 2, 3, 9, 27}) {
    for (const int chunk_rows : {2048, 8192, 65536, one_chunk}) {
      ASSERT_NO_FATAL_FAILURE(
          expect_same_schedule(map, device, {Order::by_mask, groups, 128, chunk_rows}));
    }
  }
  ASSERT_NO_FATAL_FAILURE(expect_same_schedule(map, device, {Order::by_mask, 2, 64, one_chunk}));
  ASSERT_NO_FATAL_FAILURE(expect_same_schedule(map, device, {Order::by_mask, 3, 256, 2560}));
}

INSTANTIATE_TEST_SUITE_P(
    List,
    ScheduledClouds,
    ::testing::Values("shell:64", "shell:128", "random:20000:60", "random:90001:70", "repeat:9000"),
    [](const auto& info) {
      std::string name = info.param;
      std::replace(name.begin(), name.end(), ':', '_');
      return name;
    });

using Schedules = OnGpu;

TEST_F(Schedules, OfGroupsOf32Taps) {
  const KernelMap map = submanifold("random:9000:26", {4, 4, 4});
  const KernelMap device = on_device(map);
  for (const int groups : {2, 3, 64}) {
    for (const int chunk_rows : {512, 8192, one_chunk}) {
      ASSERT_NO_FATAL_FAILURE(
          expect_same_schedule(map, device, {Order::by_mask, groups, 128, chunk_rows}));
    }
  }
}

TEST_F(Schedules, OfRandomTables) {
  for_two_seconds([&](Random& random) {
    KernelMap map = submanifold(join("line:", random.integer(1, 6000)), {3, 3, 3});
    auto* table = map.neighbours.as<int32_t>();
    // From nearly no neighbour to nearly all.
    const int64_t share = random.integer(0, 100);
    for (int64_t i = 0; i < 27 * map.n_out; ++i) {
      table[i] = random.integer(0, 99) < share
                     ? static_cast<int32_t>(random.integer(0, map.n_in - 1))
                     : -1;
    }
    const auto tile_rows = static_cast<int>(64 * random.integer(1, 4));
    const auto chunk_rows = static_cast<int>(tile_rows * random.integer(1, 50));
    const auto groups = static_cast<int>(random.integer(1, 27));
    const KernelMap device = on_device(map);
    ASSERT_NO_FATAL_FAILURE(
        expect_same_schedule(map, device, {Order::by_mask, groups, tile_rows, chunk_rows}));
  });
}

// Of maps that the device built: along z inputs follow each other or not, in some rows and in all.
TEST_F(Schedules, OfMapsWithMasks) {
  for (const char* name : {"shell:64", "random:20000:40", "random:30000:200", "repeat:9000"}) {
    for (const Int3& size : {Int3{3, 3, 3}, Int3{2, 2, 2}, Int3{1, 3, 5}}) {
      Voxels voxels = cloud(name);
      for (const bool sorted : {false, true}) {
        if (sorted) std::sort(voxels.begin(), voxels.end());
        const Matrix coords = coords_matrix(context(), voxels);
        Geometry geometry = Geometry::submanifold({3, 3, 3});
        geometry.size = size;
        const KernelMap host = build_kernel_map(context(), coords, coords, geometry);
        const Matrix there = to_device(*gpu(), coords);
        const KernelMap device = build_kernel_map(*gpu(), there, there, geometry);
        ASSERT_FALSE(device.masks.empty());
        for (const int groups : {1, 2, 3, 4, 9}) {
          if (groups > host.taps()) continue;
          ASSERT_NO_FATAL_FAILURE(
              expect_same_schedule(host, device, {Order::by_mask, groups, 128, 8192}));
        }
      }
    }
  }
}

// Outside of captures, where there would be room for more than 32 MiB.
TEST_F(Schedules, TakeNoMoreThanTheyNeed) {
  for (const char* cloud : {"shell:180", "shell:330"}) {
    const KernelMap map = submanifold(cloud, {3, 3, 3});
    const KernelMap device = on_device(map);
    for (const int groups : {1, 3}) {
      const ScheduleOptions options = {Order::by_mask, groups, 128, 65536};
      const Schedule expected = Schedule::build(context(), map, options);
      const Schedule built = Schedule::build(*gpu(), device, options);
      ASSERT_NO_FATAL_FAILURE(expect_same_parts(built.parts(), expected.parts()));
      const int64_t room = built.parts().tiles.rows / groups * 27;
      EXPECT_EQ(built.parts().indices.rows == expected.parts().indices.rows,
                room * 128 * int64_t{sizeof(int32_t)} > int64_t{32} << 20);
    }
  }
}

// A map that could not be built has no pairs; its schedule is valid and does nothing.
TEST_F(Schedules, OfAMapThatCouldNotBeBuilt) {
  const Voxels voxels = {{0, int32_min, int32_min, int32_min},
                         {0, int32_max, int32_max, int32_max}};
  const KernelMap map = build_submanifold_map(*gpu(), coords_on_device(*gpu(), voxels),
                                              Geometry::submanifold({3, 3, 3}));
  KernelMap host = map;
  host.neighbours = to_host(*gpu(), map.neighbours);
  for (const int32_t row : fetched<int32_t>(context(), host.neighbours)) ASSERT_EQ(row, -1);
  ASSERT_NO_FATAL_FAILURE(expect_same_schedule(host, map, {Order::by_mask, 3, 128, one_chunk}));
}

TEST_F(Schedules, ReplayFromAGraphWithOtherCoordinates) {
  const Context ctx = arena_context(*gpu(), size_t{512} << 20);
  const cudaStream_t stream = cuda::stream_of(ctx);
  constexpr int rows = 30000;
  const Voxels clouds[] = {crowded_voxels(rows, 0), crowded_voxels(rows, 5000),
                           random_cloud(rows, 40, 1), random_cloud(rows, 200, 2)};
  const ScheduleOptions options[] = {{Order::by_mask, 1, 128, one_chunk},
                                     {Order::by_mask, 3, 128, one_chunk},
                                     {Order::by_mask, 2, 64, 8192}};
  const Geometry geometry = Geometry::submanifold({3, 3, 3});
  const Matrix coords = coords_on_device(ctx, clouds[0]);
  cuda::check_cuda(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), "begin");
  const KernelMap map = build_submanifold_map(ctx, coords, geometry);
  std::vector<Schedule> schedules;
  for (const ScheduleOptions& o : options) schedules.push_back(Schedule::build(ctx, map, o));
  cudaGraph_t graph = nullptr;
  cuda::check_cuda(cudaStreamEndCapture(stream, &graph), "end");
  cudaGraphExec_t replay = nullptr;
  cuda::check_cuda(cudaGraphInstantiate(&replay, graph, 0), "instantiate");
  for (const Voxels& voxels : clouds) {
    const Matrix host = coords_matrix(context(), voxels);
    copy(ctx, host, coords);
    cuda::check_cuda(cudaGraphLaunch(replay, stream), "launch");
    const KernelMap expected = build_submanifold_map(context(), host, geometry);
    for (size_t i = 0; i < schedules.size(); ++i) {
      SCOPED_TRACE(text(options[i]));
      ASSERT_NO_FATAL_FAILURE(expect_same_parts(
          schedules[i].parts(), Schedule::build(context(), expected, options[i]).parts()));
    }
  }
  cuda::check_cuda(cudaGraphExecDestroy(replay), "destroy");
  cuda::check_cuda(cudaGraphDestroy(graph), "destroy");
}

}  // namespace
}  // namespace voxgemm::test
