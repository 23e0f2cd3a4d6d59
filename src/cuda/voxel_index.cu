// SPDX-License-Identifier: Apache-2.0
//
// The index of a coordinate set, or of two at once, in four kernels without a wait: measure (16
// bytes a row; zeroes the table), insert (16 bytes a row, an atomic for every block that a warp's
// rows lie in), rank (a bit a slot, 16 bytes a block), rows (16 bytes and one atomic a row).
// A block's slot and rank depend on timing, what a look-up answers does not.
#include "cuda/voxel_index.cuh"

#include <algorithm>
#include <cub/block/block_scan.cuh>

#include "cuda/unroll.cuh"

namespace voxgemm::cuda {
namespace {

__device__ uint32_t ordered_bits(uint32_t value) { return value ^ 0x80000000; }
__device__ int64_t from_ordered_bits(uint32_t bits) { return int32_t(ordered_bits(bits)); }

// Of measured rows: the largest bits of the coordinates and of their complements; if out of order.
constexpr int box_numbers = 9;
__device__ uint32_t larger(uint32_t a, uint32_t b) { return max(a, b); }

// The frame of what a box reaches.
__device__ Status make_frame(const uint32_t (&box)[box_numbers], const Reach& reach, Frame* made) {
  Frame& frame = *made;
  Status status = Status::fine;
  uint64_t bricks = 1;
#pragma unroll
  for (int axis = 3; axis >= 0; --axis) {
    int64_t low = from_ordered_bits(~box[4 + axis]);
    int64_t high = from_ordered_bits(box[axis]);
    if (axis > 0) {
      low = reach.axes[axis - 1].low(low);
      high = reach.axes[axis - 1].high(high);
    }
    if (low > high) status = Status::empty;
    // A batch item is never shared by bricks: its axis is counted in ones, the others in eights.
    const int shift = axis == 0 ? 0 : 3;
    const int64_t first = max(low, int64_t{INT32_MIN}) >> shift << shift;
    const int64_t last = min(high | ((1 << shift) - 1), int64_t{INT32_MAX});
    const auto extent = static_cast<uint64_t>((high >> shift) - (low >> shift) + 1);
    frame.origin[axis] = static_cast<int32_t>(min(first, int64_t{INT32_MAX}));
    frame.last[axis] = static_cast<uint32_t>(last - first);
    frame.extent[axis] = extent;
    frame.step[axis] = bricks;
    const bool fits = __umul64hi(bricks, extent) == 0 && bricks * extent <= uint64_t{1} << 63;
    if (!fits && status == Status::fine) status = Status::too_wide;
    bricks *= extent;
  }
  return status;
}

// By the threads of every block together, the first brings it to the set. Whether to add anything.
__device__ bool find_frame(const Sides& sides, const Reach& reach, Frame* frame) {
  const Sides::Side& side = sides.here();
  __shared__ uint32_t box[box_numbers];
  __shared__ bool fine;
  const uint32_t lane = threadIdx.x % 32;
  for (uint32_t i = threadIdx.x / 32; i < box_numbers; i += blockDim.x / 32) {
    uint32_t largest = 0;
    for (uint32_t b = lane; b < sides.boxes; b += 32) {
      largest = max(largest, side.set.boxes[i * sides.boxes + b]);
    }
    largest = over_warp(largest, larger);
    if (lane == 0) box[i] = largest;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    Status status = make_frame(box, reach, frame);
    if (side.distinct_will_do && box[8] == 0) status = Status::distinct;
    const Status failure = side.coords.rows > 0 ? failure_in(side.coords.data[0]) : Status::fine;
    if (failure != Status::fine) status = failure;
    fine = status == Status::fine;
    if (blockIdx.x == 0) side.set.head->frame = *frame;
    if (blockIdx.x == 0 && !fine) side.set.head->status = status;
  }
  __syncthreads();
  return fine;
}

// Whether a voxel stands behind the row before it.
__device__ bool ascends(const int4& before, const int4& c) {
  if (is_padding(before) || before.x != c.x) return !is_padding(before) && before.x < c.x;
  if (before.y != c.y) return before.y < c.y;
  return before.z != c.z ? before.z < c.z : before.w < c.w;
}

constexpr int measure_batch = 4;  // rows of a thread at once

__global__ void measure_rows(const __grid_constant__ Sides sides) {
  const Sides::Side& side = sides.here();
  const Coords& coords = side.coords;
  auto* const end = reinterpret_cast<uint4*>(side.set.ranks);
  for (auto* word = reinterpret_cast<uint4*>(side.set.head) + thread_index(); word < end;
       word += thread_count()) {
    *word = make_uint4(0, 0, 0, 0);
  }
  const int64_t counts =
      sides.counts.words != nullptr && blockIdx.y == 0 ? sides.counts.taps + 3 : 0;
  for (int64_t i = thread_index(); i < counts; i += thread_count()) sides.counts.words[i] = 0;
  uint32_t largest[box_numbers] = {};
  for (int64_t first = thread_index(); first < coords.rows;
       first += measure_batch * thread_count()) {
    int4 batch[measure_batch];
    unroll<measure_batch>([&](int i) {
      const int64_t row = first + i * thread_count();
      batch[i] = row < coords.rows ? coords.data[row] : padding_row();
    });
    unroll<measure_batch>([&](int i) {
      if (is_padding(batch[i])) return;
      const int64_t row = first + i * thread_count();
      if (side.distinct_will_do && row > 0 && !ascends(coords.data[row - 1], batch[i])) {
        largest[8] = 1;
      }
      unroll<4>([&](int axis) {
        const uint32_t bits = ordered_bits((&batch[i].x)[axis]);
        largest[axis] = max(largest[axis], bits);
        largest[4 + axis] = max(largest[4 + axis], ~bits);
      });
    });
  }
  __shared__ uint32_t of_block[box_numbers];
  if (threadIdx.x < box_numbers) of_block[threadIdx.x] = 0;
  __syncthreads();
  unroll<box_numbers>([&](int i) {
    largest[i] = over_warp(largest[i], larger);
    if (threadIdx.x % 32 == 0) atomicMax(&of_block[i], largest[i]);
  });
  __syncthreads();
  if (threadIdx.x < box_numbers) {
    side.set.boxes[threadIdx.x * gridDim.x + blockIdx.x] = of_block[threadIdx.x];
  }
}

constexpr int rank_threads = 256;

// A thread a group of slots, which are one line of memory.
__global__ void __launch_bounds__(rank_threads) rank_groups(const __grid_constant__ Sides sides) {
  const BlockSet& set = sides.here().set;
  using Scan = cub::BlockScan<uint64_t, rank_threads, cub::BLOCK_SCAN_WARP_SCANS>;
  __shared__ typename Scan::TempStorage storage;
  __shared__ uint32_t first_rank;
  __shared__ uint32_t first_place;
  // The voxels of a table without room are still counted.
  if (!is_fine(set) && set.head->status != Status::full) return;
  // The threads of a block stay together.
  for (int64_t first = thread_index() - threadIdx.x; first < set.groups; first += thread_count()) {
    const int64_t first_slot = 8 * (first + threadIdx.x);
    const uint32_t occupied =
        first + threadIdx.x < set.groups ? set.occupied[first_slot / 32] >> (first_slot % 32) : 0;
    uint32_t voxels[8] = {};
    uint64_t sum = static_cast<uint64_t>(__popc(occupied & 0xff)) << 32;
    unroll<8>([&](int i) {
      if ((occupied >> i & 1) != 0) voxels[i] = __popcll(set.slots[first_slot + i].mask);
    });
    unroll<8>([&](int i) { sum += voxels[i]; });
    uint64_t before;
    uint64_t all;
    Scan(storage).ExclusiveSum(sum, before, all);
    if (threadIdx.x == 0 && all != 0) {
      first_rank = atomicAdd(word_of(&set.head->voxels), static_cast<uint32_t>(all));
      if (set.list != nullptr) {
        first_place = atomicAdd(&set.head->blocks, static_cast<uint32_t>(all >> 32));
      }
    }
    __syncthreads();
    uint32_t rank = first_rank + static_cast<uint32_t>(before);
    uint32_t place = first_place + static_cast<uint32_t>(before >> 32);
    unroll<8>([&](int i) {
      if ((occupied >> i & 1) == 0) return;
      set.ranks[first_slot + i] = rank;
      if (set.list != nullptr) set.list[place++] = static_cast<uint32_t>(first_slot + i);
      rank += voxels[i];
    });
    __syncthreads();
  }
}

// is_single: as the reach is.
template <bool is_single>
__global__ void __launch_bounds__(Collector::threads, blocks_here(3))
    insert_outputs(const __grid_constant__ Sides sides, Reach reach) {
  __shared__ Frame frame;
  __shared__ uint32_t shared[Collector::threads][2];
  const Coords& coords = sides.here().coords;
  const BlockSet& set = sides.here().set;
  if (!find_frame(sides, reach, &frame)) return;
  // Numbers of rows fit 31 bits, and registers are short.
  const auto rows = static_cast<uint32_t>(coords.rows);
  for (uint32_t row = thread_index(); row < rows; row += thread_count()) {
    const int4 c = coords.data[row];
    if (is_padding(c)) continue;
    Collector collector{set};
    const auto add = [&](int64_t x, int64_t y, int64_t z) {
      const int4 out =
          make_int4(c.x, static_cast<int32_t>(x), static_cast<int32_t>(y), static_cast<int32_t>(z));
      if (out.y == x && out.z == y && out.w == z) return collector.add(place_of(frame, out));
      report(set, Status::not_int32);
      atomicMax(&set.head->outside, ~row);
    };
    reach.walk<is_single>(add, c.y, c.z, c.w);
    collector.share(shared);
    collector.flush();
  }
}

__global__ void lowest_rows(const __grid_constant__ Sides sides) {
  const Coords& coords = sides.here().coords;
  const BlockSet& set = sides.here().set;
  if (!is_fine(set)) return;
  const Frame frame = set.head->frame;
  for (int64_t row = thread_index(); row < coords.rows; row += thread_count()) {
    const int4 c = coords.data[row];
    if (is_padding(c)) continue;
    const Place place = place_of(frame, c);
    const Block block = find_block(set, place.key);
    if (block.slot == no_slot) return;
    const uint32_t rank = set.ranks[block.slot] + block.before(place.bit);
    atomicMax(&set.rows[rank], ~static_cast<uint32_t>(row));
  }
}

__global__ void find_first_rows(const __grid_constant__ Sides sides) {
  const Sides::Side& side = sides.here();
  const bool fine = is_fine(side.set);
  uint32_t repeats = 0;
  for (int64_t row = thread_index(); row < side.coords.rows; row += thread_count()) {
    const int32_t lowest =
        fine ? find_row(side.set, side.set.head->frame, side.coords.data[row]) : -1;
    side.first[row] = lowest < 0 ? static_cast<int32_t>(row) : lowest;
    if (lowest >= 0 && lowest != row) ++repeats;
  }
  if (repeats > 0 && sides.counts.words != nullptr) {
    sides.counts.add(sides.counts.taps + blockIdx.y, repeats);
  }
  sides.counts.give();
}

// Blocks of threads that measure a side: every box is read by all that insert.
int64_t most_boxes(const Context& ctx) { return 2 * int64_t{multiprocessors(ctx)}; }

}  // namespace

BlockSetMemory make_block_set(const Context& ctx, int64_t most_blocks, int64_t rows) {
  // The eight classes of a small set fill unevenly.
  constexpr int64_t fewest_groups = 512;
  BlockSetMemory set;
  const int64_t groups = std::max(fewest_groups, 4 * ceil_div(2 * most_blocks, 32));
  set.groups = static_cast<uint32_t>(groups);
  set.memory = make_room(ctx, Room{&set.head, 1}, Room{&set.slots, 8 * groups},
                         Room{&set.occupied, groups / 4}, Room{&set.rows, rows},
                         Room{&set.ranks, 8 * groups}, Room{&set.list, rows == 0 ? 8 * groups : 0},
                         Room{&set.boxes, box_numbers * most_boxes(ctx)});
  if (rows > 0) set.list = nullptr;
  return set;
}

void check_made(Status status, int64_t rows) {
  check(status != Status::too_wide,
        "the input coordinates span more than 2^63 bricks of 8^3 voxels");
  check(status != Status::full, ErrorCode::device, "the table of ", rows,
        " rows is full: too many of their coordinates share a hash");
  check(status != Status::not_made,
        "output_coords with max_voxels was given coordinates whose output voxels span too wide a "
        "box or do not fit 32 bits");
  const auto numbers = static_cast<int64_t>(status);
  check(status < Status::not_made, "output_coords found at least ", numbers >> 31,
        " voxels, max_voxels is ", numbers & INT32_MAX);
}

SetHead read_head(const Context& ctx, const BlockSet& set) {
  const SetHead head = read_back(ctx, set.head);
  check(head.status != Status::not_int32, "row ", ~head.outside,
        " of the coordinates reaches an output voxel that 32-bit coordinates cannot hold");
  const uint64_t(&extent)[4] = head.frame.extent;
  check(head.status != Status::too_wide, "the coordinates span ", extent[0], " batches of ",
        extent[1], " x ", extent[2], " x ", extent[3],
        " bricks of 8^3 voxels, expected at most 2^63 bricks in all");
  if (head.status != Status::full) check_made(head.status, 0);
  return head;
}

void fill_sets(const Context& ctx, Sides sides, const Reach& reach) {
  Grid grid = sides.grid(ctx);
  Grid few = grid;
  few.blocks = std::min(grid.blocks, most_boxes(ctx));
  sides.boxes = static_cast<uint32_t>(few.blocks);
  launch(ctx, few, measure_rows, sides);
  // As many as run at once: each finds the frame.
  grid.blocks = std::min<int64_t>(grid.blocks, (reach.single ? 6 : 3) * multiprocessors(ctx));
  launch(ctx, grid, reach.single ? insert_outputs<true> : insert_outputs<false>, sides, reach);
  grid = over(ctx, std::max(sides.sides[0].set.groups, sides.sides[1].set.groups));
  grid.columns = sides.count;
  launch(ctx, grid, rank_groups, sides);
}

void index_rows(const Context& ctx, const Sides& sides) {
  fill_sets(ctx, sides, {});
  launch(ctx, sides.grid(ctx), lowest_rows, sides);
}

void write_first_rows(const Context& ctx, const Sides& sides) {
  launch(ctx, sides.grid(ctx), find_first_rows, sides);
}

BlockIndex::BlockIndex(const Context& ctx, const MatrixRef& matrix)
    : State(matrix.rows), ctx_(ctx), set_(make_block_set(ctx, matrix.rows, matrix.rows)) {
  const Matrix aligned = aligned_input(ctx, matrix);
  index_rows(ctx, Sides({Coords(aligned), set_}));
}

int64_t BlockIndex::unique_voxels() const {
  const DeviceGuard guard(ctx_.device);
  const SetHead head = read_head(ctx_, set_);
  check_made(head.status, rows);
  return static_cast<int64_t>(head.voxels);
}

int32_t BlockIndex::find(int32_t batch, int32_t x, int32_t y, int32_t z) const {
  if (unique_voxels() == 0) return -1;
  const DeviceGuard guard(ctx_.device);
  const std::shared_ptr<void> result = ctx_.allocate(sizeof(int32_t));
  auto* row = static_cast<int32_t*>(result.get());
  const BlockSet set = set_;
  for_each(ctx_, 1, [=] __device__(int64_t) {
    *row = find_row(set, set.head->frame, make_int4(batch, x, y, z));
  });
  return read_back(ctx_, row);
}

Matrix first_rows(const Context& ctx, const VoxelIndex::State& index, const MatrixRef& matrix) {
  Matrix result = make_matrix(ctx, matrix.rows, 1, Dtype::i32);
  const Matrix aligned = aligned_input(ctx, matrix);
  const BlockSet& set = static_cast<const BlockIndex&>(index).set();
  write_first_rows(ctx, Sides({Coords(aligned), set, result.as<int32_t>()}));
  return result;
}

std::unique_ptr<VoxelIndex::State> make_index(const Context& ctx, const MatrixRef& coords) {
  return std::make_unique<BlockIndex>(ctx, coords);
}

}  // namespace voxgemm::cuda
