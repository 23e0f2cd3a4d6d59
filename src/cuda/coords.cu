// SPDX-License-Identifier: Apache-2.0
#include "conv/coords.h"

#include <algorithm>
#include <bit>

#include "conv/items.h"
#include "conv/reach.h"
#include "cuda/voxel_index.cuh"

namespace voxgemm::cuda {
namespace {

// Where voxels stand in ascending (batch, x, y, z) order of their set's box.
template <class Place>
struct Order {
  const Frame& frame;
  Place step[4];  // of the axes

  __device__ explicit Order(const BlockSet& set) : frame(set.head->frame) {
    step[3] = 1;
    for (int axis = 2; axis >= 0; --axis) step[axis] = step[axis + 1] * 8 * frame.extent[axis + 1];
  }
  // Of the voxels of a block, from its rank on.
  __device__ void write(const BlockSet& set, uint32_t slot, Place* places) const {
    const BlockKey key = key_of(set, slot);
    uint64_t rest = key.brick;
    Place first = 0;
    for (int axis = 0; axis < 4; ++axis) {
      const uint64_t offset = rest / frame.step[axis];
      rest -= offset * frame.step[axis];
      const uint32_t half = axis > 0 ? key.octant >> (3 - axis) & 1 : 0;
      first += (axis > 0 ? 8 * offset + 4 * half : offset) * step[axis];
    }
    places += set.ranks[slot];
    for (uint64_t mask = set.slots[slot].mask; mask != 0; mask &= mask - 1) {
      const int bit = __ffsll(static_cast<long long>(mask)) - 1;
      *places++ = first + (bit >> 4) * step[1] + (bit >> 2 & 3) * step[2] + (bit & 3);
    }
  }
  __device__ int4 voxel(Place place) const {
    int32_t c[4];
    for (int axis = 0; axis < 4; ++axis) {
      const Place offset = place / step[axis];
      place -= offset * step[axis];
      c[axis] = static_cast<int32_t>(frame.origin[axis] + static_cast<uint32_t>(offset));
    }
    return make_int4(c[0], c[1], c[2], c[3]);
  }
};

// The voxels of a set in ascending order and padding behind them, or what says that they could not
// be made. bits: of a place; boxes that take more, of which the host does not know, are too wide.
template <class Place>
Matrix ascending(const Context& ctx, const BlockSet& set, int64_t rows, int bits) {
  Place* places = nullptr;
  Place* sorted = nullptr;
  const auto memory = make_room(ctx, Room{&places, rows}, Room{&sorted, rows});
  // Behind the voxels.
  fill_bytes(ctx, places, 0xff, sizeof(Place) * rows);
  const auto has_room = [=] __device__() {
    return is_fine(set) && set.head->voxels <= static_cast<uint64_t>(rows);
  };
  // A block has a voxel.
  for_each(ctx, rows, [=] __device__(int64_t i) {
    if (!has_room() || i >= set.head->blocks) return;
    const Frame& frame = set.head->frame;
    if ((frame.extent[0] * frame.step[0] - 1) >> (bits - 9) != 0) report(set, Status::too_wide);
    Order<Place>(set).write(set, set.list[i], places);
  });
  sort_keys(ctx, places, sorted, rows, bits);
  Matrix coords = make_matrix(ctx, rows, 4, Dtype::i32);
  auto* voxels = coords.as<int4>();
  for_each(ctx, rows, [=] __device__(int64_t i) {
    const auto found = static_cast<int64_t>(set.head->voxels);
    voxels[i] = has_room() && i < found ? Order<Place>(set).voxel(sorted[i]) : padding_row();
    Status status = set.head->status;
    if (i > 0 || status == Status::empty || has_room()) return;
    if (status == Status::fine || status == Status::full) {
      status = static_cast<Status>(min(found, int64_t{INT32_MAX}) << 31 | rows);
    }
    voxels[0] = failure_row(status > Status::not_made ? status : Status::not_made);
  });
  return coords;
}

}  // namespace

int64_t first_row_outside(const Context& ctx,
                          const MatrixRef& matrix,
                          const std::array<int64_t, 4>& limits) {
  const std::shared_ptr<void> memory = ctx.allocate(sizeof(uint64_t));
  auto* lowest = static_cast<unsigned long long*>(memory.get());
  fill_bytes(ctx, lowest, 0xff, sizeof(*lowest));
  int64_t limit[4];
  std::copy(limits.begin(), limits.end(), limit);
  const Matrix aligned = aligned_input(ctx, matrix);
  const Coords coords(aligned);
  for_each(ctx, coords.rows, [=] __device__(int64_t row) {
    const int4 c = coords.data[row];
    const bool inside =
        static_cast<uint32_t>(c.x) < limit[0] && static_cast<uint32_t>(c.y) < limit[1] &&
        static_cast<uint32_t>(c.z) < limit[2] && static_cast<uint32_t>(c.w) < limit[3];
    if (!inside && !is_padding(c)) atomicMin(lowest, static_cast<unsigned long long>(row));
  });
  return static_cast<int64_t>(
      std::min<uint64_t>(read_back(ctx, lowest), static_cast<uint64_t>(coords.rows)));
}

Matrix output_coords(const Context& ctx,
                     const MatrixRef& matrix,
                     const Geometry& geometry,
                     const OutputOptions& options) {
  const Matrix aligned = aligned_input(ctx, matrix);
  const Coords coords(aligned);
  const bool bounded = options.max_voxels.has_value();
  if (coords.rows == 0 && !bounded) return make_matrix(ctx, 0, 4, Dtype::i32);
  const Reach reach(geometry, options);
  // Blocks of 4 under the outputs of a row, on no axis more than the taps.
  int64_t blocks_per_row = 1;
  for (const AxisReach& axis : reach.axes) {
    const int64_t span = (axis.taps - 1) * axis.dilation;
    if (!reach.single) blocks_per_row *= std::min<int64_t>(axis.taps, span / axis.stride / 4 + 2);
  }
  // What the slots of a set can be numbered with.
  constexpr int64_t most_blocks = (int64_t{1} << 31) - 8;
  const int64_t worst = std::min(coords.rows * blocks_per_row, most_blocks);
  // Surfaces have a block for ten rows, scattered points two or three a row.
  int64_t room = std::min(worst, std::max<int64_t>(4096, 2 * coords.rows));
  // A block has a voxel.
  if (bounded) room = std::max<int64_t>(1, std::min(worst, *options.max_voxels));
  while (true) {
    const BlockSetMemory set = make_block_set(ctx, room, 0);
    fill_sets(ctx, Sides({coords, set}), reach);
    // Of a box that the host does not know 2^37 bricks of 8^3 voxels are the most.
    constexpr int most_bits = 37 + 9;
    if (bounded) return ascending<uint64_t>(ctx, set, *options.max_voxels, most_bits);
    const SetHead head = read_head(ctx, set);
    const Status status = head.status;
    if (status == Status::empty) return make_matrix(ctx, 0, 4, Dtype::i32);
    if (status == Status::fine) {
      check(head.voxels <= INT32_MAX, "there are ", head.voxels, " voxels, expected at most ",
            INT32_MAX);
      const uint64_t bricks = head.frame.extent[0] * head.frame.step[0];
      const int bits = static_cast<int>(std::bit_width(bricks - 1)) + 9;
      const auto sorted = bits < 64 ? ascending<uint64_t> : ascending<unsigned __int128>;
      return sorted(ctx, set, static_cast<int64_t>(head.voxels), bits);
    }
    check(room < worst, ErrorCode::device, "the table of ", room,
          " blocks of output voxels is full");
    room = std::min(worst, 8 * room);
  }
}

void for_items(const Context& ctx, int64_t count, const Item& item) {
  std::visit([&](const auto& body) { for_each(ctx, count, body); }, item);
}

}  // namespace voxgemm::cuda
