// SPDX-License-Identifier: Apache-2.0
//
// The weight gradient of the CPU: dW[t] = sum over pairs (i, o, t) of x[i]^T dy[o].
//
// Chunks of the schedule are dealt to a fixed number of slices (a function of the problem, not of
// the threads); a task is one slice and one range of taps. It walks the slice's tiles in order,
// compacts each index block and lets the engine add the outer products to the slice's f32 partial
// sum of that tap. The partial sums of a tap are added in slice order at the end, so the bits do
// not depend on the threads.
//
// Memory: partial sums at most 32 MiB, or one tap's where that is more; where all taps do not fit
// they go through in batches.
#include "cpu/weight_gradient.h"

#include <algorithm>
#include <cstring>

#include "core/dispatch.h"

namespace voxgemm::cpu {
namespace {

constexpr int64_t partial_budget = int64_t{32} << 20;
// More slices than this cost more in the last sum than they win in parallel work.
constexpr int64_t most_slices = 16;
// A slice shorter than this spends its time on clearing and adding partial sums.
constexpr int64_t rows_per_slice = 2048;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Run {
  const Engine& engine;
  const Context& ctx;
  const ConvArgs& args;
  int64_t slices;
  int first_tap;
  int taps;        // of this batch
  float* partial;  // [slices, taps, c_in, c_out]

  int64_t tap_size() const { return static_cast<int64_t>(args.w.c_in) * args.w.c_out; }
  float* sum(int64_t slice, int tap) const {
    return partial + (slice * taps + tap - first_tap) * tap_size();
  }
};

struct Scratch {
  int32_t* x_rows;
  int32_t* dy_rows;
  void* engine;
};

struct TapRange {
  int first;
  int end;
};

void accumulate(const Run& run, int64_t slice, const TapRange& range, const Scratch& scratch) {
  const Schedule& schedule = *run.args.schedule;
  const WeightsRef& dw = run.args.w;
  for (int tap = range.first; tap < range.end; ++tap) {
    std::memset(run.sum(slice, tap), 0, sizeof(float) * run.tap_size());
  }
  const bool natural = schedule.options().order == ScheduleOptions::Order::natural;
  const int64_t first_chunk = slice * schedule.chunks() / run.slices;
  const int64_t end_chunk = (slice + 1) * schedule.chunks() / run.slices;
  for (int64_t t = schedule.first_tile(first_chunk); t < schedule.first_tile(end_chunk); ++t) {
    const Tile tile = schedule.tile(t);
    for (int b = 0; b < tile.blocks; ++b) {
      const IndexBlock block = schedule.block(tile, b);
      if (block.tap < range.first || block.tap >= range.end) continue;
      const int pairs =
          run.engine.compact(block.rows, tile.rows, natural ? static_cast<int32_t>(tile.first) : 0,
                             scratch.x_rows, scratch.dy_rows);
      if (pairs == 0) continue;
      for (int i = 0; !natural && i < pairs; ++i) {
        scratch.dy_rows[i] = static_cast<int32_t>(schedule.row(tile, scratch.dy_rows[i]));
      }
      run.engine.outer({.x = run.args.x.data,
                        .x_stride = run.args.x.stride,
                        .dy = run.args.y.data,
                        .dy_stride = run.args.y.stride,
                        .x_rows = scratch.x_rows,
                        .dy_rows = scratch.dy_rows,
                        .pairs = pairs,
                        .k = dw.c_in,
                        .n = dw.c_out,
                        .dw = run.sum(slice, block.tap),
                        .dw_stride = dw.c_out,
                        .scratch = scratch.engine,
                        .begun = true});
    }
  }
}

void add_slices(const Run& run) {
  const WeightsRef& dw = run.args.w;
  // A task is one row of one tap's matrix.
  parallel_for(run.ctx, static_cast<int64_t>(run.taps) * dw.c_in, [&](int64_t task, int) {
    const int tap = run.first_tap + static_cast<int>(task / dw.c_in);
    const int64_t k = task % dw.c_in;
    float* sum = run.sum(0, tap) + k * dw.c_out;
    for (int64_t slice = 1; slice < run.slices; ++slice) {
      const float* part = run.sum(slice, tap) + k * dw.c_out;
      for (int n = 0; n < dw.c_out; ++n) sum[n] += part[n];
    }
    dispatch_float(dw.dtype, [&]<class T>(Type<T>) {
      auto* result = static_cast<T*>(dw.data) + tap * dw.tap_stride + k * dw.in_stride;
      for (int n = 0; n < dw.c_out; ++n) store(sum[n], result[n * dw.out_stride]);
    });
  });
}

}  // namespace

void weight_gradient(const Kernel& kernel, const Context& ctx, const ConvArgs& args) {
  const auto& engine = *static_cast<const Engine*>(kernel.family);
  const WeightsRef& dw = args.w;
  const int64_t tap_bytes = int64_t{4} * dw.c_in * dw.c_out;
  const int64_t budget_slices = std::max<int64_t>(1, partial_budget / (tap_bytes * dw.taps));
  const int64_t slices =
      std::max<int64_t>(1, std::min({most_slices, budget_slices, args.y.rows / rows_per_slice,
                                     args.schedule->chunks()}));
  const int batch =
      static_cast<int>(std::clamp<int64_t>(partial_budget / (tap_bytes * slices), 1, dw.taps));
  const std::shared_ptr<void> partial = ctx.allocate(slices * batch * tap_bytes);

  const int64_t list = ceil_div(args.schedule->options().tile_rows + 16, 16) * 16;
  const size_t list_bytes = 2 * sizeof(int32_t) * list;
  const size_t worker_bytes =
      list_bytes + ceil_div(static_cast<int64_t>(engine.scratch_bytes(dw.c_in, dw.c_out)), 64) * 64;
  const std::shared_ptr<void> workers = ctx.allocate(worker_bytes * std::max(1, ctx.threads));

  for (int first = 0; first < dw.taps; first += batch) {
    const int taps = std::min(batch, dw.taps - first);
    const Run run{engine, ctx, args, slices, first, taps, static_cast<float*>(partial.get())};
    // Taps are split too where the slices alone do not occupy the workers; a narrow range walks the
    // schedule again, so only as far as needed.
    const int64_t ranges =
        ctx.threads == 1 ? 1
                         : std::clamp<int64_t>(ceil_div(int64_t{4} * ctx.threads, slices), 1, taps);
    parallel_for(ctx, slices * ranges, [&](int64_t task, int worker) {
      const int64_t range = task % ranges;
      char* memory = static_cast<char*>(workers.get()) + worker * worker_bytes;
      auto* x_rows = reinterpret_cast<int32_t*>(memory);
      engine.begin();
      accumulate(run, task / ranges,
                 {first + static_cast<int>(range * taps / ranges),
                  first + static_cast<int>((range + 1) * taps / ranges)},
                 {x_rows, x_rows + list, memory + list_bytes});
      engine.end();
    });
    add_slices(run);
  }
}

}  // namespace voxgemm::cpu
