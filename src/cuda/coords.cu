// SPDX-License-Identifier: Apache-2.0
#include "conv/coords.h"

#include <algorithm>
#include <bit>

#include "cuda/voxel_index.cuh"

#include "cuda/sorting.h"

namespace voxgemm::cuda {
namespace {

// Negative: none.
struct Limits {
  int64_t of_axis[4];
};

__global__ void find_outside(Coords coords, Limits limits, unsigned long long* lowest) {
  for (int64_t row = thread_index(); row < coords.rows; row += thread_count()) {
    const int4 c = coords[row];
    if (is_padding(c)) continue;
    const int32_t values[4] = {c.x, c.y, c.z, c.w};
    for (int axis = 0; axis < 4; ++axis) {
      const int64_t limit = limits.of_axis[axis];
      if (limit < 0 || (values[axis] >= 0 && values[axis] < limit)) continue;
      atomicMin(lowest, static_cast<unsigned long long>(row));
      break;
    }
  }
}

__global__ void mark_first(Coords coords, const int32_t* first, uint32_t* marks) {
  for (int64_t row = thread_index(); row < coords.rows; row += thread_count()) {
    marks[row] = first[row] == row && !is_padding(coords[row]) ? 1 : 0;
  }
}

struct UniqueParts {
  const int32_t* first;     // [n]
  const uint32_t* numbers;  // [n]: distinct voxels before each row
  int4* distinct;           // [m]
  int32_t* first_row;       // [m]
  int32_t* inverse;         // [n]
};

__global__ void write_unique(Coords coords, UniqueParts parts) {
  for (int64_t row = thread_index(); row < coords.rows; row += thread_count()) {
    const int4 c = coords[row];
    const int32_t lowest = parts.first[row];
    const uint32_t number = parts.numbers[lowest];
    parts.inverse[row] = is_padding(c) ? -1 : static_cast<int32_t>(number);
    if (lowest != row || is_padding(c)) continue;
    parts.distinct[number] = c;
    parts.first_row[number] = lowest;
  }
}

// The outputs of an input on one axis: (in + padding - tap * dilation) / stride where that is
// whole, or with `single` the one output floor((in + padding) / stride).
struct AxisReach {
  int64_t padding;
  int64_t stride;
  int64_t dilation_quotient;  // by the stride
  int64_t dilation_rest;
  int taps;
  bool single;
};
struct Reach {
  AxisReach axes[3];
};

// Steps through the taps of an axis.
struct AxisWalk {
  int64_t out;
  int64_t rest;

