// SPDX-License-Identifier: Apache-2.0
// The inner loops of the CPU passes without their drivers: one thread, a 3^3 submanifold map of a
// shell of voxels in raster order. FLOP/s are useful ones, 2 * pairs * c_in * c_out per pass. One
// line per
//   pass/isa/dtype/c_in x c_out/rows of a tile.

#include "cpu/engine.h"

#include <benchmark/benchmark.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <new>
#include <random>
#include <string>
#include <vector>

namespace voxgemm::cpu {
namespace {

constexpr int taps = 27;

struct Shell {
  int rows = 0;
  int64_t pairs = 0;
  std::vector<int32_t> neighbours;  // [taps, rows]

  explicit Shell(int size) {
    const int side = size + 2;
    std::vector<int32_t> row_at(static_cast<size_t>(side) * side * side, -1);
    const auto place = [side](int x, int y, int z) {
      return (static_cast<size_t>(x) * side + y) * side + z;
    };
    std::vector<size_t> places;
    for (int x = 0; x < size; ++x) {
      for (int y = 0; y < size; ++y) {
        for (int z = 0; z < size; ++z) {
          const float centre = static_cast<float>(size) / 2 - 0.5F;
          const float distance = std::hypot(x - centre, y - centre, z - centre);
          if (distance > size / 2.0F || distance < size / 2.0F - 1.25F) continue;
          row_at[place(x + 1, y + 1, z + 1)] = rows++;
          places.push_back(place(x + 1, y + 1, z + 1));
        }
      }
    }
    neighbours.resize(static_cast<size_t>(taps) * rows);
    for (int tap = 0; tap < taps; ++tap) {
      const int64_t offset = (int64_t{tap / 9 - 1} * side + tap / 3 % 3 - 1) * side + tap % 3 - 1;
      for (int row = 0; row < rows; ++row) {
        const int32_t in = row_at[places[row] + offset];
        neighbours[static_cast<size_t>(tap) * rows + row] = in;
        pairs += in >= 0 ? 1 : 0;
      }
    }
  }
};

struct Free {
  void operator()(void* data) const { ::operator delete (data, std::align_val_t{64}); }
};
using Bytes = std::unique_ptr<void, Free>;

Bytes bytes(size_t size) {
  Bytes result(::operator new (size, std::align_val_t{64}));
  std::memset(result.get(), 0, size);
  return result;
}

// Elements in [1, 2) of any dtype: no subnormals, no overflow.
Bytes features(Dtype dtype, int64_t n) {
  Bytes result = bytes(n * size_of(dtype));
  std::mt19937 random(1);
  for (int64_t i = 0; i < n; ++i) {
    const float value = 1.0F + static_cast<float>(random() % 128) / 128;
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const uint16_t half = static_cast<uint16_t>(
        dtype == Dtype::bf16 ? bits >> 16 : 0x3c00 | ((bits & 0x7fffff) >> 13));
    if (dtype == Dtype::f32) {
      static_cast<float*>(result.get())[i] = value;
    } else {
      static_cast<uint16_t*>(result.get())[i] = half;
    }
  }
  return result;
}

struct Layer {
  const Engine& engine;
  int channels;
  int tile_rows;
  const Shell& shell;
  Bytes x = features(engine.dtype, int64_t{shell.rows} * channels);
  Bytes y = features(engine.dtype, int64_t{shell.rows} * channels);
  Bytes scratch = bytes(engine.scratch_bytes(channels, channels));
  std::vector<int32_t> in_rows = std::vector<int32_t>(tile_rows + 16);
  std::vector<int32_t> positions = std::vector<int32_t>(tile_rows + 16);

