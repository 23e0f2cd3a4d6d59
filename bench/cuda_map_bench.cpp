// SPDX-License-Identifier: Apache-2.0
// Maps on a CUDA device: us of sphere shells in raster and in shuffled row order, and of points far
// apart. Launched: the mean of 30 calls one after another, the host's part included where it is the
// slower one. Replayed: the median of 21 launches of a graph, which work that waits for the device
// has none of. cuda_map_bench [CLOUD ...] runs some clouds.
#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "cuda/device.h"
#include "voxgemm/cuda.h"
#include "voxgemm/schedule.h"

namespace {

using voxgemm::Context;
using voxgemm::KernelMap;
using voxgemm::Matrix;
using voxgemm::Schedule;
using voxgemm::ScheduleOptions;
using voxgemm::cuda::check_cuda;
using Voxels = std::vector<std::array<int32_t, 4>>;
using Body = std::function<void(const Context&)>;

// Voxels with size/2 - 1.25 <= distance from the centre <= size/2, in raster order.
Voxels shell(int size) {
  const float radius = static_cast<float>(size) / 2;
  const auto offset = [&](int i) { return static_cast<float>(i) - radius + 0.5F; };
  Voxels voxels;
  for (int x = 0; x < size; ++x) {
    for (int y = 0; y < size; ++y) {
      const float square = offset(x) * offset(x) + offset(y) * offset(y);
      for (int z = 0; square <= radius * radius && z < size; ++z) {
        const float distance = std::sqrt(square + offset(z) * offset(z));
        if (distance >= radius - 1.25F && distance <= radius) voxels.push_back({0, x, y, z});
      }
    }
  }
  return voxels;
}

Voxels scattered(int64_t count) {
  std::mt19937 random(1);
  std::uniform_int_distribution<int32_t> coordinate(0, 999);
  Voxels voxels(static_cast<size_t>(count));
  for (auto& voxel : voxels) {
    voxel = {0, coordinate(random), coordinate(random), coordinate(random)};
  }
  return voxels;
}

Matrix on_device(const Context& ctx, const Voxels& voxels) {
  const auto rows = static_cast<int64_t>(voxels.size());
  Matrix coords = voxgemm::make_matrix(ctx, rows, 4, voxgemm::Dtype::i32);
  const voxgemm::MatrixRef host = {.data = const_cast<int32_t*>(voxels[0].data()),
                                   .rows = rows,
                                   .cols = 4,
                                   .stride = 4,
                                   .dtype = voxgemm::Dtype::i32};
  voxgemm::copy(ctx, host, coords);
  return coords;
}

double launched(const Context& ctx, const Body& body) {
  constexpr int calls = 30;
  for (int i = 0; i < 3; ++i) body(ctx);
  voxgemm::synchronize(ctx);
  const auto start = std::chrono::steady_clock::now();
  for (int i = 0; i < calls; ++i) body(ctx);
  voxgemm::synchronize(ctx);
  const std::chrono::duration<double, std::milli> time = std::chrono::steady_clock::now() - start;
  return time.count() / calls;
}

// The graph takes its memory from one piece, which is never reused inside it.
double replayed(const Context& ctx, const Matrix& arena, const Body& body) {
  Context inside = ctx;
  inside.allocate = [&arena, used = size_t{0}](size_t bytes) mutable {
    const size_t place = used;
    used += (bytes + 255) / 256 * 256;
    voxgemm::check(used <= sizeof(int32_t) * arena.cols, "the arena has ", arena.cols,
                   " words, the graph needs more");
    return std::shared_ptr<void>(arena.storage, arena.as<char>() + place);
  };
  const cudaStream_t stream = voxgemm::cuda::stream_of(ctx);
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t replay = nullptr;
  check_cuda(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), "begin");
  body(inside);
  check_cuda(cudaStreamEndCapture(stream, &graph), "end");
  check_cuda(cudaGraphInstantiate(&replay, graph, 0), "instantiate");
  cudaEvent_t events[2];
  for (cudaEvent_t& event : events) check_cuda(cudaEventCreate(&event), "create");
  std::vector<float> times;
  for (int i = 0; i < 24; ++i) {
    check_cuda(cudaEventRecord(events[0], stream), "record");
    check_cuda(cudaGraphLaunch(replay, stream), "launch");
    check_cuda(cudaEventRecord(events[1], stream), "record");
    check_cuda(cudaEventSynchronize(events[1]), "wait");
    float time = 0;
    check_cuda(cudaEventElapsedTime(&time, events[0], events[1]), "time");
    if (i >= 3) times.push_back(time);
  }
  for (cudaEvent_t& event : events) check_cuda(cudaEventDestroy(event), "destroy");
  check_cuda(cudaGraphExecDestroy(replay), "destroy");
  check_cuda(cudaGraphDestroy(graph), "destroy");
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

void measure(const Context& ctx, const std::string& name, const Voxels& voxels) {
  const Matrix coords = on_device(ctx, voxels);
  const auto geometry = voxgemm::Geometry::submanifold({3, 3, 3});
  // Twice the index, the table, the room of the schedule and what sorts it take.
  const Matrix arena =
      voxgemm::make_matrix(ctx, 1, (int64_t{16} << 20) + coords.rows * 250, voxgemm::Dtype::i32);
  const auto build_map = [&](const Context& c) {
    return voxgemm::build_submanifold_map(c, coords, geometry);
  };
  const KernelMap map = build_map(ctx);
  const auto scheduled = [](int chunk_rows) {
    return ScheduleOptions{ScheduleOptions::Order::by_mask, 1, 128, chunk_rows};
  };
  const voxgemm::Geometry down{.size = {3, 3, 3}, .stride = {2, 2, 2}, .padding = {1, 1, 1}};
  const Matrix out = voxgemm::output_coords(ctx, coords, down);
  const KernelMap down_map = voxgemm::build_kernel_map(ctx, coords, out, down);
  const voxgemm::OutputOptions with_room{.max_voxels = out.rows + 1};
  const std::vector<Body> bodies = {
      build_map,
      [&](const Context& c) { Schedule::build(c, map, scheduled(voxgemm::one_chunk)); },
      [&](const Context& c) { Schedule::build(c, map, scheduled(65536)); },
      [&](const Context& c) { Schedule::build(c, build_map(c), scheduled(65536)); },
      [&](const Context& c) { voxgemm::output_coords(c, coords, down, with_room); },
      [&](const Context& c) { voxgemm::build_kernel_map(c, coords, out, down); },
      [&](const Context& c) { voxgemm::transpose(c, down_map); },
  };
  std::printf("%-14s %8lld", name.c_str(), static_cast<long long>(coords.rows));
  for (const Body& body : bodies) {
    std::printf(" %7.1f %6.1f", 1e3 * launched(ctx, body), 1e3 * replayed(ctx, arena, body));
  }
  const Body counted = [&](const Context& c) { voxgemm::output_coords(c, coords, down); };
  std::printf(" %7.1f\n", 1e3 * launched(ctx, counted));
  std::fflush(stdout);
}

}  // namespace

int main(int argc, char** argv) {
  const Context ctx = voxgemm::cuda_context(0);
  const std::vector<std::string> wanted(argv + 1, argv + argc);
  std::printf(
      "us launched and replayed: 3^3 map; its schedule; in chunks of 65536 rows; map and that "
      "schedule; k3s2p1: outputs with max_voxels, map, transposed; outputs counted (launched)\n");
  const auto run = [&](const std::string& name, const auto& make) {
    if (wanted.empty() || std::find(wanted.begin(), wanted.end(), name) != wanted.end()) {
      measure(ctx, name, make());
    }
  };
  for (const int size : {32, 64, 128, 256, 512, 1024, 1600}) {
    run("shell:" + std::to_string(size), [&] { return shell(size); });
    if (size != 512 && size != 1024) continue;
    run("shuffled:" + std::to_string(size), [&] {
      Voxels voxels = shell(size);
      std::shuffle(voxels.begin(), voxels.end(), std::mt19937(7));
      return voxels;
    });
  }
  run("scattered:10M", [] { return scattered(10000000); });
  return 0;
}
