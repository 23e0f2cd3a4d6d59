// SPDX-License-Identifier: Apache-2.0
//
// Schedules on the device, equal to the CPU's (conv/schedule.cpp) element for element in the parts
// that kernels read.
//
// By mask every segment (one group of one chunk) has all rows of its chunk, so the places of its
// positions and tiles are formulas and nothing is read back. The steps:
//   sort_rows      schedule_sort.cu: the order of the rows, and their Gray ranks in that order.
//   measure_tiles  a block of threads 32 consecutive tiles of one segment, a slab: masks. Of other
//                  slabs a tile needs how many index blocks come before its own and how many tiles
//                  of its segment have as many as it has: both by looking back, as sort_digit.
//   write_tiles    a block of threads 8 tiles and a line of taps along z: the line's index blocks,
//                  gathered from the table (a single tap where groups do not have whole lines). In
//                  a chunk all blocks of threads of one line come before those of the next, so
//                  that what they gather from stays in the L2 cache. If rows ascend, inputs of taps
//                  adjacent on z follow each other (the map's masks say of which rows that holds),
//                  and only the first of a run is gathered. Those of a group's first tap write the
//                  tiles' entries.
//
// One group of 27 taps, a shell of 1.03 M rows, us on an H200: ranks 8 of the map's masks (43 of
// its table), three digits 43, measure_tiles 14, the schedule 126; by single taps 155. In chunks of
// 65536 rows 120 (three lines at once 113).
#include "conv/schedule.h"

#include <cub/warp/warp_scan.cuh>
#include <limits>

#include "conv/coords.h"
#include "cuda/schedule_cut.cuh"

namespace voxgemm::cuda {
namespace {

constexpr uint32_t slab_tiles = 32;  // a lane each
constexpr uint32_t batch_tiles = 8;
constexpr uint32_t piece_rows = 64;  // of a tile, with a mask of their own

// A schedule on its way. Tiles of all segments are numbered as if all were the longest.
struct Building {
  Cut cut;
  uint32_t tiles_each;    // of the longest segment
  uint32_t pieces;        // of a tile
  uint32_t slabs_each;    // of a segment
  uint32_t bins;          // numbers of index blocks that a tile may have
  uint32_t count;         // of tiles, none empty
  const uint32_t* ranks;  // [positions]
  // What measure_tiles finds out, for write_tiles.
  uint32_t* piece_masks;   // [segments][tiles][pieces]
  uint32_t* first_blocks;  // [segments][tiles]
  uint32_t* numbers;  // [segments][tiles]: in ScheduleParts, but for tiles with more index blocks
  // Zero before: how many slabs are begun; [segments][slabs][bins + 1], look_back()'s words for
  // tiles by numbers of index blocks in the segment, and for all index blocks.
  uint32_t* ticket;
  // ScheduleParts.
  const int32_t* order;
  int4* tiles;  // first, first_block, rows, group
  uint32_t* masks;
  int32_t* indices;

  Building(const KernelMap& map, const ScheduleOptions& options)
      : cut(map, options),
        tiles_each(cut.items(cut.tile_rows)),
        pieces(cut.tile_rows / piece_rows),
        slabs_each(cut.items(slab_tiles * cut.tile_rows)),
        bins(cut.bits() + 1) {
    const int64_t before = std::max<int64_t>(cut.chunks() - 1, 0);  // whole chunks
    const int64_t in_last = ceil_div(cut.rows - before * cut.chunk_rows, cut.tile_rows);
    count = static_cast<uint32_t>((before * tiles_each + in_last) * cut.groups);
  }

