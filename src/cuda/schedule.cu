// SPDX-License-Identifier: Apache-2.0
//
// Schedules on the device, equal to the CPU's (conv/schedule.cpp) element for element.
//
// A segment is one group of one chunk. Positions, tiles and index blocks lie chunk by chunk, in a
// chunk group by group.
//
// By mask every segment has all rows of its chunk, so the places of its positions and tiles are
// formulas and nothing is read back. The steps:
//   write_keys     a thread a row: the Gray ranks of its masks, below the segment's number. Reads
//                  the table once, 4 bytes an entry.
//   sort           of all positions at once, stable, so that rows ascend where ranks are equal.
//   measure_tiles  a block of threads a slab, which is 32 consecutive tiles of one segment: masks,
//                  where each tile goes among those of its segment, and where its index blocks
//                  start. What depends on other slabs are two prefix sums over slabs, which the
//                  last block of threads to end computes:
//                    counts [segment][index blocks, falling][slab] of tiles: sums are the numbers
//                    of the sorted tiles. Left out where segments are one slab.
//                    index blocks [slab]: sums are the numbers of the first.
//   write_tiles    a block of threads a tile: its entries and its index blocks, gathered from the
//                  table.
//
// By tap the rows of a segment are those that have its tap; tiles have one index block each, so
// the order of the tiles is that of the rows. count_rows counts pieces of 1024 rows, prefix sums
// place them, and the host reads the two totals back before write_pairs.
#include "conv/schedule.h"

#include <algorithm>
#include <bit>
#include <limits>

#include "cuda/sorting.h"
#include "cuda/voxel_index.cuh"

namespace voxgemm::cuda {
namespace {

constexpr unsigned all_lanes = 0xffffffff;
constexpr uint32_t slab_tiles = 32;  // a warp ranks them
constexpr int piece_rows = 64;       // with a mask of their own

using Order = ScheduleOptions::Order;

struct Neighbours {
  const int32_t* data;  // [taps, rows]
  int64_t stride;

  __device__ int32_t operator()(uint32_t tap, uint32_t row) const {
    return data[tap * stride + row];
  }
};

// A segment, and one of the equal items that it is cut into.
struct Part {
  uint32_t group;
  uint32_t first_row;
  uint32_t rows;
  uint32_t tiles;
  uint32_t item;
};

// How rows and taps are cut by mask. The number of positions fits 31 bits.
struct Cut {
  uint32_t rows;
  uint32_t chunk_rows;  // no more than one chunk needs
  uint32_t tile_rows;
  uint32_t groups;
  uint32_t taps;
  // Of a segment of a whole chunk.
  uint32_t tiles;
  uint32_t slabs;

  Cut(const KernelMap& map, const ScheduleOptions& options)
      : rows(static_cast<uint32_t>(map.n_out)),
        chunk_rows(static_cast<uint32_t>(std::min<int64_t>(options.chunk_rows, map.n_out))),
        tile_rows(options.tile_rows),
        groups(options.groups),
        taps(map.taps()),
        tiles(static_cast<uint32_t>(ceil_div(chunk_rows, tile_rows))),
        slabs(static_cast<uint32_t>(ceil_div(tiles, slab_tiles))) {}

  // An item is `of_part` tiles. There are all_tiles() tiles, all_slabs() slabs.
  int64_t chunks() const { return ceil_div(rows, chunk_rows); }
  int64_t all(int64_t of_part) const {
    const int64_t last_rows = rows - (chunks() - 1) * chunk_rows;
    return groups * ((chunks() - 1) * ceil_div(tiles, of_part) +
                     ceil_div(ceil_div(last_rows, tile_rows), of_part));
  }
  int64_t all_tiles() const { return all(1); }
  int64_t all_slabs() const { return all(slab_tiles); }

