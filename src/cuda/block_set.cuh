// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace voxgemm::cuda {

// A set of voxels in device memory: an open-addressing table of blocks of 4^3 voxels, each one
// 64-bit bitmap, with the running count of voxels before each block (its rank). Blocks are keyed by
// their brick of 8^3 voxels, whose number in the bounding box takes at most 63 bits, and by which
// octant of the brick they are; that part is not stored, but is where the block stands: the table
// is cut in groups of 8 slots, one class of octants each, so that the blocks of one brick share a
// 128-byte line. No look-up goes on longer than there are groups.

// What went wrong while a set was built; the first problem stays.
// Of empty and distinct sets no table is made: nothing is in them, or is looked for.
enum class Status : uint32_t { fine, empty, distinct, too_wide, not_int32, full, not_made };

// Numbers of a set that kernels count. Zero before the first.
struct Counters {
  uint32_t status;
  uint32_t blocks;
  uint64_t voxels;
  uint32_t done;        // blocks of threads that have measured their rows
  uint32_t largest[8];  // ordered bits of the coordinates, then of their complements
  uint32_t outside;     // complement of the lowest row with an output that int32 does not hold
  uint32_t unsorted;    // whether the rows do not ascend
  uint32_t found;       // not_made: voxels of the set that was not made, and the room it had
  uint32_t room;
};

// The box of a set, both ends inside; axes batch, x, y, z. The rest is about the part of it that
// int32 holds. Written by one thread.
struct Frame {
  int64_t low[4];
  int64_t high[4];
  int32_t origin[4];   // x, y, z are multiples of 8
  uint32_t last[4];    // largest offset from the origin
  uint64_t extent[4];  // batches, and bricks of 8^3 on the other axes
  uint64_t step[4];    // what a step on an axis adds to a brick's number

#ifdef __CUDACC__
  // The offsets of coordinates outside the box are larger too, modulo 2^32.
  __device__ uint32_t offset(int axis, int32_t value) const {
    return static_cast<uint32_t>(value) - static_cast<uint32_t>(origin[axis]);
  }
  __device__ bool holds(const int4& c) const {
    return offset(0, c.x) <= last[0] && offset(1, c.y) <= last[1] && offset(2, c.z) <= last[2] &&
           offset(3, c.w) <= last[3];
  }
#endif
};

struct SetHead {
  Counters counters;
  Frame frame;
};

struct alignas(16) Slot {
  uint64_t key;   // brick + 1, 0 = free
  uint64_t mask;  // voxel (x, y, z) of the block is bit 16 * x + 4 * y + z
};

struct BlockSet {
  Slot* slots = nullptr;         // [8 * groups]
  uint32_t* ranks = nullptr;     // [8 * groups]: voxels of the set before the slot's
  uint32_t* occupied = nullptr;  // [most_blocks]: the slots in use, in any order
  SetHead* head = nullptr;
  uint32_t groups = 0;
  uint32_t most_blocks = 0;
};

constexpr uint32_t no_slot = 0xffffffff;

#ifdef __CUDACC__

__device__ inline void report(const BlockSet& set, Status problem) {
  atomicCAS(&set.head->counters.status, static_cast<uint32_t>(Status::fine),
            static_cast<uint32_t>(problem));
}
__device__ inline bool is_fine(const BlockSet& set) {
  return set.head->counters.status == static_cast<uint32_t>(Status::fine);
}
__device__ inline bool has_failed(const BlockSet& set) {
  return set.head->counters.status > static_cast<uint32_t>(Status::distinct);
}

struct BlockKey {
  uint64_t brick;
  uint32_t octant;
};

// Offsets from the origin, inside the box.
__device__ inline BlockKey block_key(
    const Frame& frame, uint32_t batch, uint32_t x, uint32_t y, uint32_t z) {
  return {batch * frame.step[0] + (x >> 3) * frame.step[1] + (y >> 3) * frame.step[2] + (z >> 3),
          (x & 4) | (y >> 1 & 2) | (z >> 2 & 1)};
}
__device__ inline int voxel_bit(uint32_t x, uint32_t y, uint32_t z) {
  return static_cast<int>((x & 3) << 4 | (y & 3) << 2 | (z & 3));
}

