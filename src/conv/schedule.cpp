// SPDX-License-Identifier: Apache-2.0
#include "voxgemm/schedule.h"

#include <algorithm>
#include <bit>
#include <limits>
#include <span>
#include <string>
#include <vector>

#include "conv/backend.h"
#include "conv/schedule.h"
#include "conv/validate.h"
#include "voxgemm/error.h"

namespace voxgemm {
namespace {

using Order = ScheduleOptions::Order;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct TilePart {
  Tile tile;          // first and first_block relative to the chunk
  size_t first_mask;  // among the chunk's
};

// What one chunk contributes to the schedule, before its place in the whole is known.
struct ChunkPart {
  std::vector<int32_t> order;  // output rows, group by group
  std::vector<TilePart> tiles;
  std::vector<uint32_t> masks;  // of each 64 rows of a tile, tile_rows / 64 a tile
  std::vector<int32_t> block_taps;
};

struct Builder {
  const KernelMap& map;
  const ScheduleOptions& options;

  int group_begin(int group) const {
    return static_cast<int>(static_cast<int64_t>(group) * map.taps() / options.groups);
  }

  // Of the chunk's rows the taps that they have, tap after tap, as the table lies in memory.
  void masks(int group, int64_t first_row, std::vector<uint32_t>* bits) const {
    std::fill(bits->begin(), bits->end(), 0U);
    const int begin = group_begin(group);
    for (int tap = begin; tap < group_begin(group + 1); ++tap) {
      const int32_t* inputs = map.neighbours.row<int32_t>(tap) + first_row;
      for (size_t row = 0; row < bits->size(); ++row) {
        (*bits)[row] |= static_cast<uint32_t>(inputs[row] >= 0) << (tap - begin);
      }
    }
  }

  // Rows of the chunk in the group's order, with the Gray ranks of their masks in the high half.
  void sort_rows(int group,
                 int64_t first_row,
                 std::vector<uint32_t>* bits,
                 std::vector<uint64_t>* keys) const {
    masks(group, first_row, bits);
    const bool by_tap = options.order == Order::by_tap;
    keys->resize(bits->size());
    size_t count = 0;
    for (size_t row = 0; row < bits->size(); ++row) {
      const uint32_t mask = (*bits)[row];
      (*keys)[count] = uint64_t{by_tap ? mask : gray_rank(mask)} << 32 | row;
      // No branch: which rows have a tap cannot be foreseen.
      count += static_cast<size_t>(!by_tap || mask != 0);
    }
    keys->resize(count);
    if (!by_tap) std::sort(keys->begin(), keys->end());
  }

  // The tile of `rows` (keys of sort_rows), appended to the part.
  void add_tile(int group,
                int64_t first_row,
                std::span<const uint64_t> rows,
                ChunkPart* part) const {
    TilePart& added = part->tiles.emplace_back();
    added.first_mask = part->masks.size();
    part->masks.resize(part->masks.size() + options.tile_rows / 64, 0);
    Tile& tile = added.tile;
    tile.group = group;
    tile.rows = static_cast<int>(rows.size());
    tile.first = static_cast<int64_t>(part->order.size());
    tile.first_block = static_cast<int64_t>(part->block_taps.size());
    part->order.resize(part->order.size() + rows.size());
    int32_t* order = part->order.data() + tile.first;
    uint32_t tile_mask = 0;
    for (size_t first = 0; first < rows.size(); first += 64) {
      uint32_t mask = 0;
      for (size_t i = first; i < std::min(first + 64, rows.size()); ++i) {
        mask |= gray_mask(static_cast<uint32_t>(rows[i] >> 32));
        order[i] = static_cast<int32_t>(first_row + static_cast<uint32_t>(rows[i]));
      }
      part->masks[added.first_mask + first / 64] = mask;
      tile_mask |= mask;
    }
    for (uint32_t rest = tile_mask; rest != 0; rest &= rest - 1) {
      part->block_taps.push_back(group_begin(group) + std::countr_zero(rest));
    }
    tile.blocks = std::popcount(tile_mask);
  }

