// SPDX-License-Identifier: Apache-2.0
// Index, maps and coordinate sets of sphere shells in raster and in shuffled row order, and of
// points far apart. Names are WHAT/ORDER/SIZE/THREADS: map_bench
// --benchmark_filter=submanifold3/raster
#include <benchmark/benchmark.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "voxgemm/kernel_map.h"

namespace {

using voxgemm::Context;
using voxgemm::Dtype;
using voxgemm::Geometry;
using voxgemm::Matrix;

// Voxels with size/2 - 1.25 <= distance from the centre <= size/2, in raster order.
std::vector<std::array<int32_t, 4>> shell(int size) {
  const float radius = static_cast<float>(size) / 2;
  const auto offset = [&](int i) { return static_cast<float>(i) - radius + 0.5F; };
  std::vector<std::array<int32_t, 4>> voxels;
  for (int x = 0; x < size; ++x) {
    for (int y = 0; y < size; ++y) {
      for (int z = 0; z < size; ++z) {
        const float distance =
            std::sqrt(offset(x) * offset(x) + offset(y) * offset(y) + offset(z) * offset(z));
        if (distance >= radius - 1.25F && distance <= radius) voxels.push_back({0, x, y, z});
      }
    }
  }
  return voxels;
}

// Points far apart: a brick for every voxel.
std::vector<std::array<int32_t, 4>> scattered(int64_t count) {
  std::mt19937 random(1);
  std::uniform_int_distribution<int32_t> coordinate(0, 1 << 14);
  std::vector<std::array<int32_t, 4>> voxels(static_cast<size_t>(count));
  for (auto& voxel : voxels) {
    voxel = {0, coordinate(random), coordinate(random), coordinate(random)};
  }
  return voxels;
}

Matrix matrix(const Context& ctx, std::vector<std::array<int32_t, 4>> voxels, bool shuffled) {
  if (shuffled) std::shuffle(voxels.begin(), voxels.end(), std::mt19937(7));
  Matrix coords = voxgemm::make_matrix(ctx, static_cast<int64_t>(voxels.size()), 4, Dtype::i32);
  for (size_t r = 0; r < voxels.size(); ++r) {
    std::copy_n(voxels[r].data(), 4, coords.row<int32_t>(static_cast<int64_t>(r)));
  }
  return coords;
}

void add(const std::string& cloud, const Matrix& coords) {
  const Context ctx = Context::cpu(1);
  const auto run = [&](const std::string& what, const auto& body) {
    for (const int threads : {1, 2}) {
      const std::string name = what + "/" + cloud + "/" + std::to_string(threads);
      const auto measure = [=, workers = Context::cpu(threads)](benchmark::State& state) {
        for (auto step : state) body(workers, coords);
        state.counters["voxels/s"] = benchmark::Counter(
            static_cast<double>(coords.rows), benchmark::Counter::kIsIterationInvariantRate);
      };
      benchmark::RegisterBenchmark(name.c_str(), measure)
          ->Unit(benchmark::kMillisecond)
          ->UseRealTime();
    }
  };
  const Geometry strided{.size = {3, 3, 3}, .stride = {2, 2, 2}, .padding = {1, 1, 1}};
  const Geometry down{.size = {2, 2, 2}, .stride = {2, 2, 2}};
  run("index", [](const Context& c, const Matrix& m) {
    benchmark::DoNotOptimize(voxgemm::VoxelIndex(c, m));
  });
  for (const int size : {3, 5}) {
    run("submanifold" + std::to_string(size), [size](const Context& c, const Matrix& m) {
      const auto geometry = Geometry::submanifold({size, size, size});
      benchmark::DoNotOptimize(voxgemm::build_submanifold_map(c, m, geometry));
    });
  }
  run("unique",
      [](const Context& c, const Matrix& m) { benchmark::DoNotOptimize(voxgemm::unique(c, m)); });
  for (const Geometry& geometry : {strided, down}) {
    run("output_coords_" + geometry.text(), [geometry](const Context& c, const Matrix& m) {
      benchmark::DoNotOptimize(voxgemm::output_coords(c, m, geometry));
    });
    const Matrix out = voxgemm::output_coords(ctx, coords, geometry);
    run("map_" + geometry.text(), [geometry, out](const Context& c, const Matrix& m) {
      benchmark::DoNotOptimize(voxgemm::build_kernel_map(c, m, out, geometry));
    });
    const auto map = voxgemm::build_kernel_map(ctx, coords, out, geometry);
    run("transpose_" + geometry.text(), [map](const Context& c, const Matrix&) {
      benchmark::DoNotOptimize(voxgemm::transpose(c, map));
    });
  }
}

}  // namespace

int main(int argc, char** argv) {
  const Context ctx = Context::cpu(1);
  for (const int size : {64, 128, 256, 512}) {
    add("raster/" + std::to_string(size), matrix(ctx, shell(size), false));
    add("shuffled/" + std::to_string(size), matrix(ctx, shell(size), true));
  }
  add("scattered/1000000", matrix(ctx, scattered(1000000), false));
  benchmark::Initialize(&argc, argv);
  benchmark::RunSpecifiedBenchmarks();
  return 0;
}
