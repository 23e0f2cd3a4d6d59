// SPDX-License-Identifier: Apache-2.0
//
// The blocked convolution of the CPU: y[o] = bias + sum over taps of x[in(o, t)] W[t], over any
// schedule.
//
// A task is one chunk of the schedule, one block of output columns and one slice of the taps. It
// keeps an f32 accumulator [chunk rows, block columns] in its worker's scratch (sized for the
// second-level cache), walks the chunk's tiles, compacts each index block to the rows that are
// present and lets the engine add x[in] W[tap] to the accumulator; then it rounds once and writes
// the rows of y. Taps are visited in rising order for every row, so results are the same bits for
// every schedule without slices, tile size, number of threads and column block.
//
// Weights are packed first, all taps of as many column blocks as fit the packing budget; wider
// weights go through in several passes. With slices each slice writes an f32 partial sum and a last
// step adds them in order.
//
// Memory: packed weights and partial sums at most 24 MiB each, 0.5 MiB and a few tiles per worker.
#include "cpu/convolution.h"

#include <algorithm>
#include <cstring>

#include "voxgemm/error.h"

namespace voxgemm::cpu {
namespace {

constexpr size_t packed_budget = size_t{24} << 20;
constexpr int64_t partial_budget = int64_t{24} << 20;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

struct ColumnBlocks {
  int width = 0;  // of every block but the last; a multiple of the engine's panel
  int count = 0;
  int at_once = 0;  // packed together
};

// Enough blocks that every worker has tasks, and none wider than the packing budget allows.
ColumnBlocks cut_columns(const Engine& engine,
                         const Context& ctx,
                         const ConvArgs& args,
                         int64_t row_tasks) {
  const int n = args.w.c_out;
  // Narrower blocks would leave registers unused.
  const auto unit =
      static_cast<int>(std::min<int64_t>(round_up(n, engine.panel_cols), engine.block_cols));
  const auto units = static_cast<int>(ceil_div(n, unit));
  const auto fits = [&](int width) {
    return args.w.taps * engine.packed_bytes(args.w.c_in, width) <= packed_budget;
  };
  // Four tasks a worker even out the differences between chunks.
  const int64_t wanted =
      ctx.threads == 1 ? 1 : ceil_div(int64_t{4} * ctx.threads, std::max<int64_t>(row_tasks, 1));
  int units_per_block = std::max<int64_t>(1, units / std::clamp<int64_t>(wanted, 1, units));
  while (units_per_block > 1 && !fits(units_per_block * unit)) --units_per_block;
  ColumnBlocks blocks;
  blocks.width = units_per_block * unit;
  blocks.count = static_cast<int>(ceil_div(n, blocks.width));
  const size_t bytes = args.w.taps * engine.packed_bytes(args.w.c_in, std::min(n, blocks.width));
  blocks.at_once = std::clamp<int>(static_cast<int>(packed_budget / std::max<size_t>(bytes, 1)), 1,
                                   blocks.count);
  return blocks;
}

// One column block of one batch.
struct Columns {
  int first;
  int count;
};

struct Run {
  const Kernel& kernel;
  const Engine& engine;
  const Context& ctx;
  const ConvArgs& args;
  ColumnBlocks blocks;
  size_t packed_tap_bytes = 0;  // of one tap of one block
  char* packed = nullptr;       // [at_once, taps]
  float* partial = nullptr;     // [slices, partial_rows, c_out] with slices
  int64_t partial_rows = 0;
  int64_t first_chunk = 0;  // of those whose partial sums are at hand

