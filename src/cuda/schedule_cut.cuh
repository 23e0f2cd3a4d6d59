// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>

#include "conv/schedule.h"
#include "cuda/launch.cuh"
#include "cuda/unroll.cuh"

namespace voxgemm::cuda {

// Of a row's mask: that its inputs of taps adjacent on z are adjacent rows.
constexpr uint32_t steady_bit = 1U << 31;

// An item of a segment, see Cut.
struct Part {
  uint32_t segment;
  uint32_t chunk;
  uint32_t group;
  uint32_t item;
  uint32_t rows;      // of the segment
  uint32_t position;  // of the segment's first row
};

// A map, and how its rows and taps are cut by mask: a segment is one group of one chunk, and has
// all rows of its chunk. Segments lie chunk by chunk, in a chunk group by group, so the places of
// all things are formulas. Kernels cut each segment into as many items as the longest has; the last
// items of the last chunk's may be empty. The number of positions fits 31 bits.
struct Cut {
  const int32_t* neighbours;  // [taps, rows]
  int64_t stride;
  const uint32_t* row_masks;  // [rows] or null, see KernelMap
  uint32_t rows;
  uint32_t chunk_rows;  // no more than one chunk needs
  uint32_t tile_rows;
  uint32_t groups;
  uint32_t taps;
  // Taps that follow each other on z, if groups have whole lines of them and rows say whether their
  // inputs follow each other too: by steady_bit of the masks and of the ranks.
  uint32_t line = 1;

  Cut(const KernelMap& map, const ScheduleOptions& options)
      : neighbours(map.neighbours.as<int32_t>()),
        stride(map.neighbours.stride),
        row_masks(map.masks.as<uint32_t>()),
        rows(static_cast<uint32_t>(map.n_out)),
        chunk_rows(static_cast<uint32_t>(std::clamp<int64_t>(map.n_out, 1, options.chunk_rows))),
        tile_rows(options.tile_rows),
        groups(options.groups),
        taps(map.taps()) {
    const auto on_z = static_cast<uint32_t>(map.geometry.size[2]);
    constexpr uint32_t most_taps = 27;  // no digit of a sort has the bit
    constexpr uint32_t most_on_z = 16;  // half a word
    const bool whole = taps % (groups * on_z) == 0 && on_z <= most_on_z;
    if (row_masks != nullptr && taps <= most_taps && whole) line = on_z;
  }

  int64_t chunks() const { return ceil_div(rows, chunk_rows); }
  int64_t segments() const { return chunks() * groups; }
  // Taps of the largest group.
  __host__ __device__ uint32_t bits() const { return (taps + groups - 1) / groups; }

  // Of so many rows, of the longest segment.
  __host__ __device__ uint32_t items(uint32_t item_rows) const {
    return (chunk_rows - 1) / item_rows + 1;
  }
  __host__ __device__ uint32_t group_begin(uint32_t group) const {
    return static_cast<uint32_t>(static_cast<uint64_t>(group) * taps / groups);
  }
  // The mask of a rank.
  __device__ uint32_t mask(uint32_t rank) const {
    if (line > 1) rank &= ~steady_bit;
    return gray_mask(rank);
  }
  __device__ uint32_t group_of(uint32_t tap) const {
    return static_cast<uint32_t>(((tap + uint64_t{1}) * groups - 1) / taps);
  }
  __device__ uint32_t first_row(uint32_t chunk) const { return chunk * chunk_rows; }
  // The first item of a segment.
  __device__ Part part(uint32_t chunk, uint32_t group) const {
    const uint32_t segment_rows = min(chunk_rows, rows - first_row(chunk));
    return {.segment = chunk * groups + group,
            .chunk = chunk,
            .group = group,
            .item = 0,
            .rows = segment_rows,
            .position = first_row(chunk) * groups + group * segment_rows};
  }
  // The item of this number, where segments have so many.
  __device__ Part part_of(uint32_t number, uint32_t items_each) const {
    const uint32_t segment = number / items_each;
    const uint32_t chunk = segment / groups;
    Part found = part(chunk, segment - chunk * groups);
    found.item = number - segment * items_each;
    return found;
  }
};

// Counts of blocks of threads that add up those of all before them: each publishes its own in a
// word, and then the sum with all before:
//   0                nothing yet
//   1 + count        of this block alone
//   is_sum | sum     of this block and all before; 31 bits
// The first publishes a sum. Blocks are numbered by a ticket: those before are running or done.
constexpr uint32_t is_sum = 1U << 31;

// What the `blocks` blocks before this one add up to; their words are `stride` apart.
__device__ inline uint32_t look_back(const volatile uint32_t* own,
                                     uint32_t stride,
                                     uint32_t blocks) {
  constexpr uint32_t window = 8;
  uint32_t sum = 0;
  while (true) {
    uint32_t words[window];
    unroll<window>(
        [&](uint32_t i) { words[i] = i < blocks ? own[-(i + int64_t{1}) * stride] : 0; });
#pragma unroll
    for (uint32_t i = 0; i < window && words[i] != 0; ++i) {
      if ((words[i] & is_sum) != 0) return sum + (words[i] & ~is_sum);
      sum += words[i] - 1;
      own -= stride;
      --blocks;
    }
  }
}

// Rows of every segment by the Gray ranks of their masks, then by row.
struct SortedRows {
  std::shared_ptr<void> memory;
  const uint32_t* ranks = nullptr;  // [positions]
};
// rows: [positions], written. The caller's own rooms are in the memory, too.
SortedRows sort_rows(const Context& ctx,
                     const Cut& cut,
                     uint32_t* rows,
                     const Room<uint32_t>& zeroed,
                     const Room<uint32_t>& others);

}  // namespace voxgemm::cuda
