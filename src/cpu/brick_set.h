// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "cpu/popcount.h"
#include "voxgemm/context.h"

namespace voxgemm::cpu {

// Elements of the context's memory, not initialised.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Context& ctx, int64_t size)
      : storage_(ctx.allocate(sizeof(T) * static_cast<size_t>(size))),
        data_(static_cast<T*>(storage_.get())),
        size_(size) {}
  T* data() const { return data_; }
  int64_t size() const { return size_; }
  T& operator[](int64_t i) const { return data_[i]; }

 private:
  std::shared_ptr<void> storage_;
  T* data_ = nullptr;
  int64_t size_ = 0;
};

// Runs body(first, last) over pieces of [0, items), with popcount.
template <class Body>
void for_pieces(const Context& ctx, int64_t items, int64_t piece, const Body& body) {
  parallel_for(ctx, (items + piece - 1) / piece, [&](int64_t task, int) {
    with_popcount([&] { body(task * piece, std::min(items, (task + 1) * piece)); });
  });
}

// Bounds of voxels, both ends inside; axes batch, x, y, z.
struct Box {
  std::array<int64_t, 4> low = {};
  std::array<int64_t, 4> high = {-1, -1, -1, -1};
};

// A bounding box of bricks and the keys of its cells, one cell a brick. Axes batch, x, y, z, of
// which batch is counted in ones and the others in eights.
struct CellBox {
  std::array<int64_t, 4> origin = {};   // a voxel; x, y, z are multiples of 8
  std::array<uint64_t, 4> extent = {};  // in cells
  std::array<uint64_t, 4> step = {};    // what a cell further on an axis adds to the key
  uint64_t outside = ~uint64_t{0};      // the key of all cells outside the box

  // Of any cell, counted from the origin.
  uint64_t key(const std::array<uint64_t, 4>& cell) const {
    const bool inside =
        cell[0] < extent[0] && cell[1] < extent[1] && cell[2] < extent[2] && cell[3] < extent[3];
    const uint64_t key = cell[0] * step[0] + cell[1] * step[1] + cell[2] * step[2] + cell[3];
    return inside ? key : outside;
  }
  // Of the cell of a voxel inside the box.
  uint64_t key(int64_t batch, int64_t x, int64_t y, int64_t z) const {
    return static_cast<uint64_t>(batch - origin[0]) * step[0] +
           (static_cast<uint64_t>(x - origin[1]) >> 3) * step[1] +
           (static_cast<uint64_t>(y - origin[2]) >> 3) * step[2] +
           (static_cast<uint64_t>(z - origin[3]) >> 3);
  }
};

// 8^3 voxels: voxel (x, y, z) of the brick is bit 8 * y + z of word x. rank: the set's voxels
// before each word, bricks and words taken in order.
struct Brick {
  std::array<uint64_t, 8> mask;
  std::array<int32_t, 8> rank;

  bool has(int64_t word, int64_t bit) const { return (mask[word] >> bit & 1) != 0; }
  // The voxels of the set before this one.
  int32_t rank_of(int64_t word, int64_t bit) const {
    return rank[word] + std::popcount(mask[word] & ((uint64_t{1} << bit) - 1));
  }
};

// A set of voxels as bricks. Bricks are found by a key, the number of their cell in the bounding
// box: through one bit a cell and the running count of bricks where the box has few cells for its
// voxels, and through an open-addressing table, never more than half full, where it has many.
class BrickSet {
 public:
  // visit(i, emit) calls emit(batch, x, y, z) for the voxels of item i, all inside the box; it is
  // called twice for every i in [0, items), from several threads.
  template <class Visit>
  BrickSet(const Context& ctx, const Box& box, int64_t items, const Visit& visit);

  int64_t bricks() const { return bricks_; }
  int64_t voxels() const { return voxels_; }
  const CellBox& box() const { return box_; }
  // The brick of a key of the box, or an empty brick.
  const Brick& at(uint64_t key) const { return table_[brick_number(key)]; }
  // at() of many keys: their cache misses overlap, and the bricks are on their way to the cache.
  void at(const uint64_t* keys, int count, const Brick** bricks) const {
    if (cells_.empty()) {
      for (int i = 0; i < count; ++i) __builtin_prefetch(&slots_[first_slot(keys[i])]);
    }
    for (int i = 0; i < count; ++i) {
      bricks[i] = &at(keys[i]);
      __builtin_prefetch(bricks[i]);
      __builtin_prefetch(&bricks[i]->rank);
    }
  }
  // use(i, brick, word, bit) for every voxel of the items [first, last), all of them in the set.
  template <class Visit, class Use>
  void for_voxels(int64_t first, int64_t last, const Visit& visit, const Use& use) const {
    struct Voxel {
      int64_t item;
      int word;
      int bit;
    };
    std::array<uint64_t, 64> keys = {};
    std::array<Voxel, 64> voxels = {};
    std::array<const Brick*, 64> bricks = {};
    int count = 0;
    for (int64_t i = first; i < last; ++i) {
      visit(i, [&](int64_t batch, int64_t x, int64_t y, int64_t z) {
        keys[count] = box_.key(batch, x, y, z);
        voxels[count] = {i, static_cast<int>(x & 7), static_cast<int>(8 * (y & 7) + (z & 7))};
        if (++count < 64) return;
        at(keys.data(), count, bricks.data());
        for (int j = 0; j < count; ++j)
          use(voxels[j].item, *bricks[j], voxels[j].word, voxels[j].bit);
        count = 0;
      });
    }
    at(keys.data(), count, bricks.data());
    for (int j = 0; j < count; ++j) use(voxels[j].item, *bricks[j], voxels[j].word, voxels[j].bit);
  }

