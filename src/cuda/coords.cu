// SPDX-License-Identifier: Apache-2.0
#include "conv/coords.h"

#include <algorithm>
#include <bit>

#include "conv/reach.h"
#include "cuda/sorting.h"
#include "cuda/voxel_index.cuh"

namespace voxgemm::cuda {
namespace {

// Steps through the taps of an axis, of AxisReach's outputs.
struct AxisWalk {
  int64_t out;
  int64_t rest;

  __device__ AxisWalk(const AxisReach& axis, int32_t in)
      : out(floor_div(in + axis.padding, axis.stride)),
        rest(in + axis.padding - out * axis.stride) {}
  __device__ bool reaches(const Reach& reach, const Frame& frame, int number) const {
    return (reach.single || rest == 0) && out >= frame.low[number] && out <= frame.high[number];
  }
  __device__ void next(const AxisReach& axis) {
    out -= axis.whole_step;
    rest -= axis.rest_of_step;
    if (rest < 0) {
      rest += axis.stride;
      --out;
    }
  }
};

// Voxels on their way into a set; neighbours in one block go together.
struct Collector {
  const BlockSet& set;
  NewBlocks& added;
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
    const uint32_t slot = insert_block(set, key, added);
    if (slot != no_slot) add_voxels(set, slot, bits);
    bits = 0;
  }
};

__device__ void add_row(
    const Reach& reach, const Frame& frame, const int4& c, uint32_t row, Collector& collector) {
  const auto& [x_axis, y_axis, z_axis] = reach.axes;
  const bool single = reach.single;
  AxisWalk x(x_axis, c.y);
  // A walk begins with a division of 64 bits.
  const AxisWalk first_y(y_axis, c.z);
  const AxisWalk first_z(z_axis, c.w);
  for (int tx = 0; tx < (single ? 1 : x_axis.taps); ++tx, x.next(x_axis)) {
    if (!x.reaches(reach, frame, 1)) continue;
    AxisWalk y = first_y;
    for (int ty = 0; ty < (single ? 1 : y_axis.taps); ++ty, y.next(y_axis)) {
      if (!y.reaches(reach, frame, 2)) continue;
      AxisWalk z = first_z;
      for (int tz = 0; tz < (single ? 1 : z_axis.taps); ++tz, z.next(z_axis)) {
        if (!z.reaches(reach, frame, 3)) continue;
        const int4 out = make_int4(c.x, static_cast<int32_t>(x.out), static_cast<int32_t>(y.out),
                                   static_cast<int32_t>(z.out));
        if (out.y == x.out && out.z == y.out && out.w == z.out) {
          collector.add(place_of(frame, out));
        } else {
          report(collector.set, Status::not_int32);
          atomicMax(&collector.set.head->counters.outside, ~row);
        }
      }
    }
  }
  collector.flush();
}

__global__ void add_reached(Coords coords, Reach reach, BlockSet set) {
  __shared__ NewBlocks added;
  if (!is_fine(set)) return;
  added.begin();
  const Frame frame = set.head->frame;
  // The threads of a block stay together.
  // Numbers of rows fit 31 bits, and registers are short.
  const auto rows = static_cast<uint32_t>(coords.rows);
  for (uint32_t first = blockIdx.x * blockDim.x; first < rows; first += gridDim.x * blockDim.x) {
    const uint32_t row = first + threadIdx.x;
    const int4 c = row < rows ? coords[row] : make_int4(padding_batch, 0, 0, 0);
    if (!is_padding(c)) {
      Collector collector{set, added};
      add_row(reach, frame, c, row, collector);
    }
    if (added.is_half_full()) added.flush(set);
  }
  added.flush(set);
}

// Where a block stands in ascending (batch, x, y, z) order: `upper` counts (batch, x) and `lower`
// (y, z), in blocks.
struct Position {
  uint64_t upper;
  uint64_t lower;

  __device__ bool operator<(const Position& other) const {
    return upper < other.upper || (upper == other.upper && lower < other.lower);
  }
};

__device__ Position position_of(const BlockSet& set, uint32_t slot) {
  const Frame& frame = set.head->frame;
  const BlockKey key = key_of(set, slot);
  const uint64_t xs = key.brick / frame.step[1];  // bricks of batch and x
  const uint64_t in_x = key.brick - xs * frame.step[1];
  const uint64_t y = in_x / frame.step[2];
  const uint64_t z = in_x - y * frame.step[2];
  return {2 * xs + (key.octant >> 2),
          (2 * y + (key.octant >> 1 & 1)) * 2 * frame.extent[3] + 2 * z + (key.octant & 1)};
}

// The blocks of a set in ascending order.
//
// The order of their voxels goes by x inside a row of blocks along y and z, and by y inside a row
// along z. A unit is one line of 4 voxels along z of one block.
struct SortedBlocks {
  BlockSet set;
  uint32_t* slots;      // [room]
  Position* positions;  // [room]
  int64_t room;         // for blocks, at least as many as there are