struct Place {
  BlockKey key;
  int bit;
};
// Of coordinates (batch, x, y, z) inside the box.
__device__ inline Place place_of(const Frame& frame, const int4& c) {
  const uint32_t x = frame.offset(1, c.y);
  const uint32_t y = frame.offset(2, c.z);
  const uint32_t z = frame.offset(3, c.w);
  return {block_key(frame, frame.offset(0, c.x), x, y, z), voxel_bit(x, y, z)};
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

  __device__ Probe(const BlockSet& set, const BlockKey& key) : groups(set.groups) {
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
  for (uint32_t look = 0; look < probe.groups; ++look, probe.next()) {
    const ulonglong2 slot = *reinterpret_cast<const ulonglong2*>(set.slots + probe.slot);
    if (slot.x == key.brick + 1) return {slot.y, probe.slot};
    if (slot.x == 0) break;
  }
  return {};
}

// find_block() of several keys whose first looks are at blocks[i].slot, none where that is no_slot.
// The first looks, which nearly always do, are on their way at once.
template <int n>
__device__ inline void find_blocks(const BlockSet& set,
                                   const BlockKey (&keys)[n],
                                   Block (&blocks)[n]) {
  ulonglong2 looks[n];
#pragma unroll
  for (int i = 0; i < n; ++i) {
    looks[i] = make_ulonglong2(0, 0);
    if (blocks[i].slot != no_slot) {
      looks[i] = *reinterpret_cast<const ulonglong2*>(set.slots + blocks[i].slot);
    }
  }
#pragma unroll
  for (int i = 0; i < n; ++i) {
    blocks[i].mask = looks[i].y;
    if (looks[i].x == 0) blocks[i].slot = no_slot;
    if (looks[i].x != 0 && looks[i].x != keys[i].brick + 1) blocks[i] = find_block(set, keys[i]);
  }
}

// New blocks of the threads of a block, so that the list's length is counted once for many of them:
// all threads of the device would wait for that one word.
class NewBlocks {
 public:
  // All threads of the block call these two, the first before add().
  __device__ void begin() {
    if (threadIdx.x == 0) count_ = 0;
    __syncthreads();
  }
  __device__ void flush(const BlockSet& set) {
    __syncthreads();
    const uint32_t count = min(count_, room);
    if (threadIdx.x == 0) start_ = atomicAdd(&set.head->counters.blocks, count);
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < count; i += blockDim.x) append(set, start_ + i, slots_[i]);
    begin();
  }
  // Whether to flush; the same for all threads of the block, which all call it.
  __device__ bool is_half_full() const { return __syncthreads_or(count_ > room / 2 ? 1 : 0) != 0; }
  __device__ void add(const BlockSet& set, uint32_t slot) {
    const uint32_t place = atomicAdd(&count_, 1U);
    if (place < room) {
      slots_[place] = slot;
    } else {
      append(set, atomicAdd(&set.head->counters.blocks, 1U), slot);
    }
  }

 private:
  static constexpr uint32_t room = 1024;

  __device__ static void append(const BlockSet& set, uint32_t place, uint32_t slot) {
    if (place < set.most_blocks) {
      set.occupied[place] = slot;
    } else {
      report(set, Status::full);
    }
  }

  uint32_t count_;
  uint32_t start_;
  uint32_t slots_[room];
};

// The slot of a block, which is added where it is not there yet; no_slot and the status where there
// is no room.
__device__ inline uint32_t insert_block(const BlockSet& set,
                                        const BlockKey& key,
                                        NewBlocks& added) {
  Probe probe(set, key);
  for (uint32_t look = 0; look < probe.groups; ++look, probe.next()) {
    unsigned long long* word = reinterpret_cast<unsigned long long*>(&set.slots[probe.slot].key);
    uint64_t seen = *word;
    if (seen == 0) {
      seen = atomicCAS(word, 0ULL, static_cast<unsigned long long>(key.brick + 1));
      if (seen == 0) {
        added.add(set, probe.slot);
        return probe.slot;
      }
    }
    if (seen == key.brick + 1) return probe.slot;
  }
  report(set, Status::full);
  return no_slot;
}

__device__ inline void add_voxels(const BlockSet& set, uint32_t slot, uint64_t bits) {
  atomicOr(reinterpret_cast<unsigned long long*>(&set.slots[slot].mask),
           static_cast<unsigned long long>(bits));
}

#endif  // __CUDACC__

}  // namespace voxgemm::cuda