  __host__ __device__ uint32_t group_begin(uint32_t group) const {
    return static_cast<uint32_t>(static_cast<uint64_t>(group) * taps / groups);
  }
  __device__ uint32_t rows_from(uint32_t first_row) const {
    return min(chunk_rows, rows - first_row);
  }
  // The tile or slab of this number, in segment order.
  __device__ Part part(uint32_t number, uint32_t whole, uint32_t of_part) const {
    const uint32_t chunk = number / (groups * whole);
    Part result;
    result.first_row = chunk * chunk_rows;
    result.rows = rows_from(result.first_row);
    result.tiles = (result.rows + tile_rows - 1) / tile_rows;
    const uint32_t items = (result.tiles + of_part - 1) / of_part;
    const uint32_t in_chunk = number - chunk * groups * whole;
    result.group = in_chunk / items;
    result.item = in_chunk - result.group * items;
    return result;
  }
  __device__ Part tile(uint32_t number) const { return part(number, tiles, 1); }
  __device__ Part slab(uint32_t number) const { return part(number, slabs, slab_tiles); }
  // Positions before a segment; tiles before the last chunk are those of whole ones.
  __device__ uint32_t first_position(const Part& part) const {
    return part.first_row * groups + part.group * part.rows;
  }
  __device__ uint32_t first_tile(const Part& part) const {
    return part.first_row / chunk_rows * groups * tiles + part.group * part.tiles;
  }
};

// The place of a mask in the reflected Gray code.
__device__ uint32_t gray_rank(uint32_t mask) {
  for (int shift = 1; shift < 32; shift *= 2) mask ^= mask >> shift;
  return mask;
}
__device__ uint32_t gray_mask(uint32_t rank) { return rank ^ (rank >> 1); }

struct ChunkTiles {
  int64_t* first;  // [chunks + 1]
  int64_t chunks;
  int64_t all;
};

// Keys are segment << bits | Gray rank, as many bits as the largest group has taps.
template <class Key>
struct Keys {
  Key* keys;         // [positions]
  uint32_t* values;  // [positions]: rows
  int bits;
};

template <class Key>
__global__ void write_keys(
    Cut cut, Neighbours neighbours, Keys<Key> out, ChunkTiles chunk_tiles, uint32_t* done) {
  if (thread_index() == 0) *done = 0;
  for (int64_t c = thread_index(); c <= chunk_tiles.chunks; c += thread_count()) {
    chunk_tiles.first[c] = c < chunk_tiles.chunks ? c * cut.groups * cut.tiles : chunk_tiles.all;
  }
  for (int64_t i = thread_index(); i < cut.rows; i += thread_count()) {
    const auto row = static_cast<uint32_t>(i);
    const uint32_t chunk = row / cut.chunk_rows;
    const uint32_t first_row = chunk * cut.chunk_rows;
    const uint32_t rows = cut.rows_from(first_row);
    uint32_t position = first_row * cut.groups + row - first_row;
    for (uint32_t group = 0; group < cut.groups; ++group, position += rows) {
      const uint32_t begin = cut.group_begin(group);
      const uint32_t end = cut.group_begin(group + 1);
      uint32_t mask = 0;
#pragma unroll 9
      for (uint32_t tap = begin; tap < end; ++tap) {
        mask |= static_cast<uint32_t>(neighbours(tap, row) >= 0) << (tap - begin);
      }
      const Key segment = static_cast<Key>(chunk) * cut.groups + group;
      // A single segment may need all bits of the key for its ranks.
      const Key high = segment == 0 ? 0 : segment << out.bits;
      out.keys[position] = high | gray_rank(mask);
      out.values[position] = row;
    }
  }
}

struct alignas(16) TileNote {
  uint32_t mask;
  uint32_t place;        // among the tiles of its slab with as many index blocks
  uint32_t first_block;  // from the slab's first
};

struct Notes {
  TileNote* tiles;        // [tiles], in segment order
  uint32_t* masks;        // [tiles, pieces]
  uint32_t* counts;       // [segments][bins][slabs], or nothing where segments are one slab
  uint32_t* slab_blocks;  // [slabs]
  uint32_t* done;         // blocks of threads that have ended
  uint32_t bins;          // numbers of index blocks that a tile may have
  uint32_t pieces;
  uint32_t slabs;
  uint32_t rank_bits;  // of a key, as a mask