  __device__ int64_t count() const {
    return is_fine(set) ? min(static_cast<int64_t>(set.head->counters.blocks), room) : 0;
  }
  __device__ int64_t before(const Position& wanted, int64_t blocks) const {
    int64_t first = 0;
    int64_t last = blocks;
    while (first < last) {
      const int64_t middle = (first + last) / 2;
      if (positions[middle] < wanted) {
        first = middle + 1;
      } else {
        last = middle;
      }
    }
    return first;
  }
  // The first voxel of a block.
  __device__ int4 corner(int64_t block) const {
    const Frame& frame = set.head->frame;
    const auto [upper, lower] = positions[block];
    const uint64_t batch = upper / (2 * frame.extent[1]);
    const uint64_t y = lower / (2 * frame.extent[3]);
    const uint64_t x = upper - batch * 2 * frame.extent[1];
    const uint64_t z = lower - y * 2 * frame.extent[3];
    return make_int4(static_cast<int32_t>(frame.origin[0] + static_cast<int64_t>(batch)),
                     static_cast<int32_t>(frame.origin[1] + static_cast<int64_t>(4 * x)),
                     static_cast<int32_t>(frame.origin[2] + static_cast<int64_t>(4 * y)),
                     static_cast<int32_t>(frame.origin[3] + static_cast<int64_t>(4 * z)));
  }
  __device__ uint32_t line(int64_t block, int x, int y) const {
    return static_cast<uint32_t>(set.slots[slots[block]].mask >> (16 * x + 4 * y)) & 15;
  }
};

// The numbers of a block's units.
struct Units {
  int64_t first;
  int32_t x_step;
  int32_t y_step;

  __device__ Units(const SortedBlocks& blocks, int64_t count, int64_t block) {
    const uint64_t z_blocks = 2 * blocks.set.head->frame.extent[3];
    const auto [upper, lower] = blocks.positions[block];
    const uint64_t y_lower = lower / z_blocks * z_blocks;
    const int64_t plane = blocks.before({upper, 0}, count);
    const int64_t plane_end = blocks.before({upper + 1, 0}, count);
    const int64_t row = blocks.before({upper, y_lower}, count);
    const int64_t row_end = blocks.before({upper, y_lower + z_blocks}, count);
    first = 16 * plane + 4 * (row - plane) + block - row;
    x_step = static_cast<int32_t>(4 * (plane_end - plane));
    y_step = static_cast<int32_t>(row_end - row);
  }
  __device__ int64_t at(int x, int y) const {
    return first + x * int64_t{x_step} + y * int64_t{y_step};
  }
};

// What output_coords has and makes, and how much of it the host knows before it is there.
struct Output {
  int64_t blocks;  // at most
  int64_t voxels;  // rows of the result
  // Of the blocks' positions as one number. Where there is no frame to go by, 2^40 are the most.
  int position_bits = 40;