  Columns columns(int block) const {
    const int first = block * blocks.width;
    return {first, std::min(blocks.width, args.w.c_out - first)};
  }
  char* packed_tap(int slot, int tap) const {
    return packed + (static_cast<size_t>(slot) * args.w.taps + tap) * packed_tap_bytes;
  }
};

void pack(const Run& run, int block, int slot, int tap) {
  const WeightsRef& w = run.args.w;
  const Columns columns = run.columns(block);
  const int source = run.args.mirror_taps ? w.taps - 1 - tap : tap;
  const auto* data =
      static_cast<const char*>(w.data) + (source * w.tap_stride + columns.first * w.out_stride) *
                                             static_cast<int64_t>(size_of(w.dtype));
  run.engine.pack({.weights = data,
                   .k_stride = w.in_stride,
                   .n_stride = w.out_stride,
                   .k = w.c_in,
                   .n = columns.count,
                   .packed = run.packed_tap(slot, tap)});
}

// A worker's memory, cut from one allocation.
struct Scratch {
  float* acc;
  int32_t* in_rows;
  int32_t* positions;
  void* engine;
};

size_t scratch_bytes(const Run& run) {
  const ScheduleOptions& options = run.args.schedule->options();
  const size_t acc = size_t{4} * options.chunk_rows * run.blocks.width;
  const size_t lists = size_t{2} * 4 * round_up(options.tile_rows + 16, 16);
  const size_t engine = run.engine.scratch_bytes(run.args.w.c_in, run.blocks.width);
  return round_up(acc + lists + engine, 64);
}

Scratch carve(const Run& run, char* memory) {
  const ScheduleOptions& options = run.args.schedule->options();
  Scratch scratch;
  scratch.acc = reinterpret_cast<float*>(memory);
  memory += size_t{4} * options.chunk_rows * run.blocks.width;
  scratch.in_rows = reinterpret_cast<int32_t*>(memory);
  memory += size_t{4} * round_up(options.tile_rows + 16, 16);
  scratch.positions = reinterpret_cast<int32_t*>(memory);
  memory += size_t{4} * round_up(options.tile_rows + 16, 16);
  scratch.engine = memory;
  return scratch;
}

// Rows of f32 sums.
struct Sums {
  const float* acc;
  int64_t stride;
  int64_t rows;
};

struct Task {
  int64_t chunk;
  int block;  // column block
  int slot;   // of its packed weights
  int slice;
};

void accumulate(const Run& run, const Task& task, const Scratch& scratch) {
  const Schedule& schedule = *run.args.schedule;
  const Columns columns = run.columns(task.block);
  const int64_t first_row = task.chunk * schedule.options().chunk_rows;
  const int first_tap = task.slice * run.args.w.taps / run.kernel.slices;
  const int end_tap = (task.slice + 1) * run.args.w.taps / run.kernel.slices;
  const bool natural = schedule.options().order == ScheduleOptions::Order::natural;
  for (int64_t t = schedule.first_tile(task.chunk); t < schedule.first_tile(task.chunk + 1); ++t) {
    const Tile tile = schedule.tile(t);
    for (int b = 0; b < tile.blocks; ++b) {
      const IndexBlock block = schedule.block(tile, b);
      if (block.tap < first_tap || block.tap >= end_tap) continue;
      const int pairs =
          run.engine.compact(block.rows, tile.rows, 0, scratch.in_rows, scratch.positions);
      if (pairs == 0) continue;
      if (!natural) {
        for (int i = 0; i < pairs; ++i) {
          scratch.positions[i] =
              static_cast<int32_t>(schedule.row(tile, scratch.positions[i]) - first_row);
        }
      }
      run.engine.multiply({.x = run.args.x.data,
                           .x_stride = run.args.x.stride,
                           .k = run.args.w.c_in,
                           .n = columns.count,
                           .packed = run.packed_tap(task.slot, block.tap),
                           .in_rows = scratch.in_rows,
                           .acc_rows = scratch.positions,
                           .pairs = pairs,
                           .acc = scratch.acc,
                           .acc_stride = run.blocks.width,
                           .scratch = scratch.engine,
                           .begun = true});
    }
  }
}

// Rows of y from `row` on.
void store_rows(const Run& run, const Columns& columns, int64_t row, const Sums& sums) {
  const auto size = static_cast<int64_t>(size_of(run.args.y.dtype));
  const auto* bias = static_cast<const char*>(run.args.bias);
  const auto from = [&](const MatrixRef& m) {
    return static_cast<char*>(m.data) + (row * m.stride + columns.first) * size;
  };
  const MatrixRef& residual = run.args.residual;
  run.engine.store({.acc = sums.acc,
                    .acc_stride = sums.stride,
                    .bias = bias != nullptr ? bias + columns.first * size : nullptr,
                    .residual = residual.data != nullptr ? from(residual) : nullptr,
                    .residual_stride = residual.stride,
                    .relu = run.args.relu,
                    .y = from(run.args.y),
                    .y_stride = run.args.y.stride,
                    .rows = sums.rows,
                    .n = columns.count});
}

void run_task(const Run& run, const Task& task, const Scratch& scratch) {
  const Columns columns = run.columns(task.block);
  const int64_t chunk_rows = run.args.schedule->options().chunk_rows;
  const int64_t first_row = task.chunk * chunk_rows;
  const int64_t rows = std::min(chunk_rows, run.args.y.rows - first_row);
  std::memset(scratch.acc, 0, sizeof(float) * rows * run.blocks.width);
  run.engine.begin();
  accumulate(run, task, scratch);
  run.engine.end();
  if (run.partial == nullptr) {
    store_rows(run, columns, first_row, {scratch.acc, run.blocks.width, rows});
    return;
  }
  const int64_t place = task.slice * run.partial_rows + (task.chunk - run.first_chunk) * chunk_rows;
  for (int64_t row = 0; row < rows; ++row) {
    std::memcpy(run.partial + (place + row) * run.args.w.c_out + columns.first,
                scratch.acc + row * run.blocks.width, sizeof(float) * columns.count);
  }
}

// The partial sums of the slices, added in order into the first.
void add_slices(const Run& run, const Columns& columns) {
  constexpr int64_t rows_per_task = 256;
  const int64_t first_row = run.first_chunk * run.args.schedule->options().chunk_rows;
  const int64_t rows = std::min(run.partial_rows, run.args.y.rows - first_row);
  const int64_t stride = run.args.w.c_out;
  parallel_for(run.ctx, ceil_div(rows, rows_per_task), [&](int64_t task, int) {
    const int64_t end = std::min(rows, (task + 1) * rows_per_task);
    for (int64_t row = task * rows_per_task; row < end; ++row) {
      float* sum = run.partial + row * stride + columns.first;
      for (int slice = 1; slice < run.kernel.slices; ++slice) {
        const float* part = sum + slice * run.partial_rows * stride;
        for (int c = 0; c < columns.count; ++c) sum[c] += part[c];
      }
    }
    const int64_t row = task * rows_per_task;
    store_rows(run, columns, first_row + row,
               {run.partial + row * stride + columns.first, stride, end - row});
  });
}

}  // namespace

void convolve(const Kernel& kernel, const Context& ctx, const ConvArgs& args) {
  const auto& engine = *static_cast<const Engine*>(kernel.family);
  const int64_t chunks = args.schedule->chunks();
  const int64_t row_tasks = chunks * kernel.slices;
  const ColumnBlocks blocks = cut_columns(engine, ctx, args, row_tasks);
  Run run{.kernel = kernel, .engine = engine, .ctx = ctx, .args = args, .blocks = blocks};
  run.packed_tap_bytes =
      round_up(engine.packed_bytes(args.w.c_in, std::min(blocks.width, args.w.c_out)), 64);
  const std::shared_ptr<void> packed =
      ctx.allocate(run.packed_tap_bytes * args.w.taps * blocks.at_once);
  run.packed = static_cast<char*>(packed.get());
  std::shared_ptr<void> partial;
  int64_t chunks_at_once = chunks;
  if (kernel.slices > 1) {
    const int64_t chunk_rows = args.schedule->options().chunk_rows;
    const int64_t row_bytes = int64_t{4} * kernel.slices * args.w.c_out;
    chunks_at_once = std::clamp<int64_t>(partial_budget / (row_bytes * chunk_rows), 1, chunks);
    run.partial_rows = chunks_at_once * chunk_rows;
    partial = ctx.allocate(row_bytes * run.partial_rows);
    run.partial = static_cast<float*>(partial.get());
  }
  const size_t worker_bytes = scratch_bytes(run);
  const std::shared_ptr<void> workers =
      ctx.allocate(worker_bytes *
                   std::max<int64_t>(1, std::min<int64_t>(ctx.threads, row_tasks * blocks.count)));

  for (int first = 0; first < blocks.count; first += blocks.at_once) {
    const int batch = std::min(blocks.at_once, blocks.count - first);
    parallel_for(ctx, static_cast<int64_t>(batch) * args.w.taps, [&](int64_t task, int) {
      const int slot = static_cast<int>(task / args.w.taps);
      pack(run, first + slot, slot, static_cast<int>(task % args.w.taps));
    });
    for (run.first_chunk = 0; run.first_chunk < chunks; run.first_chunk += chunks_at_once) {
      const int64_t count = std::min(chunks_at_once, chunks - run.first_chunk);
      parallel_for(ctx, count * kernel.slices * batch, [&](int64_t number, int worker) {
        Task task;
        task.slice = static_cast<int>(number % kernel.slices);
        task.slot = static_cast<int>(number / kernel.slices % batch);
        task.block = first + task.slot;
        task.chunk = run.first_chunk + number / kernel.slices / batch;
        run_task(run, task, carve(run, static_cast<char*>(workers.get()) + worker * worker_bytes));
      });
      if (kernel.slices == 1) continue;
      const int begin = run.columns(first).first;
      const Columns last = run.columns(first + batch - 1);
      add_slices(run, {begin, last.first + last.count - begin});
    }
  }
}

}  // namespace voxgemm::cpu
