// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>

#include "cuda/launch.cuh"
#include "voxgemm/schedule.h"

namespace voxgemm::cuda {

// The map's table for kernels.
struct Neighbours {
  const int32_t* data;  // [taps, rows]
  int64_t stride;
  const uint32_t* masks;  // [rows] or null: the taps that each row has, see KernelMap
  static constexpr uint32_t steady_bit = 1U << 31;

  explicit Neighbours(const KernelMap& map)
      : data(map.neighbours.as<int32_t>()),
        stride(map.neighbours.stride),
        masks(map.masks.as<uint32_t>()) {}
};

// Segments cut into items of equally many rows, the last ones of a segment shorter.
struct Grain {
  uint32_t rows;
  uint32_t whole;  // items of a whole chunk's segment
};

// An item of a segment.
struct Part {
  uint32_t chunk;
  uint32_t group;
  uint32_t rows;   // of the segment
  uint32_t items;  // of the segment
  uint32_t item;
};

// How rows and taps are cut by mask: a segment is one group of one chunk, and has all rows of its
// chunk. Segments lie chunk by chunk, in a chunk group by group, and so do their items, so the
// places of all things are formulas. The number of positions fits 31 bits.
struct Cut {
  uint32_t rows;
  uint32_t chunk_rows;  // no more than one chunk needs
  uint32_t tile_rows;
  uint32_t groups;
  uint32_t taps;
  // Taps that follow each other on z, if groups have whole lines of them and rows say whether their
  // inputs follow each other too: by Neighbours::steady_bit of the masks and of the ranks.
  uint32_t line = 1;

  Cut(const KernelMap& map, const ScheduleOptions& options)
      : rows(static_cast<uint32_t>(map.n_out)),
        chunk_rows(static_cast<uint32_t>(std::clamp<int64_t>(map.n_out, 1, options.chunk_rows))),
        tile_rows(options.tile_rows),
        groups(options.groups),
        taps(map.taps()) {
    const auto on_z = static_cast<uint32_t>(map.geometry.size[2]);
    constexpr uint32_t most_taps = 28;  // no digit of a sort has the bit
    constexpr uint32_t most_on_z = 16;  // half a word
    const bool whole = taps % (groups * on_z) == 0 && on_z <= most_on_z;
    if (!map.masks.empty() && taps <= most_taps && whole) line = on_z;
  }

  int64_t chunks() const { return ceil_div(rows, chunk_rows); }
  int64_t segments() const { return chunks() * groups; }
  // Taps of the largest group.
  int bits() const { return static_cast<int>(ceil_div(taps, groups)); }
  Grain grain(int64_t rows_of_item) const {
    // More than the rows of any segment is as good.
    const int64_t most = std::min(rows_of_item, int64_t{1} << 31);
    return {static_cast<uint32_t>(most), static_cast<uint32_t>(ceil_div(chunk_rows, most))};
  }
  int64_t items(const Grain& grain) const {
    const int64_t last_rows = rows - (chunks() - 1) * chunk_rows;
    return groups * ((chunks() - 1) * grain.whole + ceil_div(last_rows, grain.rows));
  }

  __host__ __device__ uint32_t group_begin(uint32_t group) const {
    return static_cast<uint32_t>(static_cast<uint64_t>(group) * taps / groups);
  }
  // The mask of a rank.
  __device__ uint32_t mask(uint32_t rank) const {
    if (line > 1) rank &= ~Neighbours::steady_bit;
    return rank ^ (rank >> 1);
  }
  __device__ uint32_t group_of(uint32_t tap) const {
    return static_cast<uint32_t>(((tap + uint64_t{1}) * groups - 1) / taps);
  }
  __device__ Part segment(uint32_t chunk, uint32_t group, const Grain& grain) const {
    const uint32_t segment_rows = min(chunk_rows, rows - chunk * chunk_rows);
    return {chunk, group, segment_rows, (segment_rows + grain.rows - 1) / grain.rows, 0};
  }
  // The item of this number.
  __device__ Part part(uint32_t number, const Grain& grain) const {
    const uint32_t chunk = number / (groups * grain.whole);
    const uint32_t in_chunk = number - chunk * groups * grain.whole;
    Part part = segment(chunk, 0, grain);
    part.group = in_chunk / part.items;
    part.item = in_chunk - part.group * part.items;
    return part;
  }
  // Items before those of a part's segment.
  __device__ uint32_t first_item(const Part& part, const Grain& grain) const {
    const uint32_t items = (part.rows + grain.rows - 1) / grain.rows;
    return part.chunk * groups * grain.whole + part.group * items;
  }
  __device__ int64_t segment_number(const Part& part) const {
    return part.chunk * int64_t{groups} + part.group;
  }
  // Rows before a part's chunk, positions before its segment.
  __device__ uint32_t first_row(const Part& part) const { return part.chunk * chunk_rows; }
  __device__ uint32_t first_position(const Part& part) const {
    return first_row(part) * groups + part.group * part.rows;
  }
};

// Rows of every segment by the Gray ranks of their masks, then by row.
struct SortedRows {
  std::shared_ptr<void> memory;
  const uint32_t* ranks = nullptr;  // [positions]
  uint32_t* done = nullptr;         // a zero, for the next kernel to count with
};
// rows: [positions], written.
SortedRows sort_rows(const Context& ctx,
                     const Cut& cut,
                     const Neighbours& neighbours,
                     uint32_t* rows);

}  // namespace voxgemm::cuda