  // Whether all voxels of a set have their rows.
  __device__ bool holds(const BlockSet& set) const {
    return is_fine(set) && set.head->counters.voxels <= static_cast<uint64_t>(voxels);
  }
};

// The voxels of a set in ascending (batch, x, y, z) order.
Matrix ascending(const Context& ctx, const BlockSet& set, const Output& output) {
  const int64_t room = output.blocks;
  Layout layout;
  const size_t first_keys = layout.add<uint64_t>(room);
  const size_t second_keys = layout.add<uint64_t>(room);
  const size_t second_slots = layout.add<uint32_t>(room);
  const size_t positions_at = layout.add<Position>(room);
  const size_t units_at = layout.add<Units>(room);
  const size_t counts_at = layout.add<uint32_t>(16 * room);
  const std::shared_ptr<void> memory = ctx.allocate(layout.bytes());
  auto* keys = Layout::at<uint64_t>(memory, first_keys);
  auto* sorted_keys = Layout::at<uint64_t>(memory, second_keys);
  auto* sorted_slots = Layout::at<uint32_t>(memory, second_slots);
  SortedBlocks blocks = {set, set.occupied, Layout::at<Position>(memory, positions_at), room};
  const auto count = [=] __device__() { return blocks.count(); };
  const int bits = output.position_bits;
  // The widest boxes take two sorts, which are stable.
  for (int first_bit = 0; first_bit < bits; first_bit += 64) {
    const int sorted_bits = std::min(64, bits - first_bit);
    for_each(ctx, room, count, [=] __device__(int64_t i, int64_t used) {
      // Behind the blocks.
      keys[i] = ~uint64_t{0} >> (64 - sorted_bits);
      if (i >= used) {
        blocks.slots[i] = 0;
        return;
      }
      const Position at = position_of(set, blocks.slots[i]);
      const uint64_t* extent = set.head->frame.extent;
      const auto number =
          static_cast<unsigned __int128>(at.upper) * (4 * extent[2] * extent[3]) + at.lower;
      if (number >> bits != 0) report(set, Status::too_wide);
      keys[i] &= static_cast<uint64_t>(number >> first_bit);
    });
    sort_by_key<uint64_t>(ctx, {keys, sorted_keys, blocks.slots, sorted_slots}, room, sorted_bits);
    std::swap(blocks.slots, sorted_slots);
  }
  for_each(ctx, room, count, [=] __device__(int64_t i, int64_t used) {
    if (i < used) blocks.positions[i] = position_of(set, blocks.slots[i]);
  });
  auto* units = Layout::at<Units>(memory, units_at);
  auto* counts = Layout::at<uint32_t>(memory, counts_at);
  for_each(ctx, 4 * room, count, [=] __device__(int64_t i, int64_t used) {
    const int64_t block = i >> 2;
    const int x = static_cast<int>(i & 3);
    if (block >= used) {
      for (int y = 0; y < 4; ++y) counts[4 * i + y] = 0;
      return;
    }
    const Units numbers(blocks, used, block);
    if (x == 0) units[block] = numbers;
    for (int y = 0; y < 4; ++y) counts[numbers.at(x, y)] = __popc(blocks.line(block, x, y));
  });
  exclusive_sums(ctx, counts, counts, 16 * room);
  Matrix coords = make_matrix(ctx, output.voxels, 4, Dtype::i32);
  auto* rows = coords.as<int4>();
  const auto held = [=] __device__() { return output.holds(set) ? blocks.count() : 0; };
  for_each(ctx, 4 * room, held, [=] __device__(int64_t i, int64_t used) {
    const int64_t block = i >> 2;
    const int x = static_cast<int>(i & 3);
    if (block >= used) return;
    const int4 corner = blocks.corner(block);
    for (int y = 0; y < 4; ++y) {
      uint32_t row = counts[units[block].at(x, y)];
      for (uint32_t bits = blocks.line(block, x, y); bits != 0; bits &= bits - 1) {
        rows[row++] = make_int4(corner.x, corner.y + x, corner.z + y, corner.w + __ffs(bits) - 1);
      }
    }
  });
  return coords;
}

// What stands behind the voxels of a set, or says that there was no room for them.
void write_padding(const Context& ctx,
                   const BlockSet& set,
                   const Output& output,
                   const Matrix& coords) {
  auto* rows = coords.as<int4>();
  for_each(ctx, coords.rows, [=] __device__(int64_t row) {
    const Counters& counters = set.head->counters;
    const auto status = static_cast<Status>(counters.status);
    const bool good = output.holds(set) || status == Status::empty;
    const auto voxels = static_cast<int64_t>(counters.voxels);
    if (good && row < voxels) return;
    rows[row] = make_int4(padding_batch, 0, 0, 0);
    if (good || row > 0) return;
    int64_t found = counters.found;
    int64_t room = counters.room;
    if (status == Status::fine || status == Status::full) {
      found = min(max(voxels, int64_t{counters.blocks}), int64_t{INT32_MAX});
      room = output.voxels;
    }
    rows[0] =
        make_int4(padding_batch, failure_mark, static_cast<int>(found), static_cast<int>(room));
  });
}

}  // namespace