  // The number of an entry of `counts`.
  __device__ uint32_t count_at(uint32_t slab, const Part& part, uint32_t blocks) const {
    const uint32_t slabs_of_segment = (part.tiles + slab_tiles - 1) / slab_tiles;
    const uint32_t slabs_before = slab - part.item;
    return slabs_before * bins + (bins - 1 - blocks) * slabs_of_segment + part.item;
  }
};

constexpr int measure_threads = 256;

// Exclusive, in place, by the threads of a block together: each sums a run of the list.
__device__ void scan_in_block(uint32_t* list, uint32_t count) {
  __shared__ uint32_t warp_sums[measure_threads / 32];
  const uint32_t lane = threadIdx.x % 32;
  const uint32_t warp = threadIdx.x / 32;
  const uint32_t run = (count + measure_threads - 1) / measure_threads;
  const uint32_t first = min(threadIdx.x * run, count);
  const uint32_t last = min(first + run, count);
  uint32_t sum = 0;
#pragma unroll 8
  for (uint32_t i = first; i < last; ++i) sum += __ldcg(list + i);
  uint32_t through = sum;
  for (uint32_t lanes = 1; lanes < 32; lanes *= 2) {
    const uint32_t below = __shfl_up_sync(all_lanes, through, lanes);
    if (lane >= lanes) through += below;
  }
  if (lane == 31) warp_sums[warp] = through;
  __syncthreads();
  uint32_t before = through - sum;
  for (uint32_t w = 0; w < warp; ++w) before += warp_sums[w];
#pragma unroll 8
  for (uint32_t i = first; i < last; ++i) {
    const uint32_t value = __ldcg(list + i);
    list[i] = before;
    before += value;
  }
  __syncthreads();
}

__device__ uint32_t or_of_warp(uint32_t bits) {
  for (int lanes = 16; lanes > 0; lanes /= 2) bits |= __shfl_xor_sync(all_lanes, bits, lanes);
  return bits;
}

// Masks of a slab's tiles, one warp a tile.
template <class Key>
__device__ void find_masks(
    const Cut& cut, const Part& slab, const Key* keys, const Notes& notes, uint32_t* tile_masks) {
  const Key* segment = keys + cut.first_position(slab);
  const uint32_t first_tile = slab.item * slab_tiles;
  const uint32_t tiles = min(slab_tiles, slab.tiles - first_tile);
  uint32_t* masks = notes.masks + (cut.first_tile(slab) + first_tile) * int64_t{notes.pieces};
  const uint32_t lane = threadIdx.x % 32;
  for (uint32_t t = threadIdx.x / 32; t < tiles; t += measure_threads / 32) {
    uint32_t tile_mask = 0;
    for (uint32_t piece = 0; piece < notes.pieces; ++piece) {
      uint32_t mask = 0;
#pragma unroll
      for (uint32_t half = 0; half < piece_rows; half += 32) {
        const uint32_t row = (first_tile + t) * cut.tile_rows + piece * piece_rows + half + lane;
        if (row < slab.rows) {
          mask |= gray_mask(static_cast<uint32_t>(segment[row]) & notes.rank_bits);
        }
      }
      mask = or_of_warp(mask);
      if (lane == 0) masks[t * int64_t{notes.pieces} + piece] = mask;
      tile_mask |= mask;
    }
    if (lane == 0) tile_masks[t] = tile_mask;
  }
}

// The slab's tiles among themselves, by one warp.
__device__ void rank_slab(const Cut& cut, const Part& slab, const Notes& notes, uint32_t mask) {
  __shared__ uint32_t histogram[33];
  const uint32_t lane = threadIdx.x;
  const uint32_t first_tile = slab.item * slab_tiles;
  const bool used = first_tile + lane < slab.tiles;
  const int blocks = used ? __popc(mask) : -1;
  uint32_t place = 0;
  uint32_t before = 0;
  for (uint32_t other_lane = 0; other_lane < slab_tiles; ++other_lane) {
    const int other = __shfl_sync(all_lanes, blocks, static_cast<int>(other_lane));
    const bool below = other_lane < lane;
    // Alone in its segment the slab sorts its tiles completely.
    place += (other > blocks && cut.slabs == 1) || (other == blocks && below) ? 1 : 0;
    before += below ? max(other, 0) : 0;
  }
  if (used) notes.tiles[cut.first_tile(slab) + first_tile + lane] = {mask, place, before};
  if (lane == 31) notes.slab_blocks[blockIdx.x] = before + max(blocks, 0);
  if (cut.slabs == 1) return;
  for (uint32_t bin = lane; bin < notes.bins; bin += 32) histogram[bin] = 0;
  __syncwarp();
  if (used) atomicAdd(&histogram[blocks], 1U);
  __syncwarp();
  for (uint32_t bin = lane; bin < notes.bins; bin += 32) {
    notes.counts[notes.count_at(blockIdx.x, slab, bin)] = histogram[bin];
  }
}

template <class Key>
__global__ void __launch_bounds__(measure_threads)
    measure_tiles(Cut cut, const Key* keys, Notes notes) {
  __shared__ uint32_t tile_masks[slab_tiles];
  __shared__ bool is_last;
  const Part slab = cut.slab(blockIdx.x);
  find_masks(cut, slab, keys, notes, tile_masks);
  __syncthreads();
  if (threadIdx.x < slab_tiles) rank_slab(cut, slab, notes, tile_masks[threadIdx.x]);
  if (threadIdx.x < slab_tiles) __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) is_last = atomicAdd(notes.done, 1U) == gridDim.x - 1;
  __syncthreads();
  if (!is_last) return;
  __threadfence();
  scan_in_block(notes.slab_blocks, notes.slabs);
  if (cut.slabs > 1) scan_in_block(notes.counts, notes.slabs * notes.bins);
}

// ScheduleParts for kernels.
struct Arrays {
  int32_t* order;
  int4* tiles;  // first, first_block, rows, group
  uint32_t* masks;
  int32_t* block_taps;
  int32_t* indices;
};

constexpr int write_threads = 128;

__global__ void __launch_bounds__(write_threads)
    write_tiles(Cut cut, Neighbours neighbours, Notes notes, Arrays out) {
  const Part tile = cut.tile(blockIdx.x);
  const TileNote note = notes.tiles[blockIdx.x];
  const uint32_t slab_in_segment = tile.item / slab_tiles;
  const uint32_t slabs_of_segment = (tile.tiles + slab_tiles - 1) / slab_tiles;
  const uint32_t chunk = tile.first_row / cut.chunk_rows;
  const uint32_t slab =
      chunk * cut.groups * cut.slabs + tile.group * slabs_of_segment + slab_in_segment;
  Part slab_part = tile;
  slab_part.item = slab_in_segment;
  const uint32_t blocks = __popc(note.mask);
  const uint32_t number =
      note.place + (cut.slabs == 1 ? cut.first_tile(tile)
                                   : notes.counts[notes.count_at(slab, slab_part, blocks)]);
  const uint32_t first = cut.first_position(tile) + tile.item * cut.tile_rows;
  const uint32_t first_block = notes.slab_blocks[slab] + note.first_block;
  const uint32_t rows = min(cut.tile_rows, tile.rows - tile.item * cut.tile_rows);
  const uint32_t first_tap = cut.group_begin(tile.group);
  if (threadIdx.x == 0) {
    out.tiles[number] = make_int4(static_cast<int>(first), static_cast<int>(first_block),
                                  static_cast<int>(rows), static_cast<int>(tile.group));
  }
  for (uint32_t piece = threadIdx.x; piece < notes.pieces; piece += write_threads) {
    out.masks[number * int64_t{notes.pieces} + piece] =
        notes.masks[blockIdx.x * int64_t{notes.pieces} + piece];
  }
  if (threadIdx.x < 32 && (note.mask >> threadIdx.x & 1) != 0) {
    const int before = __popc(note.mask & ((1U << threadIdx.x) - 1));
    out.block_taps[first_block + before] = static_cast<int32_t>(first_tap + threadIdx.x);
  }
  for (uint32_t i = threadIdx.x; i < cut.tile_rows; i += write_threads) {
    const uint32_t row = i < rows ? static_cast<uint32_t>(out.order[first + i]) : 0;
    int32_t* index = out.indices + first_block * int64_t{cut.tile_rows} + i;
    // Loads of several taps on their way at once.
    constexpr int batch = 8;
    for (uint32_t rest = note.mask; rest != 0;) {
      int32_t values[batch];
      uint32_t later = rest;
#pragma unroll
      for (int k = 0; k < batch; ++k) {
        values[k] = -1;
        if (later != 0 && i < rows) values[k] = neighbours(first_tap + __ffs(later) - 1, row);
        later &= later - 1;
      }
#pragma unroll
      for (int k = 0; k < batch; ++k, rest &= rest - 1, index += cut.tile_rows) {
        if (rest != 0) *index = values[k];
      }
    }
  }
}

struct Room {
  int64_t positions;
  int64_t tiles;
  int64_t blocks;
};

ScheduleParts allocate_parts(const Context& ctx, const ScheduleOptions& options, const Room& room) {
  constexpr int64_t most = std::numeric_limits<int32_t>::max();
  check(room.positions <= most && room.blocks <= most, "the schedule has ", room.positions,
        " positions and ", room.blocks, " index blocks, expected at most ", most, " of each");
  ScheduleParts parts;
  parts.order = make_matrix(ctx, 1, room.positions, Dtype::i32);
  parts.tiles = make_matrix(ctx, room.tiles, 4, Dtype::i32);
  parts.masks = make_matrix(ctx, room.tiles, options.tile_rows / piece_rows, Dtype::i32);
  parts.block_taps = make_matrix(ctx, 1, room.blocks, Dtype::i32);
  parts.indices = make_matrix(ctx, room.blocks, options.tile_rows, Dtype::i32);
  return parts;
}

Arrays arrays_of(const ScheduleParts& parts) {
  return {parts.order.as<int32_t>(), parts.tiles.as<int4>(), parts.masks.as<uint32_t>(),
          parts.block_taps.as<int32_t>(), parts.indices.as<int32_t>()};
}

// Sorts and measures with keys of one width.
template <class Key>
void sort_tiles(const Context& ctx,
                const Cut& cut,
                const Neighbours& neighbours,
                const ScheduleParts& parts) {
  const int64_t positions = parts.order.cols;
  const int bits = static_cast<int>(ceil_div(cut.taps, cut.groups));
  const int64_t segments = cut.chunks() * cut.groups;
  const auto bins = static_cast<uint32_t>(bits + 1);
  const auto pieces = static_cast<uint32_t>(parts.masks.cols);
  const auto slabs = static_cast<uint32_t>(cut.all_slabs());
  Layout layout;
  const size_t keys = layout.add<Key>(positions);
  const size_t sorted_keys = layout.add<Key>(positions);
  const size_t values = layout.add<uint32_t>(positions);
  const size_t tiles = layout.add<TileNote>(parts.tiles.rows);
  const size_t masks = layout.add<uint32_t>(parts.tiles.rows * pieces);
  const size_t counts = layout.add<uint32_t>(cut.slabs > 1 ? int64_t{slabs} * bins : 0);
  const size_t slab_blocks = layout.add<uint32_t>(slabs);
  const size_t done = layout.add<uint32_t>(1);
  const std::shared_ptr<void> memory = ctx.allocate(layout.bytes());
  const Notes notes = {.tiles = Layout::at<TileNote>(memory, tiles),
                       .masks = Layout::at<uint32_t>(memory, masks),
                       .counts = Layout::at<uint32_t>(memory, counts),
                       .slab_blocks = Layout::at<uint32_t>(memory, slab_blocks),
                       .done = Layout::at<uint32_t>(memory, done),
                       .bins = bins,
                       .pieces = pieces,
                       .slabs = slabs,
                       .rank_bits = 0xffffffff >> (32 - bits)};
  const Keys<Key> unsorted = {Layout::at<Key>(memory, keys), Layout::at<uint32_t>(memory, values),
                              bits};
  const ChunkTiles chunk_tiles = {parts.chunk_tiles.as<int64_t>(), cut.chunks(), parts.tiles.rows};
  launch(ctx, over(ctx, cut.rows), write_keys<Key>, cut, neighbours, unsorted, chunk_tiles,
         notes.done);
  auto* ranks = Layout::at<Key>(memory, sorted_keys);
  const int segment_bits = std::bit_width(static_cast<uint64_t>(segments - 1));
  sort_by_key(ctx,
              SortArrays<Key>{unsorted.keys, ranks, unsorted.values, parts.order.as<uint32_t>()},
              positions, bits + segment_bits);
  launch(ctx, {.blocks = slabs, .threads = measure_threads}, measure_tiles<Key>, cut, ranks, notes);
  launch(ctx, {.blocks = parts.tiles.rows, .threads = write_threads}, write_tiles, cut, neighbours,
         notes, arrays_of(parts));
}

ScheduleParts build_by_mask(const Context& ctx,
                            const KernelMap& map,
                            const ScheduleOptions& options) {
  const Cut cut(map, options);
  const int64_t tiles = cut.all_tiles();
  // A tile of a group has room for all of its taps; together the groups have all taps.
  ScheduleParts parts = allocate_parts(
      ctx, options, {map.n_out * options.groups, tiles, tiles / options.groups * map.taps()});
  parts.chunk_tiles = make_matrix(ctx, 1, cut.chunks() + 1, Dtype::i64);
  const Neighbours neighbours = {map.neighbours.as<int32_t>(), map.neighbours.stride};
  const auto segments = static_cast<uint64_t>(cut.chunks() * options.groups);
  const bool is_short = ceil_div(cut.taps, cut.groups) + std::bit_width(segments - 1) <= 32;
  const auto sort = is_short ? sort_tiles<uint32_t> : sort_tiles<uint64_t>;
  sort(ctx, cut, neighbours, parts);
  return parts;
}

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
  const Neighbours neighbours = {map.neighbours.as<int32_t>(), map.neighbours.stride};
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

}  // namespace

ScheduleParts build_schedule(const Context& ctx,
                             const KernelMap& map,
                             const ScheduleOptions& options) {
  const DeviceGuard guard(ctx.device);
  if (map.n_out == 0) {
    ScheduleParts parts = allocate_parts(ctx, options, {});
    parts.chunk_tiles = make_matrix(ctx, 1, 1, Dtype::i64);
    fill_bytes(ctx, parts.chunk_tiles.data, 0, sizeof(int64_t));
    return parts;
  }
  return options.order == Order::by_tap ? build_by_tap(ctx, map, options)
                                        : build_by_mask(ctx, map, options);
}

}  // namespace voxgemm::cuda