  __device__ AxisWalk(const AxisReach& axis, int32_t in) {
    const int64_t scaled = in + axis.padding;
    out = scaled / axis.stride;
    rest = scaled - out * axis.stride;
    if (rest < 0) {
      rest += axis.stride;
      --out;
    }
  }
  __device__ bool reaches(const AxisReach& axis, const Frame& frame, int number) const {
    return (axis.single || rest == 0) && out >= frame.low[number] && out <= frame.high[number];
  }
  __device__ void next(const AxisReach& axis) {
    out -= axis.dilation_quotient;
    rest -= axis.dilation_rest;
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
    const Reach& reach, const Frame& frame, const int4& c, int64_t row, Collector& collector) {
  const auto& [x_axis, y_axis, z_axis] = reach.axes;
  AxisWalk x(x_axis, c.y);
  // A walk begins with a division of 64 bits.
  const AxisWalk first_y(y_axis, c.z);
  const AxisWalk first_z(z_axis, c.w);
  for (int tx = 0; tx < x_axis.taps; ++tx, x.next(x_axis)) {
    if (!x.reaches(x_axis, frame, 1)) continue;
    AxisWalk y = first_y;
    for (int ty = 0; ty < y_axis.taps; ++ty, y.next(y_axis)) {
      if (!y.reaches(y_axis, frame, 2)) continue;
      AxisWalk z = first_z;
      for (int tz = 0; tz < z_axis.taps; ++tz, z.next(z_axis)) {
        if (!z.reaches(z_axis, frame, 3)) continue;
        const int4 out = make_int4(c.x, static_cast<int32_t>(x.out), static_cast<int32_t>(y.out),
                                   static_cast<int32_t>(z.out));
        if (out.y == x.out && out.z == y.out && out.w == z.out) {
          collector.add(place_of(frame, out));
        } else {
          report(collector.set, Status::not_int32);
          atomicMax(&collector.set.head->counters.outside, ~static_cast<uint32_t>(row));
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
  for (int64_t first = thread_index() - threadIdx.x; first < coords.rows; first += thread_count()) {
    const int64_t row = first + threadIdx.x;
    const int4 c = row < coords.rows ? coords[row] : make_int4(padding_batch, 0, 0, 0);
    if (!is_padding(c)) {
      Collector collector{set, added};
      add_row(reach, frame, c, row, collector);
    }
    if (added.is_half_full()) added.flush(set);
  }
  added.flush(set);
}

// Blocks of a set in ascending (batch, x, y, z) order of their corners. upper counts (batch, x) and
// lower (y, z), in blocks.
struct SortedBlocks {
  uint32_t* slots;  // [room]
  uint64_t* upper;  // [room]
  uint64_t* lower;  // [room]
  int64_t room;     // for blocks, at least as many as there are

  __device__ int64_t blocks_of(const BlockSet& set) const {
    return min(static_cast<int64_t>(set.head->counters.blocks), room);
  }

  __device__ int64_t lower_bound(int64_t count,
                                 uint64_t wanted_upper,
                                 uint64_t wanted_lower) const {
    int64_t first = 0;
    int64_t last = count;
    while (first < last) {
      const int64_t middle = (first + last) / 2;
      const bool before = upper[middle] < wanted_upper ||
                          (upper[middle] == wanted_upper && lower[middle] < wanted_lower);
      if (before) {
        first = middle + 1;
      } else {
        last = middle;
      }
    }
    return first;
  }
};

struct Position {
  uint64_t upper;
  uint64_t lower;
};
__device__ Position position_of(const BlockSet& set, uint32_t slot) {
  const Frame frame = set.head->frame;
  const BlockKey key = key_of(set, slot);
  const uint64_t batch = key.brick / frame.step[0];
  const uint64_t in_batch = key.brick - batch * frame.step[0];
  const uint64_t x = in_batch / frame.step[1];
  const uint64_t in_x = in_batch - x * frame.step[1];
  const uint64_t y = in_x / frame.step[2];
  const uint64_t z = in_x - y * frame.step[2];
  return {2 * (batch * frame.extent[1] + x) + (key.octant >> 2),
          (2 * y + (key.octant >> 1 & 1)) * 2 * frame.extent[3] + 2 * z + (key.octant & 1)};
}

enum class KeyPart { both, lower, upper };
struct Keys {
  uint32_t* slots;  // [room], 0 where there is no block
  uint64_t* keys;   // [room]; both: lower blocks * upper + lower
  KeyPart part;
  int64_t room;
  uint64_t largest;  // of the bits that are sorted by
};
// Where there is no block the key is the largest, and the sort, which is stable, leaves it behind.
__global__ void write_keys(BlockSet set, Keys out) {
  const bool fine = is_fine(set);
  const Frame& frame = set.head->frame;
  const int64_t count = fine ? set.head->counters.blocks : 0;
  // Extents in bricks are below 2^30.
  const uint64_t lower_blocks = 4 * frame.extent[2] * frame.extent[3];
  if (thread_index() == 0 && count > 0 && out.part == KeyPart::both &&
      (lower_blocks > out.largest || 2 * frame.extent[0] * frame.extent[1] - 1 >
                                         (out.largest - (lower_blocks - 1)) / lower_blocks)) {
    report(set, Status::too_wide);
  }
  for (int64_t i = thread_index(); i < out.room; i += thread_count()) {
    if (i >= count) {
      out.slots[i] = 0;
      out.keys[i] = out.largest;
      continue;
    }
    const Position position = position_of(set, out.slots[i]);
    out.keys[i] = position.lower;
    if (out.part == KeyPart::upper) out.keys[i] = position.upper;
    if (out.part == KeyPart::both) {
      out.keys[i] = position.upper * lower_blocks + position.lower;
    }
  }
}
__global__ void write_positions(BlockSet set, SortedBlocks blocks) {
  if (!is_fine(set)) return;
  const int64_t count = blocks.blocks_of(set);
  for (int64_t i = thread_index(); i < count; i += thread_count()) {
    const Position position = position_of(set, blocks.slots[i]);
    blocks.upper[i] = position.upper;
    blocks.lower[i] = position.lower;
  }
}

// The order of the voxels goes by x inside a row of blocks along y and z, and by y inside a row
// along z. A unit is one line of 4 voxels along z of one block; these are the numbers of a block's
// units in that order.
struct Units {
  int64_t first;
  int32_t x_step;
  int32_t y_step;

  __device__ Units(const BlockSet& set, const SortedBlocks& blocks, int64_t block) {
    const int64_t count = blocks.blocks_of(set);
    const uint64_t z_blocks = 2 * set.head->frame.extent[3];
    const uint64_t upper = blocks.upper[block];
    const uint64_t y_lower = blocks.lower[block] / z_blocks * z_blocks;
    const int64_t plane = blocks.lower_bound(count, upper, 0);
    const int64_t plane_end = blocks.lower_bound(count, upper + 1, 0);
    const int64_t line = blocks.lower_bound(count, upper, y_lower);
    const int64_t line_end = blocks.lower_bound(count, upper, y_lower + z_blocks);
    first = 16 * plane + 4 * (line - plane) + block - line;
    x_step = static_cast<int32_t>(4 * (plane_end - plane));
    y_step = static_cast<int32_t>(line_end - line);
  }
  __device__ int64_t at(int x, int y) const {
    return first + x * int64_t{x_step} + y * int64_t{y_step};
  }
};

__device__ uint32_t line_bits(const BlockSet& set, uint32_t slot, int x, int y) {
  return static_cast<uint32_t>(set.slots[slot].mask >> (16 * x + 4 * y)) & 15;
}

// units [room] for write_voxels.
__global__ void count_units(BlockSet set, SortedBlocks blocks, Units* units, uint32_t* counts) {
  const int64_t count = is_fine(set) ? blocks.blocks_of(set) : 0;
  for (int64_t i = thread_index(); i < 4 * blocks.room; i += thread_count()) {
    if (i >= 4 * count) {
      for (int unit = 0; unit < 4; ++unit) counts[4 * i + unit] = 0;
      continue;
    }
    const int x = static_cast<int>(i & 3);
    const Units of_block(set, blocks, i >> 2);
    if (x == 0) units[i >> 2] = of_block;
    for (int y = 0; y < 4; ++y) {
      counts[of_block.at(x, y)] =
          static_cast<uint32_t>(__popc(line_bits(set, blocks.slots[i >> 2], x, y)));
    }
  }
}

// Rows of the result for kernels.
struct Rows {
  int4* coords;  // [room]
  int64_t room;

  __device__ bool hold(const BlockSet& set) const {
    return is_fine(set) && set.head->counters.voxels <= static_cast<uint64_t>(room);
  }
};

struct UnitStarts {
  const Units* units;      // [blocks]
  const uint32_t* voxels;  // before every unit
};

__global__ void write_voxels(BlockSet set, SortedBlocks blocks, UnitStarts starts, Rows out) {
  if (!out.hold(set)) return;
  const Frame frame = set.head->frame;
  const uint64_t z_blocks = 2 * frame.extent[3];
  const int64_t count = blocks.blocks_of(set);
  for (int64_t i = thread_index(); i < 4 * count; i += thread_count()) {
    const int64_t block = i >> 2;
    const int x = static_cast<int>(i & 3);
    const Units units = starts.units[block];
    const uint64_t batch = blocks.upper[block] / (2 * frame.extent[1]);
    const uint64_t x_block = blocks.upper[block] - batch * 2 * frame.extent[1];
    const uint64_t y_block = blocks.lower[block] / z_blocks;
    const uint64_t z_block = blocks.lower[block] - y_block * z_blocks;
    for (int y = 0; y < 4; ++y) {
      uint32_t bits = line_bits(set, blocks.slots[block], x, y);
      uint32_t row = starts.voxels[units.at(x, y)];
      for (; bits != 0; bits &= bits - 1) {
        out.coords[row++] =
            make_int4(static_cast<int32_t>(frame.origin[0] + static_cast<int64_t>(batch)),
                      static_cast<int32_t>(frame.origin[1] + static_cast<int64_t>(4 * x_block + x)),
                      static_cast<int32_t>(frame.origin[2] + static_cast<int64_t>(4 * y_block + y)),
                      static_cast<int32_t>(frame.origin[3] + static_cast<int64_t>(4 * z_block) +
                                           __ffs(bits) - 1));
      }
    }
  }
}

// What stands behind the voxels, or says that there was no room for them.
__global__ void write_padding(BlockSet set, Rows out) {
  const Counters& counters = set.head->counters;
  const bool good = out.hold(set) || counters.status == static_cast<uint32_t>(Status::empty);
  const auto voxels = static_cast<int64_t>(counters.voxels);
  for (int64_t row = (good ? voxels : 0) + thread_index(); row < out.room; row += thread_count()) {
    out.coords[row] = make_int4(padding_batch, 0, 0, 0);
    if (good || row > 0) continue;
    int64_t found = counters.found;
    int64_t room = counters.room;
    const auto status = static_cast<Status>(counters.status);
    if (status == Status::fine || status == Status::full) {
      found = min(max(voxels, int64_t{counters.blocks}), int64_t{INT32_MAX});
      room = out.room;
    }
    out.coords[0] =
        make_int4(padding_batch, failure_mark, static_cast<int>(found), static_cast<int>(room));
  }
}

// How much of it the host knows before it is there.
struct Extent {
  int64_t blocks;  // at most
  int64_t voxels;  // rows of the result
  // Of the keys; where there is no frame to go by, 2^40 blocks are the most.
  int upper_bits = 20;
  int lower_bits = 20;
};

// The voxels of a set in ascending (batch, x, y, z) order.
Matrix ascending(const Context& ctx, const BlockSet& set, const Extent& extent) {
  const int64_t count = extent.blocks;
  const int upper_bits = extent.upper_bits;
  const int lower_bits = extent.lower_bits;
  Matrix coords = make_matrix(ctx, extent.voxels, 4, Dtype::i32);
  const Rows rows = {coords.as<int4>(), extent.voxels};
  Layout layout;
  const size_t first_keys = layout.add<uint64_t>(count);
  const size_t second_keys = layout.add<uint64_t>(count);
  const size_t second_slots = layout.add<uint32_t>(count);
  const size_t counts_at = layout.add<uint32_t>(16 * count);
  const size_t units_at = layout.add<Units>(count);
  const std::shared_ptr<void> memory = ctx.allocate(layout.bytes());
  auto* keys = Layout::at<uint64_t>(memory, first_keys);
  auto* sorted_keys = Layout::at<uint64_t>(memory, second_keys);
  auto* slots = set.occupied;
  auto* sorted_slots = Layout::at<uint32_t>(memory, second_slots);
  const auto sort = [&](KeyPart part, int bits) {
    launch(ctx, over(ctx, count), write_keys, set,
           Keys{slots, keys, part, count, ~uint64_t{0} >> (64 - bits)});
    sort_by_key(ctx, {keys, sorted_keys, slots, sorted_slots}, count, bits);
    std::swap(slots, sorted_slots);
  };
  if (upper_bits + lower_bits <= 64) {
    sort(KeyPart::both, upper_bits + lower_bits);
  } else {
    sort(KeyPart::lower, lower_bits);
    sort(KeyPart::upper, upper_bits);
  }
  const SortedBlocks blocks = {slots, keys, sorted_keys, count};
  launch(ctx, over(ctx, count), write_positions, set, blocks);
  auto* counts = Layout::at<uint32_t>(memory, counts_at);
  auto* units = Layout::at<Units>(memory, units_at);
  launch(ctx, over(ctx, 4 * count), count_units, set, blocks, units, counts);
  exclusive_sums(ctx, counts, counts, 16 * count);
  launch(ctx, over(ctx, 4 * count), write_voxels, set, blocks, UnitStarts{units, counts}, rows);
  return coords;
}

// What output_coords asks of a set: the rule for its box, what a row adds, and how many blocks it
// takes at most.
struct OutputSet {
  BoxRule box;
  Reach reach;
  int64_t blocks_per_row = 1;
};

OutputSet output_set(const Geometry& geometry, const OutputOptions& options) {
  const std::optional<Int3>& spatial_shape = options.spatial_shape;
  const bool floor = options.rule == OutputRule::floor;
  bool single = true;
  for (int axis = 0; axis < 3; ++axis) {
    single = single && geometry.size[axis] == geometry.stride[axis] && geometry.dilation[axis] == 1;
  }
  single = single || floor;
  OutputSet result;
  for (int axis = 0; axis < 3; ++axis) {
    const int64_t stride = geometry.stride[axis];
    const int64_t dilation = geometry.dilation[axis];
    const int64_t padding = floor ? 0 : geometry.padding[axis];
    const int64_t span = (geometry.size[axis] - 1) * dilation;
    // ceil((low - (stride - 1)) / stride) is floor(low / stride).
    result.box.before[axis] = floor ? 1 - stride : padding - span;
    result.box.after[axis] = padding;
    result.box.stride[axis] = stride;
    if (spatial_shape && !floor) {
      result.box.least[axis] = 0;
      result.box.most[axis] = geometry.out_shape(*spatial_shape)[axis] - 1;
    }
    result.reach.axes[axis] = {
        padding, stride, dilation / stride, dilation % stride, single ? 1 : geometry.size[axis],
        single};
    // Blocks of 4 under a row of outputs, none of which more than the taps.
    if (!single) {
      result.blocks_per_row *= std::min<int64_t>(geometry.size[axis], span / stride / 4 + 2);
    }
  }
  return result;
}

}  // namespace

int64_t first_row_outside(const Context& ctx,
                          const MatrixRef& coords,
                          const std::array<std::optional<int64_t>, 4>& limits) {
  const DeviceGuard guard(ctx.device);
  const std::shared_ptr<void> memory = ctx.allocate(sizeof(uint64_t));
  auto* lowest = static_cast<unsigned long long*>(memory.get());
  fill_bytes(ctx, lowest, 0xff, sizeof(*lowest));
  Limits plain;
  for (int axis = 0; axis < 4; ++axis) {
    plain.of_axis[axis] = limits[axis] ? std::max<int64_t>(*limits[axis], 0) : -1;
  }
  launch(ctx, over(ctx, coords.rows), find_outside, Coords(coords), plain, lowest);
  return static_cast<int64_t>(
      std::min<uint64_t>(read_back(ctx, lowest), static_cast<uint64_t>(coords.rows)));
}

std::array<int32_t, 4> coords_of_row(const Context& ctx, const MatrixRef& coords, int64_t row) {
  const DeviceGuard guard(ctx.device);
  return read_back(ctx, reinterpret_cast<const std::array<int32_t, 4>*>(coords.row<int32_t>(row)));
}

UniqueCoords unique(const Context& ctx, const MatrixRef& coords) {
  const DeviceGuard guard(ctx.device);
  const int64_t rows = coords.rows;
  const BlockIndex index(ctx, coords);
  const Matrix first = index.first_rows(ctx, coords);
  const std::shared_ptr<void> memory = ctx.allocate(sizeof(uint32_t) * rows);
  auto* numbers = static_cast<uint32_t*>(memory.get());
  launch(ctx, over(ctx, rows), mark_first, Coords(coords), first.as<int32_t>(), numbers);
  exclusive_sums(ctx, numbers, numbers, rows);
  const int64_t distinct = index.unique_voxels();
  UniqueCoords result;
  result.coords = make_matrix(ctx, distinct, 4, Dtype::i32);
  result.first_row = make_matrix(ctx, distinct, 1, Dtype::i32);
  result.inverse = make_matrix(ctx, rows, 1, Dtype::i32);
  const UniqueParts parts = {first.as<int32_t>(), numbers, result.coords.as<int4>(),
                             result.first_row.as<int32_t>(), result.inverse.as<int32_t>()};
  launch(ctx, over(ctx, rows), write_unique, Coords(coords), parts);
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
  const OutputSet output = output_set(geometry, options);
  // What the slots of a set can be numbered with.
  constexpr int64_t most_blocks = (int64_t{1} << 31) - 8;
  const int64_t worst = std::min(coords.rows * output.blocks_per_row, most_blocks);
  // Surfaces have a block for ten rows, scattered points two or three a row.
  int64_t room = std::min(worst, std::max<int64_t>(4096, 2 * coords.rows));
  // A block has a voxel.
  if (bounded) room = std::max<int64_t>(1, std::min(worst, *options.max_voxels));
  while (true) {
    const BlockSetMemory made = make_block_set(ctx, room, 0);
    measure(ctx, coords, output.box, made.set);
    launch(ctx, over(ctx, coords.rows), add_reached, coords, output.reach, made.set);
    rank_blocks(ctx, made.set);
    if (bounded) {
      const Matrix padded =
          ascending(ctx, made.set, {.blocks = room, .voxels = *options.max_voxels});
      launch(ctx, over(ctx, padded.rows), write_padding, made.set,
             Rows{padded.as<int4>(), padded.rows});
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
           .upper_bits = static_cast<int>(std::bit_width(2 * bricks[0] * bricks[1] - 1)),
           .lower_bits = static_cast<int>(std::bit_width(4 * bricks[2] * bricks[3] - 1))});
    }
    check(room < worst, ErrorCode::device, "the table of ", room,
          " blocks of output voxels is full");
    room = std::min(worst, 8 * room);
  }
}

}  // namespace voxgemm::cuda