int64_t first_row_outside(const Context& ctx,
                          const MatrixRef& matrix,
                          const std::array<std::optional<int64_t>, 4>& limits) {
  const DeviceGuard guard(ctx.device);
  const std::shared_ptr<void> memory = ctx.allocate(sizeof(uint64_t));
  auto* lowest = static_cast<unsigned long long*>(memory.get());
  fill_bytes(ctx, lowest, 0xff, sizeof(*lowest));
  int64_t low[4];
  int64_t high[4];
  for (int axis = 0; axis < 4; ++axis) {
    low[axis] = limits[axis] ? 0 : INT64_MIN;
    high[axis] = limits[axis].value_or(INT64_MAX);
  }
  const Coords coords(matrix);
  for_each(ctx, coords.rows, [=] __device__(int64_t row) {
    const int4 c = coords[row];
    const int32_t values[4] = {c.x, c.y, c.z, c.w};
    bool inside = true;
    for (int axis = 0; axis < 4; ++axis) {
      inside &= values[axis] >= low[axis] && values[axis] < high[axis];
    }
    if (!inside && !is_padding(c)) atomicMin(lowest, static_cast<unsigned long long>(row));
  });
  return static_cast<int64_t>(
      std::min<uint64_t>(read_back(ctx, lowest), static_cast<uint64_t>(coords.rows)));
}

UniqueCoords unique(const Context& ctx, const MatrixRef& matrix) {
  const DeviceGuard guard(ctx.device);
  const Coords coords(matrix);
  const BlockIndex index(ctx, matrix);
  const Matrix first_rows = index.first_rows(ctx, matrix);
  const auto* first = first_rows.as<int32_t>();
  const std::shared_ptr<void> memory = ctx.allocate(sizeof(uint32_t) * coords.rows);
  // Distinct voxels before each row.
  auto* numbers = static_cast<uint32_t*>(memory.get());
  for_each(ctx, coords.rows, [=] __device__(int64_t row) {
    numbers[row] = first[row] == row && !is_padding(coords[row]) ? 1 : 0;
  });
  exclusive_sums(ctx, numbers, numbers, coords.rows);
  const int64_t distinct = index.unique_voxels();
  UniqueCoords result;
  result.coords = make_matrix(ctx, distinct, 4, Dtype::i32);
  result.first_row = make_matrix(ctx, distinct, 1, Dtype::i32);
  result.inverse = make_matrix(ctx, coords.rows, 1, Dtype::i32);
  auto* voxels = result.coords.as<int4>();
  auto* first_row = result.first_row.as<int32_t>();
  auto* inverse = result.inverse.as<int32_t>();
  for_each(ctx, coords.rows, [=] __device__(int64_t row) {
    const int4 c = coords[row];
    const int32_t lowest = first[row];
    const uint32_t number = numbers[lowest];
    inverse[row] = is_padding(c) ? -1 : static_cast<int32_t>(number);
    if (lowest != row || is_padding(c)) return;
    voxels[number] = c;
    first_row[number] = lowest;
  });
  return result;
}

Matrix output_coords(const Context& ctx,
                     const MatrixRef& matrix,
                     const Geometry& geometry,
                     const OutputOptions& options) {
  const DeviceGuard guard(ctx.device);
  const Coords coords(matrix);
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
    const BlockSetMemory made = make_block_set(ctx, room, 0);
    measure(ctx, coords, reach, made.set);
    launch(ctx, over(ctx, coords.rows), add_reached, coords, reach, made.set);
    rank_blocks(ctx, made.set);
    if (bounded) {
      const Output output = {.blocks = room, .voxels = *options.max_voxels};
      const Matrix padded = ascending(ctx, made.set, output);
      write_padding(ctx, made.set, output, padded);
      return padded;
    }
    const SetHead head = read_head(ctx, made.set);
    const auto status = static_cast<Status>(head.counters.status);
    if (status == Status::empty) return make_matrix(ctx, 0, 4, Dtype::i32);
    if (status == Status::fine) {
      check(head.counters.voxels <= INT32_MAX, "there are ", head.counters.voxels,
            " voxels, expected at most ", INT32_MAX);
      const auto& bricks = head.frame.extent;
      return ascending(
          ctx, made.set,
          {.blocks = head.counters.blocks,
           .voxels = static_cast<int64_t>(head.counters.voxels),
           .position_bits = static_cast<int>(std::bit_width(2 * bricks[0] * bricks[1] - 1) +
                                             std::bit_width(4 * bricks[2] * bricks[3] - 1))});
    }
    check(room < worst, ErrorCode::device, "the table of ", room,
          " blocks of output voxels is full");
    room = std::min(worst, 8 * room);
  }
}

}  // namespace voxgemm::cuda
