// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "voxgemm/kernel_map.h"

namespace voxgemm {

// How a kernel map is cut into work. Output rows are cut into chunks of consecutive rows, taps into
// groups of consecutive taps. For each chunk and group the chunk's rows stand in some order and are
// cut into tiles; a tile has one index block per tap: the input row of each of the tile's rows, -1
// = absent.
//
//   group g:      taps [g * taps / groups, (g + 1) * taps / groups) and an order of the rows
//   tile t:       at most `tile_rows` consecutive rows of that order, inside one chunk
//   index block:  (tile, tap): `tile_rows` input rows, -1 where absent or past the tile's end
struct ScheduleOptions {
  enum class Order {
    natural,  // rows as they are
    by_mask,  // inside a chunk sorted by the part of their tap mask that lies in the group (then by
              // row)
    by_tap,   // one tap per group, rows without the tap left out: pair lists; CPU only
  };
  Order order = Order::natural;
  int groups = 1;        // by_mask: at most 32 taps a group; by_tap: taps
  int tile_rows = 128;   // a multiple of 64
  int chunk_rows = 128;  // a multiple of tile_rows; natural order: tile_rows
  bool operator==(const ScheduleOptions&) const = default;
};

// chunk_rows for one chunk whatever the number of rows.
constexpr int one_chunk = 1 << 30;

struct Tile {
  int group = 0;
  int rows = 0;       // <= tile_rows
  int64_t first = 0;  // position of its first row in the group's order
  int64_t first_block = 0;
  int blocks = 0;
};

struct IndexBlock {
  int tap = 0;
  const int32_t* rows = nullptr;  // [tile.rows] input rows, -1 = absent
};

// The stored arrays of a schedule. Empty for natural order. Positions and blocks are 32-bit: a
// schedule with 2^31 of either is an error. On a CUDA device the number of blocks is not known to
// the host: indices then have room for every tap of every tile, and end where the last tile's
// blocks do; chunk_tiles and block_taps, which no kernel reads, are empty there.
struct ScheduleParts {
  Matrix order;        // i32 [1, positions]: output rows
  Matrix chunk_tiles;  // i64 [1, chunks + 1]: tiles before each chunk
  Matrix tiles;        // i32 [tiles, 4]: first, first_block, rows, group
  Matrix masks;  // i32 [tiles, tile_rows / 64]: taps (bit 0 = the group's first) of each 64 rows
  Matrix block_taps;  // i32 [1, blocks]
  Matrix indices;     // i32 [blocks, tile_rows]
};

// by_mask and by_tap leave out the index blocks of taps that no row of the tile has; natural
// executes all. A natural schedule stores nothing: its index blocks are pieces of the map's
// neighbour table. A schedule of a CUDA map lives on the device; only rows(), taps(), options() and
// parts() of it may be called. Building it does not wait; but outside of captures one with room for
// more than 32 MiB of index entries waits once, to have no more room than it needs.
class VOXGEMM_EXPORT Schedule {
 public:
  // map.neighbours must outlive the schedule. Throws where the options contradict what their lines
  // say.
  static Schedule build(const Context& ctx, const KernelMap& map, const ScheduleOptions& options);
  // Of parts that build() made for this map and these options.
  static Schedule from_parts(const KernelMap& map,
                             const ScheduleOptions& options,
                             ScheduleParts parts);

  const ScheduleOptions& options() const { return options_; }
  int64_t rows() const { return rows_; }
  int taps() const { return taps_; }
  int64_t chunks() const;
  // Tiles of chunk c are [first_tile(c), first_tile(c + 1)), groups in rising order, in a group
  // those with more index blocks first.
  int64_t tiles() const { return first_tile(chunks()); }
  int64_t first_tile(int64_t chunk) const;
  Tile tile(int64_t t) const;
  IndexBlock block(const Tile& tile, int index) const;
  // The output row at a position of a group's order.
  int64_t row(const Tile& tile, int position) const {
    return parts_.order.empty() ? tile.first + position
                                : parts_.order.as<int32_t>()[tile.first + position];
  }
  // Index entries that are read, absent ones included: taps * rows for natural order.
  int64_t row_visits() const;
  size_t bytes() const;
  const ScheduleParts& parts() const { return parts_; }

 private:
  ScheduleOptions options_;
  int64_t rows_ = 0;
  int taps_ = 0;
  MatrixRef neighbours_;  // i32 [taps, rows], of the map
  ScheduleParts parts_;
};

// A schedule must satisfy: every (out, tap) pair of the map stands in exactly one index block, at
// its row, and no other entry is >= 0. Returns the first violation in words, empty if none. For
// tests.
VOXGEMM_EXPORT std::string schedule_violation(const Schedule& schedule, const KernelMap& map);

}  // namespace voxgemm
