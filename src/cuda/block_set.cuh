// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace voxgemm::cuda {

// A set of voxels in device memory: an open-addressing table of blocks of 4^3 voxels, each one
// 64-bit bitmap, with the running count of voxels before each block (its rank). Blocks are keyed by
// their brick of 8^3 voxels, whose number in the bounding box takes at most 63 bits, and by which
// octant of the brick they are; that part is not stored, but is where the block stands: the table
// is cut in groups of 8 slots, one class of octants each, so that the blocks of one brick share a
// 128-byte line. The number of looks at the table is bounded.

// What went wrong while a set was built; the first problem stays.
// Of empty and distinct sets no table is made: nothing is in them, or is looked for. Larger numbers
// are output_coords without room: voxels that it found, from bit 31 on, and the room for them.
enum class Status : uint64_t { fine, empty, distinct, too_wide, not_int32, full, not_made };

// The box of a set; axes batch, x, y, z. Written by one thread.
struct Frame {
  int32_t origin[4];   // x, y, z are multiples of 8
  uint32_t last[4];    // largest offset from the origin that int32 holds
  uint64_t extent[4];  // batches, and bricks of 8^3 on the other axes
  uint64_t step[4];    // what a step on an axis adds to a brick's number

  // The offsets of coordinates outside the box are larger too, modulo 2^32.
  __device__ uint32_t offset(int axis, int32_t value) const {
    return static_cast<uint32_t>(value) - static_cast<uint32_t>(origin[axis]);
  }
  __device__ bool holds(const int4& c) const {
    return offset(0, c.x) <= last[0] && offset(1, c.y) <= last[1] && offset(2, c.z) <= last[2] &&
           offset(3, c.w) <= last[3];
  }
};

// What kernels find out about a set.
struct SetHead {
  Status status;
  uint64_t voxels;
  uint32_t blocks;
  uint32_t outside;  // complement of the lowest row with an output that int32 does not hold
  Frame frame;
};

struct alignas(16) Slot {
  uint64_t key;   // brick + 1, 0 = free
  uint64_t mask;  // voxel (x, y, z) of the block is bit 16 * x + 4 * y + z
};

struct BlockSet {
  // One behind the other in memory, which the first kernel zeroes: the head, slots, occupied, rows.
  SetHead* head = nullptr;
  Slot* slots = nullptr;         // [8 * groups]
  uint32_t* occupied = nullptr;  // [groups / 4]: a bit a slot, set where it is in use
  // [rows] or null: complement of the lowest row of every rank; zeroed memory is above every row.
  uint32_t* rows = nullptr;
  uint32_t* ranks = nullptr;  // [8 * groups]: voxels of the set before the slot's
  uint32_t* list = nullptr;   // [8 * groups] or null: once ranked, the slots in use
  uint32_t* boxes = nullptr;  // of the measured rows, see measure_rows
  uint32_t groups = 0;        // a multiple of 4
};

constexpr uint32_t no_slot = 0xffffffff;
// In a table that is half full of 2^32 blocks the longest way to a free slot is about 100 looks.
constexpr uint32_t most_looks = 1024;

// For atomics, which do not take uint64_t.
template <class T>
__device__ inline unsigned long long* word_of(T* word) {
  return reinterpret_cast<unsigned long long*>(word);
}
__device__ inline void report(const BlockSet& set, Status problem) {
  atomicCAS(word_of(&set.head->status), 0, static_cast<uint64_t>(problem));  // if it is `fine`
}
__device__ inline bool is_fine(const BlockSet& set) { return set.head->status == Status::fine; }

struct BlockKey {
  uint64_t brick;
  uint32_t octant;
};

struct Place {
  BlockKey key;
  int bit;
};
// Of offsets from the origin, inside the box.
__device__ inline Place place_of(
    const Frame& frame, uint32_t batch, uint32_t x, uint32_t y, uint32_t z) {
  return {{batch * frame.step[0] + (x >> 3) * frame.step[1] + (y >> 3) * frame.step[2] + (z >> 3),
           (x & 4) | (y >> 1 & 2) | (z >> 2 & 1)},
          static_cast<int>((x & 3) << 4 | (y & 3) << 2 | (z & 3))};
}
// Of coordinates (batch, x, y, z) inside the box.
__device__ inline Place place_of(const Frame& frame, const int4& c) {
  return place_of(frame, frame.offset(0, c.x), frame.offset(1, c.y), frame.offset(2, c.z),
                  frame.offset(3, c.w));
}

// Every bit of the result depends on every bit of the brick's number.
__device__ inline uint32_t scatter_bits(uint64_t brick) {
  uint32_t hash =
      static_cast<uint32_t>(brick) * 0x9e3779b1 + static_cast<uint32_t>(brick >> 32) * 0x7f4a7c15;
  hash = (hash ^ hash >> 16) * 0x9e3779b1;
  hash = (hash ^ hash >> 15) * 0x7f4a7c15;
  return hash ^ hash >> 16;
}

