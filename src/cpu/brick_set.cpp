// SPDX-License-Identifier: Apache-2.0
#include "cpu/brick_set.h"

#include <limits>

#include "voxgemm/error.h"

namespace voxgemm::cpu {

BrickSet::BrickSet(const Box& box) {
  bool fits = true;
  box_cells_ = 1;
  for (int axis = 3; axis >= 0; --axis) {
    // A batch item is never shared by bricks: its axis is counted in ones, the others in eights.
    const int shift = axis == 0 ? 0 : 3;
    const int64_t first = box.low[axis] >> shift;
    box_.origin[axis] = first << shift;
    box_.extent[axis] = static_cast<uint64_t>((box.high[axis] >> shift) - first + 1);
    box_.step[axis] = box_cells_;
    fits = fits && !__builtin_mul_overflow(box_cells_, box_.extent[axis], &box_cells_);
  }
  check(fits && box_cells_ <= uint64_t{1} << 63, "the coordinates span ", box_.extent[0],
        " batches of ", box_.extent[1], " x ", box_.extent[2], " x ", box_.extent[3],
        " bricks of 8^3 voxels, expected at most 2^63 bricks in all");
}

void BrickSet::insert(const uint64_t* keys, int count) {
  if (2 * static_cast<size_t>(bricks_ + count) > slots_.size()) {
    const std::vector<Slot> old = std::move(slots_);
    slots_.assign(std::max<size_t>(1024, 2 * old.size()), Slot{.key = no_key, .brick = -1});
    slot_shift_ = 64 - std::countr_zero(slots_.size());
    for (const Slot& slot : old) {
      if (slot.key != no_key) slots_[slot_of(slot.key)] = slot;
    }
  }
  for (int i = 0; i < count; ++i) __builtin_prefetch(&slots_[first_slot(keys[i])], 1);
  for (int i = 0; i < count; ++i) {
    Slot& slot = slots_[slot_of(keys[i])];
    if (slot.key == no_key) slot = {.key = keys[i], .brick = bricks_++};
  }
}

void BrickSet::make_cells() {
  // The last word has no cell of the box: it answers for what is outside.
  const uint64_t words = box_cells_ / 64 + 2;
  cells_.resize(words);
  box_.outside = 64 * (words - 1);
}

void BrickSet::number_cells() {
  with_popcount([&] {
    for (Cells& cells : cells_) {
      cells.rank = bricks_;
      bricks_ += std::popcount(cells.mask);
    }
  });
}

void BrickSet::make_bricks(const Context& ctx) {
  table_ = Buffer<Brick>(ctx, bricks_ + 1);
  for_pieces(ctx, bricks_ + 1, piece, [&](int64_t first, int64_t last) {
    std::fill(table_.data() + first, table_.data() + last, Brick{});
  });
}

void BrickSet::rank_voxels() {
  with_popcount([&] {
    for (int64_t b = 0; b < bricks_; ++b) {
      Brick& brick = table_[b];
      for (int word = 0; word < 8; ++word) {
        brick.rank[word] = static_cast<int32_t>(voxels_);
        voxels_ += std::popcount(brick.mask[word]);
      }
    }
  });
  constexpr int64_t most = std::numeric_limits<int32_t>::max();
  check(voxels_ <= most, "there are ", voxels_, " voxels, expected at most ", most);
}

std::vector<BrickSet::PlacedBrick> BrickSet::sorted() const {
  std::vector<PlacedBrick> bricks;
  bricks.reserve(static_cast<size_t>(bricks_));
  const auto add = [&](uint64_t key, const Brick* brick) {
    PlacedBrick placed{box_.origin, brick};
    for (int axis = 0; axis < 4; ++axis) {
      const auto cell = static_cast<int64_t>(key / box_.step[axis]);
      placed.corner[axis] += axis == 0 ? cell : 8 * cell;
      key %= box_.step[axis];
    }
    bricks.push_back(placed);
  };
  for (size_t i = 0; i < cells_.size(); ++i) {
    for (uint64_t mask = cells_[i].mask; mask != 0; mask &= mask - 1) {
      const uint64_t key = 64 * i + static_cast<uint64_t>(std::countr_zero(mask));
      add(key, table_.data() + bricks.size());
    }
  }
  std::vector<Slot> slots;
  std::copy_if(slots_.begin(), slots_.end(), std::back_inserter(slots),
               [](const Slot& slot) { return slot.key != no_key; });
  std::sort(slots.begin(), slots.end(), [](const Slot& a, const Slot& b) { return a.key < b.key; });
  for (const Slot& slot : slots) add(slot.key, table_.data() + slot.brick);
  return bricks;
}

}  // namespace voxgemm::cpu