  __device__ uint32_t* masks_of(uint32_t segment, uint32_t tile) const {
    return piece_masks + (segment * int64_t{tiles_each} + tile) * pieces;
  }
  __host__ __device__ uint32_t* words_of(int64_t slab) const {
    return ticket + 1 + slab * (bins + 1);
  }
  // Rows of a segment from a tile's first on, of at most one tile.
  __device__ uint32_t rows_of(const Part& segment, uint32_t tile) const {
    const int64_t behind = segment.rows - int64_t{tile} * cut.tile_rows;
    return static_cast<uint32_t>(min(max(behind, int64_t{0}), int64_t{cut.tile_rows}));
  }
};

constexpr int measure_threads = 512;

// A warp takes several pieces of 64 rows at once.
__global__ void __launch_bounds__(measure_threads, 2) measure_tiles(Building to) {
  using Scan = cub::WarpScan<uint32_t>;
  __shared__ typename Scan::TempStorage scan_storage;  // empty
  __shared__ uint32_t tile_masks[slab_tiles];
  __shared__ uint32_t before[34];  // of earlier slabs, for all words
  __shared__ uint32_t number;
  if (threadIdx.x == 0) number = atomicAdd(to.ticket, 1U);
  if (threadIdx.x < slab_tiles) tile_masks[threadIdx.x] = 0;
  __syncthreads();
  const Cut& cut = to.cut;
  const Part slab = cut.part_of(number, to.slabs_each);
  const uint32_t first_tile = slab.item * slab_tiles;
  const uint32_t first_row = first_tile * cut.tile_rows;
  const auto rows = static_cast<uint32_t>(
      min(max(slab.rows - int64_t{first_row}, int64_t{0}), slab_tiles * int64_t{cut.tile_rows}));
  const uint32_t pieces = (rows + cut.tile_rows - 1) / cut.tile_rows * to.pieces;
  uint32_t* masks = to.masks_of(slab.segment, first_tile);
  const uint32_t* ranks = to.ranks + slab.position + first_row;
  constexpr uint32_t at_once = 4;  // all pieces of tiles of 128 rows
  constexpr uint32_t warps = measure_threads / 32;
  const uint32_t warp = threadIdx.x / 32;
  const uint32_t lane = threadIdx.x % 32;
  for (uint32_t first = warp; first < pieces; first += at_once * warps) {
    uint32_t mask[at_once];
    unroll<at_once>([&](int i) {
      const uint32_t row = (first + i * warps) * piece_rows + lane;
      mask[i] = row < rows ? cut.mask(ranks[row]) : 0;
      if (row + 32 < rows) mask[i] |= cut.mask(ranks[row + 32]);
    });
    unroll<at_once>([&](int i) {
      const uint32_t piece = first + i * warps;
      mask[i] = over_warp(mask[i], [](uint32_t a, uint32_t b) { return a | b; });
      if (lane != 0 || piece >= pieces) return;
      masks[piece] = mask[i];
      atomicOr(&tile_masks[piece / to.pieces], mask[i]);
    });
  }
  __syncthreads();
  const uint32_t tiles = pieces / to.pieces;
  if (threadIdx.x <= to.bins) {
    const bool is_all = threadIdx.x == to.bins;
    uint32_t count = 0;
    for (uint32_t tile = 0; tile < tiles; ++tile) {
      const uint32_t blocks = __popc(tile_masks[tile]);
      count += is_all ? blocks : blocks == threadIdx.x ? 1 : 0;
    }
    const uint32_t earlier = is_all ? number : slab.item;
    volatile uint32_t* word = to.words_of(number) + threadIdx.x;
    *word = earlier == 0 ? is_sum | count : 1 + count;
    const uint32_t sum = earlier == 0 ? 0 : look_back(word, to.bins + 1, earlier);
    *word = is_sum | (sum + count);
    before[threadIdx.x] = sum;
  }
  __syncthreads();
  if (warp == 0) {
    const uint32_t blocks = __popc(tile_masks[lane]);
    uint32_t sum = 0;  // of the tiles before
    Scan(scan_storage).ExclusiveSum(blocks, sum);
    const uint32_t alike = __match_any_sync(0xffffffff, blocks) & ((1U << lane) - 1);
    const uint32_t first_number = slab.chunk * cut.groups * to.tiles_each +
                                  slab.group * ((slab.rows - 1) / cut.tile_rows + 1);
    const int64_t tile = slab.segment * int64_t{to.tiles_each} + first_tile + lane;
    if (lane < tiles) {
      to.first_blocks[tile] = before[to.bins] + sum;
      to.numbers[tile] = first_number + before[blocks] + __popc(alike);
    }
  }
}

constexpr int write_threads = 128;

struct FoundTile {
  uint32_t mask;
  uint32_t first;  // position
  uint32_t rows;   // none where there is no such tile
  uint32_t first_block;
};
__device__ FoundTile find_tile(const Building& to, const Part& segment, uint32_t number) {
  FoundTile tile = {};
  tile.rows = to.rows_of(segment, number);
  if (tile.rows == 0) return tile;
  const uint32_t* masks = to.masks_of(segment.segment, number);
  for (uint32_t piece = 0; piece < to.pieces; ++piece) tile.mask |= masks[piece];
  tile.first = segment.position + number * to.cut.tile_rows;
  tile.first_block = to.first_blocks[segment.segment * int64_t{to.tiles_each} + number];
  return tile;
}

// A tile but its index blocks, by one warp.
__device__ void write_entries(const Building& to, const Part& segment, uint32_t unsorted) {
  const FoundTile tile = find_tile(to, segment, unsorted);
  if (tile.rows == 0) return;
  const uint32_t lane = threadIdx.x % 32;
  const uint32_t* words = to.words_of((segment.segment + 1) * to.slabs_each - 1);
  uint32_t number = 0;
  for (uint32_t blocks = __popc(tile.mask) + 1 + lane; blocks < to.bins; blocks += 32) {
    number += words[blocks] & ~is_sum;
  }
  number = over_warp(number, [](uint32_t a, uint32_t b) { return a + b; }) +
           to.numbers[segment.segment * int64_t{to.tiles_each} + unsorted];
  if (lane == 0) {
    to.tiles[number] = make_int4(static_cast<int>(tile.first), static_cast<int>(tile.first_block),
                                 static_cast<int>(tile.rows), static_cast<int>(segment.group));
  }
  const uint32_t* masks = to.masks_of(segment.segment, unsorted);
  for (uint32_t piece = lane; piece < to.pieces; piece += 32) {
    to.masks[number * int64_t{to.pieces} + piece] = masks[piece];
  }
}

// Blocks of threads: for all chunks and their lines of taps the batches of tiles of a group.
__global__ void __launch_bounds__(write_threads) write_tiles(Building to) {
  const Cut& cut = to.cut;
  __shared__ FoundTile tiles[batch_tiles];  // without rows where they have none of the taps
  const uint32_t batches_each = (to.tiles_each + batch_tiles - 1) / batch_tiles;
  const uint32_t lines = blockIdx.x / batches_each;  // before, of all chunks
  const uint32_t chunk = lines / (cut.taps / cut.line);
  const uint32_t first_tap = lines * cut.line - chunk * cut.taps;
  const uint32_t group = cut.group_of(first_tap);
  const uint32_t first_bit = first_tap - cut.group_begin(group);
  const uint32_t taps = (1U << cut.line) - 1;
  const Part segment = cut.part(chunk, group);
  const uint32_t first_tile = (blockIdx.x - lines * batches_each) * batch_tiles;
  bool has_work = false;
  if (threadIdx.x < batch_tiles) {
    FoundTile tile = find_tile(to, segment, first_tile + threadIdx.x);
    has_work = (tile.mask >> first_bit & taps) != 0;
    if (!has_work) tile.rows = 0;
    tiles[threadIdx.x] = tile;
  }
  for (uint32_t t = threadIdx.x / 32; first_bit == 0 && t < batch_tiles; t += write_threads / 32) {
    write_entries(to, segment, first_tile + t);
  }
  if (__syncthreads_or(has_work ? 1 : 0) == 0) return;
  for (uint32_t i = threadIdx.x; i < cut.tile_rows; i += write_threads) {
    uint32_t rows[batch_tiles];
    uint32_t masks[batch_tiles];
    int32_t in[batch_tiles] = {};
    unroll<batch_tiles>([&](int t) {
      const bool used = i < tiles[t].rows;
      rows[t] = used ? to.order[tiles[t].first + i] : 0;
      masks[t] = used ? to.ranks[tiles[t].first + i] : 0;
    });
    unroll<batch_tiles>([&](int t) {
      const bool steady = cut.line > 1 && (masks[t] & steady_bit) != 0;
      masks[t] = cut.mask(masks[t]) >> first_bit & taps;
      // Taps behind one whose input is the one before theirs.
      if (steady) masks[t] |= (masks[t] & masks[t] << 1) << 16;
    });
    for (uint32_t tap = 0; tap < cut.line; ++tap) {
      const int32_t* table = cut.neighbours + (first_tap + tap) * cut.stride;
      unroll<batch_tiles>([&](int t) {
        ++in[t];
        if ((masks[t] >> tap & 0x10001) == 1) in[t] = table[rows[t]];
      });
      unroll<batch_tiles>([&](int t) {
        const uint32_t bit = 1U << (first_bit + tap);
        if ((tiles[t].mask & bit) == 0) return;
        const uint32_t block = tiles[t].first_block + __popc(tiles[t].mask & (bit - 1));
        to.indices[block * int64_t{cut.tile_rows} + i] = (masks[t] >> tap & 1) != 0 ? in[t] : -1;
      });
    }
  }
}

// Of index entries: where there may be more, about half of it is worth a wait.
constexpr int64_t small_room = (int64_t{32} << 20) / sizeof(int32_t);

}  // namespace

ScheduleParts build_schedule(const Context& ctx,
                             const KernelMap& map,
                             const ScheduleOptions& options) {
  check(options.order == ScheduleOptions::Order::by_mask, ErrorCode::unsupported,
        "schedules by tap are made on the CPU only");
  constexpr int64_t most = std::numeric_limits<int32_t>::max();
  check(options.tile_rows <= most / slab_tiles, "tile_rows is ", options.tile_rows,
        ", expected at most ", most / slab_tiles);
  Building to(map, options);
  const Cut& cut = to.cut;
  const int64_t positions = map.n_out * options.groups;
  // A tile of a group has room for all of its taps; together the groups have all taps.
  int64_t blocks = int64_t{to.count} / options.groups * map.taps();
  check(positions <= most && blocks <= most, "the schedule has ", positions, " positions and ",
        blocks, " index blocks, expected at most ", most, " of each");
  ScheduleParts parts;
  parts.order = make_matrix(ctx, 1, positions, Dtype::i32);
  parts.tiles = make_matrix(ctx, to.count, 4, Dtype::i32);
  parts.masks = make_matrix(ctx, to.count, to.pieces, Dtype::i32);
  parts.chunk_tiles = make_matrix(ctx, 1, 0, Dtype::i64);
  parts.block_taps = make_matrix(ctx, 1, 0, Dtype::i32);
  const int64_t tiles = cut.segments() * to.tiles_each;
  const int64_t slabs = cut.segments() * to.slabs_each;
  const SortedRows sorted =
      sort_rows(ctx, cut, parts.order.as<uint32_t>(), Room{&to.ticket, slabs * (to.bins + 1) + 1},
                Room{&to.first_blocks, tiles * (to.pieces + 2)});
  to.ranks = sorted.ranks;
  to.numbers = to.first_blocks + tiles;
  to.piece_masks = to.numbers + tiles;
  to.order = parts.order.as<int32_t>();
  to.tiles = parts.tiles.as<int4>();
  to.masks = parts.masks.as<uint32_t>();
  launch(ctx, {.blocks = slabs, .threads = measure_threads}, measure_tiles, to);
  if (blocks * options.tile_rows > small_room && !is_capturing(ctx)) {
    blocks = read_back(ctx, to.words_of(slabs) - 1) & ~is_sum;
  }
  parts.indices = make_matrix(ctx, blocks, options.tile_rows, Dtype::i32);
  to.indices = parts.indices.as<int32_t>();
  const int64_t lines = cut.chunks() * (cut.taps / cut.line);
  launch(ctx, {.blocks = lines * ceil_div(to.tiles_each, batch_tiles), .threads = write_threads},
         write_tiles, to);
  return parts;
}

}  // namespace voxgemm::cuda
