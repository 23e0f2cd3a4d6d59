// SPDX-License-Identifier: Apache-2.0
//
// Schedules by tap: the rows of a segment (one tap of one chunk) are those that have the tap; tiles
// have one index block each, so the order of the tiles is that of the rows. How many there are
// depends on the data and is read back once.
//   count_rows   a block of threads a span, which is at most 1024 rows of one chunk, and one tap.
//   count_tiles  of every segment, between two prefix sums: over the spans' rows and the
//                segments' tiles. The host reads both totals.
//   write_pairs  like count_rows. The thread of a tile's first row writes the tile's entries.
#include <algorithm>

#include "cuda/schedule_cut.cuh"
#include "cuda/sorting.h"
#include "cuda/voxel_index.cuh"

namespace voxgemm::cuda {
namespace {

constexpr unsigned all_lanes = 0xffffffff;
constexpr int pair_threads = 256;
constexpr uint32_t span_rows = 1024;

// How rows are cut by tap: a span is at most span_rows rows of one chunk.
struct Spans {
  uint32_t rows;
  uint32_t chunk_rows;
  uint32_t tile_rows;
  uint32_t taps;
  uint32_t spans;  // of a chunk

  struct Place {
    uint32_t chunk;
    uint32_t first_row;
    uint32_t rows;
  };
  __device__ Place place(uint32_t number) const {
    const uint32_t chunk = number / spans;
    const uint32_t in_chunk = (number - chunk * spans) * span_rows;
    const uint32_t first_row = chunk * chunk_rows;
    const uint32_t rows_of_chunk = min(chunk_rows, rows - first_row);
    return {chunk, first_row + in_chunk,
            in_chunk < rows_of_chunk ? min(span_rows, rows_of_chunk - in_chunk) : 0};
  }
  // Of (chunk, tap), and of the counts of its spans.
  __device__ int64_t segment(uint32_t chunk, uint32_t tap) const {
    return static_cast<int64_t>(chunk) * taps + tap;
  }
};

// The rows of a span with the tap: in each of a warp's rounds its lanes look at 32 rows.
struct SpanRows {
  static constexpr int rounds = span_rows / pair_threads;
  int32_t in[rounds];
  unsigned present[rounds];
  uint32_t count = 0;