  struct PlacedBrick {
    std::array<int64_t, 4> corner;  // batch, and x, y, z of its first voxel
    const Brick* brick;
  };
  // All bricks, by ascending corners.
  std::vector<PlacedBrick> sorted() const;

 private:
  // 64 cells: which of them have a brick, and the bricks before them.
  struct Cells {
    uint64_t mask;
    int64_t rank;
  };
  struct Slot {
    uint64_t key;
    int64_t brick;
  };
  static constexpr uint64_t no_key = CellBox{}.outside;
  // Voxels handled by one task.
  static constexpr int64_t piece = 4096;

  explicit BrickSet(const Box& box);
  int64_t brick_number(uint64_t key) const {
    if (!cells_.empty()) {
      const Cells& cells = cells_[key >> 6];
      const uint64_t bit = uint64_t{1} << (key & 63);
      const int64_t number = cells.rank + std::popcount(cells.mask & (bit - 1));
      return (cells.mask & bit) != 0 ? number : bricks_;
    }
    const int64_t brick = slots_[slot_of(key)].brick;
    return brick >= 0 ? brick : bricks_;
  }
  uint64_t first_slot(uint64_t key) const {
    uint64_t hash = (key ^ key >> 32) * 0x9e3779b97f4a7c15;
    hash = (hash ^ hash >> 32) * 0x9e3779b97f4a7c15;
    return hash >> slot_shift_;
  }
  // The key's slot, or the empty one where it would stand.
  uint64_t slot_of(uint64_t key) const {
    uint64_t i = first_slot(key);
    while (slots_[i].key != key && slots_[i].key != no_key) i = (i + 1) & (slots_.size() - 1);
    return i;
  }
  // Adds a bit to a word that other threads may add to.
  static void add_bits(uint64_t& word, uint64_t bits, bool shared) {
    if (!shared) {
      word |= bits;
      return;
    }
    const std::atomic_ref<uint64_t> cell(word);
    if ((cell.load(std::memory_order_relaxed) & bits) != bits) {
      cell.fetch_or(bits, std::memory_order_relaxed);
    }
  }

  void insert(const uint64_t* keys, int count);
  void make_cells();
  void number_cells();
  void make_bricks(const Context& ctx);
  void rank_voxels();

  CellBox box_;
  uint64_t box_cells_ = 0;
  int64_t bricks_ = 0;
  int64_t voxels_ = 0;
  std::vector<Cells> cells_;
  std::vector<Slot> slots_;  // a power of two
  int slot_shift_ = 0;
  Buffer<Brick> table_;  // [bricks + 1], the last one empty
};

template <class Visit>
BrickSet::BrickSet(const Context& ctx, const Box& box, int64_t items, const Visit& visit)
    : BrickSet(box) {
  const bool shared = ctx.threads > 1 && items > piece;
  // 16 bytes for 64 cells: at most 16 bytes an item.
  if (box_cells_ / 64 <= static_cast<uint64_t>(items) + 1024) {
    make_cells();
    for_pieces(ctx, items, piece, [&](int64_t first, int64_t last) {
      uint64_t previous = no_key;
      for (int64_t i = first; i < last; ++i) {
        visit(i, [&](int64_t batch, int64_t x, int64_t y, int64_t z) {
          const uint64_t cell = box_.key(batch, x, y, z);
          if (cell == previous) return;
          previous = cell;
          add_bits(cells_[cell >> 6].mask, uint64_t{1} << (cell & 63), shared);
        });
      }
    });
    number_cells();
  } else {
    std::array<uint64_t, 64> keys = {};
    int count = 0;
    for (int64_t i = 0; i < items; ++i) {
      visit(i, [&](int64_t batch, int64_t x, int64_t y, int64_t z) {
        const uint64_t cell = box_.key(batch, x, y, z);
        if (count > 0 && cell == keys[count - 1]) return;
        keys[count++] = cell;
        if (count < 64) return;
        insert(keys.data(), count);
        count = 0;
      });
    }
    insert(keys.data(), count);
  }
  make_bricks(ctx);
  for_pieces(ctx, items, piece, [&](int64_t first, int64_t last) {
    for_voxels(first, last, visit, [&](int64_t, const Brick& brick, int word, int bit) {
      add_bits(table_[&brick - table_.data()].mask[word], uint64_t{1} << bit, shared);
    });
  });
  rank_voxels();
}

}  // namespace voxgemm::cpu