struct Probe {
  uint32_t slot;  // of the first look
  uint32_t groups;
  uint32_t looks;  // at most

  __device__ Probe(const BlockSet& set, const BlockKey& key)
      : groups(set.groups), looks(min(groups, most_looks)) {
    const uint32_t hash = scatter_bits(key.brick);
    slot = 8 * __umulhi(hash, groups) + ((key.octant ^ hash) & 7);
  }
  __device__ void next() { slot = slot + 8 < 8 * groups ? slot + 8 : slot & 7; }
};

// The block that stands in a slot in use.
__device__ inline BlockKey key_of(const BlockSet& set, uint32_t slot) {
  const uint64_t brick = set.slots[slot].key - 1;
  return {brick, (slot ^ scatter_bits(brick)) & 7};
}

struct Block {
  uint64_t mask = 0;
  uint32_t slot = no_slot;

  __device__ bool has(int bit) const { return (mask >> bit & 1) != 0; }
  // The block's voxels before this one.
  __device__ uint32_t before(int bit) const {
    return static_cast<uint32_t>(__popcll(mask & ((uint64_t{1} << bit) - 1)));
  }
};

__device__ inline Block find_block(const BlockSet& set, const BlockKey& key) {
  Probe probe(set, key);
  for (uint32_t look = 0; look < probe.looks; ++look, probe.next()) {
    const ulonglong2 slot = *reinterpret_cast<const ulonglong2*>(set.slots + probe.slot);
    if (slot.x == key.brick + 1) return {slot.y, probe.slot};
    if (slot.x == 0) break;
  }
  return {};
}

// The lowest row of a voxel that the block has.
__device__ inline int32_t row_of(const BlockSet& set, const Block& block, int bit) {
  return static_cast<int32_t>(~set.rows[set.ranks[block.slot] + block.before(bit)]);
}
// The lowest row with these coordinates, or -1.
__device__ inline int32_t find_row(const BlockSet& set, const Frame& frame, const int4& c) {
  if (!frame.holds(c)) return -1;
  const Place place = place_of(frame, c);
  const Block block = find_block(set, place.key);
  return block.has(place.bit) ? row_of(set, block, place.bit) : -1;
}

// The slot of a block, which is added if need be; no_slot and the status where there is no room.
__device__ inline uint32_t insert_block(const BlockSet& set, const BlockKey& key) {
  Probe probe(set, key);
  for (uint32_t look = 0; look < probe.looks; ++look, probe.next()) {
    uint64_t* const word = &set.slots[probe.slot].key;
    uint64_t seen = *word;
    if (seen == 0) {
      seen = atomicCAS(word_of(word), 0, key.brick + 1);
      if (seen == 0) {
        atomicOr(&set.occupied[probe.slot / 32], 1U << (probe.slot % 32));
        return probe.slot;
      }
    }
    if (seen == key.brick + 1) return probe.slot;
    // In a full table every row would look on.
    if (look % 32 == 31 && !is_fine(set)) return no_slot;
  }
  report(set, Status::full);
  return no_slot;
}

// Voxels of one thread on their way into a set, those of one block together.
struct Collector {
  static constexpr int threads = 256;  // of a block

  const BlockSet& set;
  BlockKey key = {};
  uint64_t bits = 0;

  __device__ void add(const Place& place) {
    if (place.key.brick != key.brick || place.key.octant != key.octant) {
      flush();
      key = place.key;
    }
    bits |= uint64_t{1} << place.bit;
  }
  __device__ void flush() {
    if (bits == 0) return;
    const uint32_t slot = insert_block(set, key);
    if (slot != no_slot) atomicOr(word_of(&set.slots[slot].mask), bits);
    bits = 0;
  }
  // Lanes that hold voxels of one block leave them to one of them, as atomics on one word wait for
  // each other: an index of 1.03 M rows takes 14 us instead of 25 (H200). shared: by leader.
  __device__ void share(uint32_t (&shared)[threads][2]) {
    const unsigned active = __activemask();
    const unsigned peers = __match_any_sync(active, static_cast<unsigned long long>(key.brick)) &
                           __match_any_sync(active, key.octant);
    const uint32_t leader = threadIdx.x / 32 * 32 + __ffs(peers) - 1;
    shared[threadIdx.x][0] = 0;
    shared[threadIdx.x][1] = 0;
    __syncwarp(active);
    if (static_cast<uint32_t>(bits) != 0) atomicOr(&shared[leader][0], static_cast<uint32_t>(bits));
    if (bits >> 32 != 0) atomicOr(&shared[leader][1], static_cast<uint32_t>(bits >> 32));
    __syncwarp(active);
    const uint64_t high = shared[threadIdx.x][1];
    bits = high << 32 | shared[threadIdx.x][0];
  }
};

}  // namespace voxgemm::cuda