  int pairs_of(int first, int rows, int tap, int32_t first_position) {
    return engine.compact(&shell.neighbours[static_cast<size_t>(tap) * shell.rows + first], rows,
                          first_position, in_rows.data(), positions.data());
  }
  void* row(const Bytes& matrix, int row) const {
    return static_cast<char*>(matrix.get()) + int64_t{row} * channels * size_of(engine.dtype);
  }
};

void forward(Layer& layer, const Bytes& packed, float* acc) {
  const Engine& engine = layer.engine;
  engine.begin();
  const int channels = layer.channels;
  const int64_t acc_stride =
      int64_t{channels + engine.panel_cols - 1} / engine.panel_cols * engine.panel_cols;
  const size_t tap_bytes = engine.packed_bytes(channels, channels);
  for (int first = 0; first < layer.shell.rows; first += layer.tile_rows) {
    const int rows = std::min(layer.tile_rows, layer.shell.rows - first);
    std::memset(acc, 0, rows * acc_stride * sizeof(float));
    for (int tap = 0; tap < taps; ++tap) {
      const int pairs = layer.pairs_of(first, rows, tap, 0);
      engine.multiply({.x = layer.x.get(),
                       .x_stride = channels,
                       .k = channels,
                       .n = channels,
                       .packed = static_cast<const char*>(packed.get()) + tap * tap_bytes,
                       .in_rows = layer.in_rows.data(),
                       .acc_rows = layer.positions.data(),
                       .pairs = pairs,
                       .acc = acc,
                       .acc_stride = acc_stride,
                       .scratch = layer.scratch.get(),
                       .begun = true});
    }
    engine.store({.acc = acc,
                  .acc_stride = acc_stride,
                  .bias = nullptr,
                  .y = layer.row(layer.y, first),
                  .y_stride = channels,
                  .rows = rows,
                  .n = channels});
  }
  engine.end();
}

void grad_weight(Layer& layer, float* dw) {
  layer.engine.begin();
  const int channels = layer.channels;
  for (int first = 0; first < layer.shell.rows; first += layer.tile_rows) {
    const int rows = std::min(layer.tile_rows, layer.shell.rows - first);
    for (int tap = 0; tap < taps; ++tap) {
      const int pairs = layer.pairs_of(first, rows, tap, first);
      layer.engine.outer({.x = layer.x.get(),
                          .x_stride = channels,
                          .dy = layer.y.get(),
                          .dy_stride = channels,
                          .x_rows = layer.in_rows.data(),
                          .dy_rows = layer.positions.data(),
                          .pairs = pairs,
                          .k = channels,
                          .n = channels,
                          .dw = dw + int64_t{tap} * channels * channels,
                          .dw_stride = channels,
                          .scratch = layer.scratch.get(),
                          .begun = true});
    }
  }
  layer.engine.end();
}

void report(benchmark::State& state, const Layer& layer) {
  const double flops =
      2.0 * static_cast<double>(layer.shell.pairs) * layer.channels * layer.channels;
  state.counters["GFLOP/s"] =
      benchmark::Counter(flops * 1e-9, benchmark::Counter::kIsIterationInvariantRate);
}

const Shell& shell(int channels) {
  static const Shell small(64);
  static const Shell large(128);
  return channels < 128 ? large : small;
}

void run_forward(benchmark::State& state, const Engine* engine, int channels, int tile_rows) {
  Layer layer{
      .engine = *engine, .channels = channels, .tile_rows = tile_rows, .shell = shell(channels)};
  const size_t tap_bytes = engine->packed_bytes(channels, channels);
  const Bytes weights = features(engine->dtype, int64_t{channels} * channels);
  const Bytes packed = bytes(taps * tap_bytes);
  for (int tap = 0; tap < taps; ++tap) {
    engine->pack({.weights = weights.get(),
                  .k_stride = 1,
                  .n_stride = channels,
                  .k = channels,
                  .n = channels,
                  .packed = static_cast<char*>(packed.get()) + tap * tap_bytes});
  }
  const Bytes acc = bytes(int64_t{tile_rows} * (channels + engine->panel_cols) * sizeof(float));
  for (auto _ : state) forward(layer, packed, static_cast<float*>(acc.get()));
  report(state, layer);
}

void run_grad_weight(benchmark::State& state, const Engine* engine, int channels, int tile_rows) {
  Layer layer{
      .engine = *engine, .channels = channels, .tile_rows = tile_rows, .shell = shell(channels)};
  const Bytes dw = bytes(int64_t{taps} * channels * channels * sizeof(float));
  for (auto _ : state) grad_weight(layer, static_cast<float*>(dw.get()));
  report(state, layer);
}

void run_pack(benchmark::State& state, const Engine* engine, int channels) {
  const Bytes weights = features(engine->dtype, int64_t{channels} * channels * taps);
  const Bytes packed = bytes(engine->packed_bytes(channels, channels));
  for (auto _ : state) {
    engine->pack({.weights = weights.get(),
                  .k_stride = 1,
                  .n_stride = int64_t{channels} * taps,
                  .k = channels,
                  .n = channels,
                  .packed = packed.get()});
  }
  state.SetItemsProcessed(state.iterations() * channels * channels);
}

void register_all() {
  for (const Engine* engine : engines()) {
    if (!engine->supported()) continue;
    const char* dtype = engine->dtype == Dtype::f32    ? "f32"
                        : engine->dtype == Dtype::bf16 ? "bf16"
                                                       : "f16";
    for (const int channels : {16, 32, 64, 128, 256}) {
      const auto name = [&](const char* pass, int tile_rows) {
        return std::string(pass) + '/' + engine->isa + '/' + dtype + '/' +
               std::to_string(channels) + '/' + std::to_string(tile_rows);
      };
      benchmark::RegisterBenchmark(name("pack", 0).c_str(), run_pack, engine, channels);
      for (const int tile_rows : {128, 256}) {
        benchmark::RegisterBenchmark(name("forward", tile_rows).c_str(), run_forward, engine,
                                     channels, tile_rows)
            ->Unit(benchmark::kMillisecond);
      }
      for (const int tile_rows : {256, 1024}) {
        benchmark::RegisterBenchmark(name("grad_weight", tile_rows).c_str(), run_grad_weight,
                                     engine, channels, tile_rows)
            ->Unit(benchmark::kMillisecond);
      }
    }
  }
}

}  // namespace
}  // namespace voxgemm::cpu

int main(int argc, char** argv) {
  voxgemm::cpu::register_all();
  benchmark::Initialize(&argc, argv);
  benchmark::RunSpecifiedBenchmarks();
}
