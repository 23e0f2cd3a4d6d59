// SPDX-License-Identifier: Apache-2.0
//
// The index of a coordinate set, in four kernels without a wait: measure (16 bytes a row), insert
// (16 bytes a row, an atomic for every block that a warp's rows lie in), rank (24 bytes a block),
// rows (16 bytes and one atomic a row). An atomic a row in insert took 25 us instead of 14 (a shell
// of 1.03 M rows, H200).
// Lost in rows: two rows of a thread at once, 14 us instead of 13 (it waits for its atomics). Lost:
// all four by one cluster of 16 blocks, 27 us instead of 18 (64160 rows); a table sized, and
// cleared, by the rows that lie in another block than the row before: 44 us instead of 49 at 1.03 M
// rows, but 18 instead of 15 at 15192 and 176 instead of 174 at 4.1 M. No gain: a look at the list
// of new blocks in every second round of insert only; in rows, the rank loaded with the first look.
// Which slot a block takes and which rank it gets depend on timing; what a look-up answers does
// not.
#include "cuda/voxel_index.cuh"

#include <algorithm>

namespace voxgemm::cuda {
namespace {

constexpr unsigned all_lanes = 0xffffffff;

__device__ uint32_t ordered_bits(int32_t value) {
  return static_cast<uint32_t>(value) ^ 0x80000000;
}
__device__ int64_t from_ordered_bits(uint32_t bits) {
  return static_cast<int32_t>(bits ^ 0x80000000);
}

// The frame of what the measured box reaches.
__device__ void set_frame(const BlockSet& set, const Reach& reach) {
  Frame& frame = set.head->frame;
  Status status = Status::fine;
  uint64_t cells = 1;
  uint64_t steps = 1;
  uint32_t largest[8];
  for (int i = 0; i < 8; ++i) largest[i] = __ldcg(&set.head->counters.largest[i]);
#pragma unroll
  for (int axis = 3; axis >= 0; --axis) {
    int64_t low = from_ordered_bits(~largest[4 + axis]);
    int64_t high = from_ordered_bits(largest[axis]);
    if (axis > 0) {
      low = reach.axes[axis - 1].low(low);
      high = reach.axes[axis - 1].high(high);
    }
    frame.low[axis] = low;
    frame.high[axis] = high;
    if (low > high) status = Status::empty;
    if (status != Status::fine) continue;
    // A batch item is never shared by bricks: its axis is counted in ones, the others in eights.
    const int shift = axis == 0 ? 0 : 3;
    const auto extent = static_cast<uint64_t>((high >> shift) - (low >> shift) + 1);
    if (__umul64hi(cells, extent) != 0 || cells * extent > uint64_t{1} << 63) {
      status = Status::too_wide;
    }
    cells *= extent;
    const int64_t first = min(max(low, int64_t{INT32_MIN}), int64_t{INT32_MAX}) >> shift;
    const int64_t last = min(max(high, int64_t{INT32_MIN}), int64_t{INT32_MAX}) >> shift;
    frame.origin[axis] = static_cast<int32_t>(first << shift);
    frame.extent[axis] = static_cast<uint64_t>(last - first + 1);
    frame.last[axis] = static_cast<uint32_t>((frame.extent[axis] << shift) - 1);
    frame.step[axis] = steps;
    steps *= frame.extent[axis];
  }
  if (status != Status::fine) report(set, status);
}

__device__ uint32_t max_of_warp(uint32_t value) {
#if __CUDA_ARCH__ >= 800
  return __reduce_max_sync(all_lanes, value);
#else
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    value = max(value, __shfl_xor_sync(all_lanes, value, lanes));
  }
  return value;
#endif
}

// Whether a row stands behind the one before it, or is padding.
__device__ bool ascends(const int4& before, const int4& c) {
  if (is_padding(c)) return true;
  if (is_padding(before) || before.x != c.x) return !is_padding(before) && before.x < c.x;
  if (before.y != c.y) return before.y < c.y;
  return before.z != c.z ? before.z < c.z : before.w < c.w;
}

constexpr int measure_batch = 4;  // rows of a thread at once

// aligned: as the coordinates are, so that the loads of a batch have no branch between them.
template <bool aligned>
__global__ void measure_rows(Coords coords, Reach reach, BlockSet set, bool distinct_will_do) {
  coords.aligned = aligned;
  int4 high = make_int4(INT32_MIN, INT32_MIN, INT32_MIN, INT32_MIN);
  int4 low = make_int4(INT32_MAX, INT32_MAX, INT32_MAX, INT32_MAX);
  for (int64_t first = thread_index(); first < coords.rows;
       first += measure_batch * thread_count()) {
    int4 batch[measure_batch];
#pragma unroll
    for (int i = 0; i < measure_batch; ++i) {
      const int64_t row = first + i * thread_count();
      batch[i] = row < coords.rows ? coords[row] : make_int4(padding_batch, 0, 0, 0);
    }
#pragma unroll
    for (int i = 0; i < measure_batch; ++i) {
      const int4 c = batch[i];
      const int64_t row = first + i * thread_count();
      if (distinct_will_do && row > 0 && row < coords.rows && !ascends(coords[row - 1], c)) {
        set.head->counters.unsorted = 1;
        __threadfence();
      }
      // A batch number that is padding raises no maximum.
      const bool used = !is_padding(c);
      high = make_int4(max(high.x, c.x), max(high.y, used ? c.y : INT32_MIN),
                       max(high.z, used ? c.z : INT32_MIN), max(high.w, used ? c.w : INT32_MIN));
      low = make_int4(min(low.x, used ? c.x : INT32_MAX), min(low.y, used ? c.y : INT32_MAX),
                      min(low.z, used ? c.z : INT32_MAX), min(low.w, used ? c.w : INT32_MAX));
    }
  }
  uint32_t largest[8] = {ordered_bits(high.x), ordered_bits(high.y), ordered_bits(high.z),
                         ordered_bits(high.w), ~ordered_bits(low.x), ~ordered_bits(low.y),
                         ~ordered_bits(low.z), ~ordered_bits(low.w)};
  __shared__ uint32_t of_block[8];
  if (threadIdx.x < 8) of_block[threadIdx.x] = 0;
  __syncthreads();
  for (int i = 0; i < 8; ++i) {
    largest[i] = max_of_warp(largest[i]);
    if (threadIdx.x % 32 == 0) atomicMax(&of_block[i], largest[i]);
  }
  __syncthreads();
  if (threadIdx.x < 8) {
    atomicMax(&set.head->counters.largest[threadIdx.x], of_block[threadIdx.x]);
    __threadfence();
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  if (atomicAdd(&set.head->counters.done, 1U) != gridDim.x - 1) return;
  __threadfence();
  const int4 first = coords[0];
  if (is_failure(first)) {
    set.head->counters.found = static_cast<uint32_t>(first.z);
    set.head->counters.room = static_cast<uint32_t>(first.w);
    return report(set, Status::not_made);
  }
  if (distinct_will_do && __ldcg(&set.head->counters.unsorted) == 0) {
    return report(set, Status::distinct);
  }
  set_frame(set, reach);
}

constexpr int insert_threads = 256;

// Lanes with voxels of one block leave them to one of them, as atomics on one word wait for each
// other.
__global__ void __launch_bounds__(insert_threads) insert_rows(Coords coords, BlockSet set) {
  __shared__ NewBlocks added;
  __shared__ uint32_t bits[insert_threads][2];  // by leader: of the block's mask
  if (!is_fine(set)) return;
  added.begin();
  const Frame frame = set.head->frame;
  const uint32_t lane = threadIdx.x % 32;
  // The threads of a block stay together.
  const int4 padding = make_int4(padding_batch, 0, 0, 0);
  int4 next = thread_index() < coords.rows ? coords[thread_index()] : padding;
  for (int64_t first = thread_index() - threadIdx.x; first < coords.rows; first += thread_count()) {
    const int4 c = next;
    const int64_t next_row = first + threadIdx.x + thread_count();
    next = next_row < coords.rows ? coords[next_row] : padding;
    const bool used = !is_padding(c);
    const Place place = used ? place_of(frame, c) : Place{};
    unsigned peers = __ballot_sync(all_lanes, used);
    peers &= __match_any_sync(all_lanes, static_cast<unsigned long long>(place.key.brick));
    peers &= __match_any_sync(all_lanes, place.key.octant);
    bits[threadIdx.x][0] = 0;
    bits[threadIdx.x][1] = 0;
    __syncwarp();
    const uint32_t leader = used ? __ffs(peers) - 1 : 32;
    if (used) {
      atomicOr(&bits[threadIdx.x - lane + leader][place.bit / 32], 1U << (place.bit % 32));
    }
    __syncwarp();
    if (lane == leader) {
      const uint32_t slot = insert_block(set, place.key, added);
      const uint64_t high = bits[threadIdx.x][1];
      if (slot != no_slot) add_voxels(set, slot, high << 32 | bits[threadIdx.x][0]);
    }
    if (added.is_half_full()) added.flush(set);
  }
  added.flush(set);
}

__global__ void rank_occupied(BlockSet set) {
  if (!is_fine(set)) return;
  const uint32_t blocks = set.head->counters.blocks;
  const int lane = threadIdx.x % 32;
  // The lanes of a warp stay together.
  for (int64_t first = thread_index() - lane; first < blocks; first += thread_count()) {
    const bool used = first + lane < blocks;
    const uint32_t slot = used ? set.occupied[first + lane] : 0;
    const uint32_t voxels = used ? static_cast<uint32_t>(__popcll(set.slots[slot].mask)) : 0;
    uint32_t sum = voxels;
    for (int lanes = 1; lanes < 32; lanes *= 2) {
      const uint32_t below = __shfl_up_sync(all_lanes, sum, lanes);
      if (lane >= lanes) sum += below;
    }
    uint32_t start = 0;
    if (lane == 31) {
      start = static_cast<uint32_t>(
          atomicAdd(reinterpret_cast<unsigned long long*>(&set.head->counters.voxels),
                    static_cast<unsigned long long>(sum)));
    }
    start = __shfl_sync(all_lanes, start, 31);
    if (used) set.ranks[slot] = start + sum - voxels;
  }
}

__global__ void lowest_rows(Coords coords, IndexView index) {
  if (!is_fine(index.set)) return;
  const Frame frame = index.set.head->frame;
  for (int64_t row = thread_index(); row < coords.rows; row += thread_count()) {
    const int4 c = coords[row];
    if (is_padding(c)) continue;
    const Place place = place_of(frame, c);
    const Block block = find_block(index.set, place.key);
    if (block.slot == no_slot) return;
    const uint32_t rank = index.set.ranks[block.slot] + block.before(place.bit);
    atomicMax(&index.rows[rank], ~static_cast<uint32_t>(row));
  }
}

}  // namespace

Grid over(const Context& ctx, int64_t items) {
  constexpr int threads = 256;
  // Eight such blocks are all that a multiprocessor holds.
  return {.blocks = std::min<int64_t>(ceil_div(items, threads), 8 * multiprocessors(ctx)),
          .threads = threads};
}

BlockSetMemory make_block_set(const Context& ctx, int64_t most_blocks, int64_t zeroed_words) {
  // The eight classes of a small set fill unevenly.
  constexpr int64_t fewest_groups = 512;
  BlockSetMemory result;
  BlockSet& set = result.set;
  set.groups = static_cast<uint32_t>(std::max(fewest_groups, ceil_div(2 * most_blocks, 8)));
  set.most_blocks = static_cast<uint32_t>(most_blocks);
  Layout layout;
  const size_t head = layout.add<SetHead>(1);
  const size_t slots = layout.add<Slot>(int64_t{8} * set.groups);
  const size_t words = layout.add<uint32_t>(zeroed_words);
  const size_t zeroed = layout.bytes();
  const size_t ranks = layout.add<uint32_t>(int64_t{8} * set.groups);
  const size_t occupied = layout.add<uint32_t>(most_blocks);
  result.memory = ctx.allocate(layout.bytes());
  set.head = Layout::at<SetHead>(result.memory, head);
  set.slots = Layout::at<Slot>(result.memory, slots);
  result.words = Layout::at<uint32_t>(result.memory, words);
  set.ranks = Layout::at<uint32_t>(result.memory, ranks);
  set.occupied = Layout::at<uint32_t>(result.memory, occupied);
  fill_bytes(ctx, result.memory.get(), 0, zeroed);
  return result;
}

std::string not_made(int64_t found, int64_t room) {
  if (found == 0) {
    return "output_coords with max_voxels was given coordinates whose output voxels span too wide "
           "a box or do not fit 32 bits";
  }
  return join("output_coords found at least ", found, " voxels, max_voxels is ", room);
}

SetHead read_head(const Context& ctx, const BlockSet& set) {
  const SetHead head = read_back(ctx, set.head);
  const auto status = static_cast<Status>(head.counters.status);
  if (status == Status::fine || status == Status::empty || status == Status::full) return head;
  check(status != Status::not_int32, "row ", ~head.counters.outside,
        " of the coordinates reaches an output voxel that 32-bit coordinates cannot hold");
  if (status == Status::not_made) {
    fail(ErrorCode::invalid_argument, true, not_made(head.counters.found, head.counters.room));
  }
  const Frame& frame = head.frame;
  const auto bricks = [&](int axis) {
    return (frame.high[axis] >> 3) - (frame.low[axis] >> 3) + 1;
  };
  fail(ErrorCode::invalid_argument, true,
       join("the coordinates span ", frame.high[0] - frame.low[0] + 1, " batches of ", bricks(1),
            " x ", bricks(2), " x ", bricks(3),
            " bricks of 8^3 voxels, expected at most 2^63 bricks in all"));
}

void measure(const Context& ctx,
             const Coords& coords,
             const Reach& reach,
             const BlockSet& set,
             bool distinct_will_do) {
  // Every block ends with global counts in the same few words.
  Grid grid = over(ctx, coords.rows);
  grid.blocks = std::min<int64_t>(grid.blocks, 2 * multiprocessors(ctx));
  launch(ctx, grid, coords.aligned ? measure_rows<true> : measure_rows<false>, coords, reach, set,
         distinct_will_do);
}

void rank_blocks(const Context& ctx, const BlockSet& set) {
  launch(ctx, over(ctx, set.most_blocks), rank_occupied, set);
}

BlockIndex::BlockIndex(const Context& ctx, const MatrixRef& matrix, bool distinct_will_do)
    : ctx_(ctx), rows_(matrix.rows) {
  const DeviceGuard guard(ctx.device);
  const Coords coords(matrix);
  if (rows_ == 0) return;
  const BlockSetMemory made = make_block_set(ctx, rows_, rows_);
  memory_ = made.memory;
  view_ = {made.set, made.words};
  measure(ctx, coords, {}, view_.set, distinct_will_do);
  launch(ctx, over(ctx, rows_), insert_rows, coords, view_.set);
  rank_blocks(ctx, view_.set);
  launch(ctx, over(ctx, rows_), lowest_rows, coords, view_);
}

int64_t BlockIndex::unique_voxels() const {
  if (rows_ == 0) return 0;
  const DeviceGuard guard(ctx_.device);
  const Counters counters = read_head(ctx_, view_.set).counters;
  check(counters.status != static_cast<uint32_t>(Status::full), ErrorCode::device, "the table of ",
        rows_, " rows is full: too many of its coordinates share a hash");
  return static_cast<int64_t>(counters.voxels);
}

int32_t BlockIndex::find(int32_t batch, int32_t x, int32_t y, int32_t z) const {
  if (unique_voxels() == 0) return -1;
  const DeviceGuard guard(ctx_.device);
  const std::shared_ptr<void> result = ctx_.allocate(sizeof(int32_t));
  auto* row = static_cast<int32_t*>(result.get());
  const IndexView index = view_;
  for_each(ctx_, 1, [=] __device__(int64_t) {
    *row = index.find(index.set.head->frame, make_int4(batch, x, y, z));
  });
  return read_back(ctx_, row);
}

Matrix BlockIndex::first_rows(const Context& ctx, const MatrixRef& matrix) const {
  Matrix result = make_matrix(ctx, rows_, 1, Dtype::i32);
  auto* first = result.as<int32_t>();
  const Coords coords(matrix);
  const IndexView index = view_;
  for_each(ctx, rows_, [=] __device__(int64_t row) {
    const int32_t lowest = is_fine(index.set) ? index.find(index.set.head->frame, coords[row]) : -1;
    first[row] = lowest < 0 ? static_cast<int32_t>(row) : lowest;
  });
  return result;
}

Matrix first_rows(const Context& ctx, const MatrixRef& coords) {
  return BlockIndex(ctx, coords, true).first_rows(ctx, coords);
}

std::unique_ptr<VoxelIndex::State> make_index(const Context& ctx, const MatrixRef& coords) {
  return std::make_unique<BlockIndex>(ctx, coords);
}

}  // namespace voxgemm::cuda