  ChunkPart build(int64_t chunk) const {
    ChunkPart part;
    const int64_t first_row = chunk * options.chunk_rows;
    const int64_t rows = std::min<int64_t>(options.chunk_rows, map.n_out - first_row);
    std::vector<uint32_t> bits(static_cast<size_t>(rows));
    std::vector<uint64_t> keys;
    for (int group = 0; group < options.groups; ++group) {
      sort_rows(group, first_row, &bits, &keys);
      const std::span<const uint64_t> all = keys;
      const auto group_tiles = static_cast<int64_t>(part.tiles.size());
      for (size_t first = 0; first < all.size(); first += options.tile_rows) {
        const size_t count = std::min<size_t>(options.tile_rows, all.size() - first);
        add_tile(group, first_row, all.subspan(first, count), &part);
      }
      if (options.order == Order::by_tap) continue;
      // The longest first: what is handed out last decides when all is done.
      std::stable_sort(
          part.tiles.begin() + group_tiles, part.tiles.end(),
          [](const TilePart& a, const TilePart& b) { return a.tile.blocks > b.tile.blocks; });
    }
    return part;
  }
};

void validate(const ScheduleOptions& options, int taps) {
  validate_enumerator(options.order, Order::by_tap, "the order of a schedule");
  check(options.tile_rows >= 64 && options.tile_rows % 64 == 0, "tile_rows is ", options.tile_rows,
        ", expected a multiple of 64");
  check(options.chunk_rows >= options.tile_rows && options.chunk_rows % options.tile_rows == 0,
        "chunk_rows is ", options.chunk_rows,
        ", expected a multiple of tile_rows = ", options.tile_rows);
  check(options.groups >= 1 && options.groups <= std::max(taps, 1), "groups is ", options.groups,
        ", expected 1 to ", taps, ", the number of taps");
  if (options.order == Order::natural) {
    check(options.groups == 1 && options.chunk_rows == options.tile_rows,
          "a natural schedule has one group and chunks of one tile, not ", options.groups,
          " groups and chunks of ", options.chunk_rows, " rows");
  }
  if (options.order == Order::by_mask) {
    check(ceil_div(taps, options.groups) <= 32, "groups is ", options.groups, " for ", taps,
          " taps, expected at most 32 taps a group");
  }
  if (options.order == Order::by_tap) {
    check(options.groups == taps, "groups is ", options.groups, ", expected one per tap, ", taps);
  }
}

// Positions, tiles and blocks before each chunk.
struct Offsets {
  int64_t positions = 0;
  int64_t tiles = 0;
  int64_t blocks = 0;
};

std::vector<Offsets> running_sums(const std::vector<ChunkPart>& parts) {
  std::vector<Offsets> sums(parts.size() + 1);
  for (size_t c = 0; c < parts.size(); ++c) {
    sums[c + 1].positions = sums[c].positions + static_cast<int64_t>(parts[c].order.size());
    sums[c + 1].tiles = sums[c].tiles + static_cast<int64_t>(parts[c].tiles.size());
    sums[c + 1].blocks = sums[c].blocks + static_cast<int64_t>(parts[c].block_taps.size());
  }
  return sums;
}

ScheduleParts build_parts(const Context& ctx,
                          const KernelMap& map,
                          const ScheduleOptions& options) {
  const Builder builder{map, options};
  const int64_t chunks = ceil_div(map.n_out, options.chunk_rows);
  std::vector<ChunkPart> parts(chunks);
  parallel_for(ctx, chunks, [&](int64_t chunk, int) { parts[chunk] = builder.build(chunk); });
  const std::vector<Offsets> sums = running_sums(parts);
  const Offsets& total = sums.back();
  constexpr int64_t most = std::numeric_limits<int32_t>::max();
  check(total.positions <= most && total.blocks <= most, "the schedule has ", total.positions,
        " positions and ", total.blocks, " index blocks, expected at most ", most, " of each");
  ScheduleParts result;
  result.order = make_matrix(ctx, 1, total.positions, Dtype::i32);
  result.chunk_tiles = make_matrix(ctx, 1, chunks + 1, Dtype::i64);
  result.tiles = make_matrix(ctx, total.tiles, 4, Dtype::i32);
  result.masks = make_matrix(ctx, total.tiles, options.tile_rows / 64, Dtype::i32);
  result.block_taps = make_matrix(ctx, 1, total.blocks, Dtype::i32);
  result.indices = make_matrix(ctx, total.blocks, options.tile_rows, Dtype::i32);
  result.chunk_tiles.as<int64_t>()[chunks] = total.tiles;
  parallel_for(ctx, chunks, [&](int64_t chunk, int) {
    const ChunkPart& part = parts[chunk];
    const Offsets& before = sums[chunk];
    result.chunk_tiles.as<int64_t>()[chunk] = before.tiles;
    std::copy(part.order.begin(), part.order.end(), result.order.as<int32_t>() + before.positions);
    std::copy(part.block_taps.begin(), part.block_taps.end(),
              result.block_taps.as<int32_t>() + before.blocks);
    for (size_t t = 0; t < part.tiles.size(); ++t) {
      const Tile& tile = part.tiles[t].tile;
      const int64_t number = before.tiles + static_cast<int64_t>(t);
      std::copy_n(part.masks.begin() + static_cast<int64_t>(part.tiles[t].first_mask),
                  options.tile_rows / 64, result.masks.row<uint32_t>(number));
      auto* entry = result.tiles.row<int32_t>(number);
      const int64_t first_block = before.blocks + tile.first_block;
      entry[0] = static_cast<int32_t>(before.positions + tile.first);
      entry[1] = static_cast<int32_t>(first_block);
      entry[2] = tile.rows;
      entry[3] = tile.group;
      for (int b = 0; b < tile.blocks; ++b) {
        auto* indices = result.indices.row<int32_t>(first_block + b);
        const auto* neighbours = map.neighbours.row<int32_t>(part.block_taps[tile.first_block + b]);
        for (int i = 0; i < tile.rows; ++i) indices[i] = neighbours[part.order[tile.first + i]];
        std::fill(indices + tile.rows, indices + options.tile_rows, -1);
      }
    }
  });
  return result;
}

}  // namespace

Schedule Schedule::build(const Context& ctx, const KernelMap& map, const ScheduleOptions& options) {
  validate(options, map.taps());
  check(map.neighbours.device == ctx.device, "map and context are on different devices");
  if (options.order == Order::natural) return from_parts(map, options, {});
  return from_parts(map, options, run(ctx, cuda::build_schedule, build_parts, map, options));
}

Schedule Schedule::from_parts(const KernelMap& map,
                              const ScheduleOptions& options,
                              ScheduleParts parts) {
  Schedule schedule;
  schedule.options_ = options;
  schedule.rows_ = map.n_out;
  schedule.taps_ = map.taps();
  schedule.neighbours_ = map.neighbours;
  schedule.parts_ = std::move(parts);
  return schedule;
}

int64_t Schedule::chunks() const { return ceil_div(rows_, options_.chunk_rows); }

int64_t Schedule::first_tile(int64_t chunk) const {
  return options_.order == Order::natural ? chunk : parts_.chunk_tiles.as<int64_t>()[chunk];
}

Tile Schedule::tile(int64_t t) const {
  Tile tile;
  if (options_.order == Order::natural) {
    tile.first = t * options_.tile_rows;
    tile.rows = static_cast<int>(std::min<int64_t>(options_.tile_rows, rows_ - tile.first));
    tile.first_block = t * taps_;
    tile.blocks = taps_;
    return tile;
  }
  const auto* entry = parts_.tiles.row<int32_t>(t);
  tile.first = entry[0];
  tile.first_block = entry[1];
  tile.rows = entry[2];
  tile.group = entry[3];
  uint32_t mask = 0;
  for (int64_t i = 0; i < parts_.masks.cols; ++i) mask |= parts_.masks.row<uint32_t>(t)[i];
  tile.blocks = std::popcount(mask);
  return tile;
}

IndexBlock Schedule::block(const Tile& tile, int index) const {
  if (options_.order == Order::natural) {
    return {index, neighbours_.row<int32_t>(index) + tile.first};
  }
  const int64_t block = tile.first_block + index;
  return {parts_.block_taps.as<int32_t>()[block], parts_.indices.row<int32_t>(block)};
}

int64_t Schedule::row_visits() const {
  int64_t visits = 0;
  for (int64_t t = 0; t < tiles(); ++t) {
    const Tile visited = tile(t);
    visits += static_cast<int64_t>(visited.rows) * visited.blocks;
  }
  return visits;
}

size_t Schedule::bytes() const {
  size_t sum = 0;
  for (const Matrix* m : {&parts_.order, &parts_.chunk_tiles, &parts_.tiles, &parts_.masks,
                          &parts_.block_taps, &parts_.indices}) {
    sum += static_cast<size_t>(m->rows) * m->cols * size_of(m->dtype);
  }
  return sum;
}

std::string schedule_violation(const Schedule& schedule, const KernelMap& map) {
  const auto count = static_cast<size_t>(map.taps()) * map.n_out;
  std::vector<char> seen(count, 0);
  for (int64_t chunk = 0; chunk < schedule.chunks(); ++chunk) {
    for (int64_t t = schedule.first_tile(chunk); t < schedule.first_tile(chunk + 1); ++t) {
      const Tile tile = schedule.tile(t);
      if (tile.rows < 1 || tile.rows > schedule.options().tile_rows) {
        return join("tile ", t, " has ", tile.rows, " rows");
      }
      for (int b = 0; b < tile.blocks; ++b) {
        const IndexBlock block = schedule.block(tile, b);
        for (int i = 0; i < tile.rows; ++i) {
          const int64_t row = schedule.row(tile, i);
          if (row / schedule.options().chunk_rows != chunk) {
            return join("tile ", t, " of chunk ", chunk, " has row ", row);
          }
          if (block.rows[i] != map.neighbours.row<int32_t>(block.tap)[row]) {
            return join("tile ", t, " reads ", block.rows[i], " for row ", row, " and tap ",
                        block.tap, ", the map has ", map.neighbours.row<int32_t>(block.tap)[row]);
          }
          if (block.rows[i] < 0) continue;
          char& mark = seen[static_cast<size_t>(block.tap) * map.n_out + row];
          if (mark != 0) return join("row ", row, " and tap ", block.tap, " stand in two blocks");
          mark = 1;
        }
        // A natural index block is a piece of the map's table, which goes on behind the tile.
        const bool stored = schedule.options().order != Order::natural;
        for (int i = tile.rows; stored && i < schedule.options().tile_rows; ++i) {
          if (block.rows[i] >= 0) {
            return join("tile ", t, " has ", tile.rows, " rows and reads ", block.rows[i],
                        " behind them for tap ", block.tap);
          }
        }
      }
    }
  }
  for (int tap = 0; tap < map.taps(); ++tap) {
    for (int64_t row = 0; row < map.n_out; ++row) {
      if (map.neighbours.row<int32_t>(tap)[row] >= 0 &&
          seen[static_cast<size_t>(tap) * map.n_out + row] == 0) {
        return join("row ", row, " and tap ", tap, " stand in no block");
      }
    }
  }
  return "";
}

}  // namespace voxgemm