  __device__ SpanRows(const Spans::Place& span, const int32_t* neighbours) {
    for (int i = 0; i < rounds; ++i) {
      const uint32_t offset = row(i);
      in[i] = offset < span.rows ? neighbours[span.first_row + offset] : -1;
    }
    for (int i = 0; i < rounds; ++i) {
      present[i] = __ballot_sync(all_lanes, in[i] >= 0);
      count += __popc(present[i]);
    }
  }
  __device__ uint32_t row(int round) const {
    return threadIdx.x / 32 * (32 * rounds) + round * 32 + threadIdx.x % 32;
  }
};

// counts [chunk][tap][span], one more that stays 0, and the sum of all.
__global__ void __launch_bounds__(pair_threads)
    count_rows(Spans spans, Neighbours neighbours, uint32_t* counts, unsigned long long* sum) {
  __shared__ uint32_t count;
  if (threadIdx.x == 0) count = 0;
  __syncthreads();
  const uint32_t tap = blockIdx.y;
  const Spans::Place span = spans.place(blockIdx.x);
  const SpanRows found(span, neighbours.data + tap * neighbours.stride);
  if (threadIdx.x % 32 == 0) atomicAdd(&count, found.count);
  __syncthreads();
  if (threadIdx.x != 0) return;
  const uint32_t in_chunk = blockIdx.x - span.chunk * spans.spans;
  counts[spans.segment(span.chunk, tap) * spans.spans + in_chunk] = count;
  atomicAdd(sum, static_cast<unsigned long long>(count));
}

// starts: prefix sums of the counts. tiles [segments + 1]
__global__ void count_tiles(Spans spans,
                            int64_t segments,
                            const uint32_t* starts,
                            uint32_t* tiles) {
  for (int64_t s = thread_index(); s <= segments; s += thread_count()) {
    const uint32_t rows =
        s < segments ? starts[(s + 1) * spans.spans] - starts[s * spans.spans] : 0;
    tiles[s] = (rows + spans.tile_rows - 1) / spans.tile_rows;
  }
}

struct Totals {
  unsigned long long positions;
  unsigned long long tiles;
};

__global__ void write_chunk_tiles(
    Spans spans, int64_t chunks, const uint32_t* tiles, int64_t* chunk_tiles, Totals* totals) {
  for (int64_t c = thread_index(); c <= chunks; c += thread_count()) {
    chunk_tiles[c] = tiles[c * spans.taps];
    if (c == chunks) totals->tiles = tiles[c * spans.taps];
  }
}

struct Starts {
  const uint32_t* positions;  // [chunk][tap][span], and the end
  const uint32_t* tiles;      // [chunk][tap], and the end
};

__global__ void __launch_bounds__(pair_threads)
    write_pairs(Spans spans, Neighbours neighbours, Starts starts, Arrays out) {
  __shared__ uint32_t warp_counts[pair_threads / 32];
  const uint32_t tap = blockIdx.y;
  const uint32_t warp = threadIdx.x / 32;
  const Spans::Place span = spans.place(blockIdx.x);
  const SpanRows found(span, neighbours.data + tap * neighbours.stride);
  if (threadIdx.x % 32 == 0) warp_counts[warp] = found.count;
  __syncthreads();
  const int64_t segment = spans.segment(span.chunk, tap);
  const uint32_t begin = starts.positions[segment * spans.spans];
  const uint32_t end = starts.positions[(segment + 1) * spans.spans];
  uint32_t position =
      starts.positions[segment * spans.spans + blockIdx.x - span.chunk * spans.spans];
  for (uint32_t w = 0; w < warp; ++w) position += warp_counts[w];
  const uint32_t pieces = spans.tile_rows / piece_rows;
  for (int i = 0; i < SpanRows::rounds; ++i) {
    if (found.in[i] >= 0) {
      const uint32_t at = position + __popc(found.present[i] & ((1U << threadIdx.x % 32) - 1));
      const uint32_t tile_in_segment = (at - begin) / spans.tile_rows;
      const uint32_t in_tile = (at - begin) - tile_in_segment * spans.tile_rows;
      const uint32_t tile = starts.tiles[segment] + tile_in_segment;
      out.order[at] = static_cast<int32_t>(span.first_row + found.row(i));
      out.indices[tile * int64_t{spans.tile_rows} + in_tile] = found.in[i];
      if (in_tile % piece_rows == 0) out.masks[tile * int64_t{pieces} + in_tile / piece_rows] = 1;
      if (in_tile == 0) {
        out.tiles[tile] =
            make_int4(static_cast<int>(at), static_cast<int>(tile),
                      static_cast<int>(min(spans.tile_rows, end - at)), static_cast<int>(tap));
        out.block_taps[tile] = static_cast<int32_t>(tap);
      }
    }
    position += __popc(found.present[i]);
  }
}

}  // namespace

ScheduleParts build_by_tap(const Context& ctx,
                           const KernelMap& map,
                           const ScheduleOptions& options) {
  const auto chunk_rows = static_cast<uint32_t>(std::min<int64_t>(options.chunk_rows, map.n_out));
  const Spans spans = {.rows = static_cast<uint32_t>(map.n_out),
                       .chunk_rows = chunk_rows,
                       .tile_rows = static_cast<uint32_t>(options.tile_rows),
                       .taps = static_cast<uint32_t>(map.taps()),
                       .spans = static_cast<uint32_t>(ceil_div(chunk_rows, span_rows))};
  const int64_t chunks = ceil_div(map.n_out, chunk_rows);
  const int64_t segments = chunks * map.taps();
  const int64_t counts = segments * spans.spans + 1;
  Layout layout;
  const size_t totals_place = layout.add<Totals>(1);
  const size_t counts_place = layout.add<uint32_t>(counts);
  const size_t tiles_place = layout.add<uint32_t>(segments + 1);
  const std::shared_ptr<void> memory = ctx.allocate(layout.bytes());
  auto* totals = Layout::at<Totals>(memory, totals_place);
  auto* positions = Layout::at<uint32_t>(memory, counts_place);
  auto* tiles = Layout::at<uint32_t>(memory, tiles_place);
  const Neighbours neighbours(map);
  const Grid grid = {
      .blocks = chunks * spans.spans, .columns = map.taps(), .threads = pair_threads};
  const Matrix chunk_tiles = make_matrix(ctx, 1, chunks + 1, Dtype::i64);
  fill_bytes(ctx, totals, 0, sizeof(Totals));
  fill_bytes(ctx, positions + counts - 1, 0, sizeof(uint32_t));
  launch(ctx, grid, count_rows, spans, neighbours, positions, &totals->positions);
  exclusive_sums(ctx, positions, positions, counts);
  launch(ctx, over(ctx, segments + 1), count_tiles, spans, segments, positions, tiles);
  exclusive_sums(ctx, tiles, tiles, segments + 1);
  launch(ctx, over(ctx, chunks + 1), write_chunk_tiles, spans, chunks, tiles,
         chunk_tiles.as<int64_t>(), totals);
  const Totals found = read_back(ctx, totals);
  const auto count = static_cast<int64_t>(found.tiles);
  ScheduleParts parts =
      allocate_parts(ctx, options, {static_cast<int64_t>(found.positions), count, count});
  parts.chunk_tiles = chunk_tiles;
  // What lies behind the rows of a segment's last tile.
  fill_bytes(ctx, parts.indices.data, 0xff, sizeof(int32_t) * count * options.tile_rows);
  fill_bytes(ctx, parts.masks.data, 0, sizeof(int32_t) * count * parts.masks.cols);
  launch(ctx, grid, write_pairs, spans, neighbours, Starts{positions, tiles}, arrays_of(parts));
  return parts;
}

}  // namespace voxgemm::cuda
