// SPDX-License-Identifier: Apache-2.0
//
// Neighbour tables. A thread owns an output row. Rows are written tap by tap, so a warp's stores
// are contiguous; reads go to the blocks around its rows, which neighbouring threads share.
//
// Kernels of up to 5 voxels on every axis, without dilation, lie in two blocks of 4 at most on
// every axis. A thread looks the eight up first and keeps them in shared memory, then takes the
// taps line by line along z: one line is a few bits of two masks, and its ranks are consecutive in
// each. 3^3 taps of 1.03 M rows of a shell take 82 us on an H200: 1280 instructions a warp of rows,
// half of the issue slots; the table itself would be 27 us of memory. Of any other kernel a thread
// walks the taps, z innermost, and keeps the block of the last one, which takes 3 times as long.
#include <algorithm>

#include "conv/coords.h"
#include "cuda/schedule_cut.cuh"
#include "cuda/voxel_index.cuh"
#include "voxgemm/cuda.h"

namespace voxgemm::cuda {
namespace {

constexpr unsigned all_lanes = 0xffffffff;

struct Table {
  int32_t* neighbours;  // [taps, rows]
  uint32_t* masks;      // [rows], or null where they have not all taps
  int32_t* first;       // [rows] or null: what the middle tap finds, the row's own voxel
};

// The input voxels of one output row.
struct Window {
  const BlockSet& set;
  const Frame& frame;  // shared memory's
  int64_t corner[3];   // of tap (0, 0, 0), from the origin
  uint32_t batch;
  bool in_batch;
  uint32_t at[3] = {no_slot, no_slot, no_slot};  // a voxel in `block`
  Block block = {};

  __device__ Window(const BlockSet& in, const Frame& of_set, const Reach& reach, const int4& c)
      : set(in), frame(of_set) {
    for (int axis = 0; axis < 3; ++axis) {
      const AxisReach& on = reach.axes[axis];
      corner[axis] = (&c.y)[axis] * on.stride - on.padding - frame.origin[axis + 1];
    }
    const int64_t offset = static_cast<int64_t>(c.x) - frame.origin[0];
    in_batch = offset >= 0 && offset <= frame.last[0];
    batch = static_cast<uint32_t>(offset);
  }

  // The row at an offset from the corner, or -1.
  __device__ int32_t row(int64_t dx, int64_t dy, int64_t dz) {
    const auto x = static_cast<uint64_t>(corner[0] + dx);
    const auto y = static_cast<uint64_t>(corner[1] + dy);
    const auto z = static_cast<uint64_t>(corner[2] + dz);
    if (!in_batch || x > frame.last[1] || y > frame.last[2] || z > frame.last[3]) return -1;
    if (((x ^ at[0]) | (y ^ at[1]) | (z ^ at[2])) > 3) {
      at[0] = x;
      at[1] = y;
      at[2] = z;
      block = find_block(set, place_of(frame, batch, x, y, z).key);
    }
    const int bit = place_of(frame, batch, x, y, z).bit;
    return block.has(bit) ? row_of(set, block, bit) : -1;
  }
  // Calls put(row or -1) for every tap, count(tap, mask) for every 32 and the rest; the last mask.
  template <class Put, class Count>
  __device__ uint32_t walk(const AxisReach (&axes)[3], const Put& put, const Count& count) {
    uint32_t mask = 0;
    int tap = 0;
    for (int x = 0; x < axes[0].taps; ++x) {
      for (int y = 0; y < axes[1].taps; ++y) {
        for (int z = 0; z < axes[2].taps; ++z, ++tap) {
          const int32_t in = row(x * axes[0].dilation, y * axes[1].dilation, z * axes[2].dilation);
          if (tap % 32 == 0 && tap > 0) {
            count(tap - 32, mask);
            mask = 0;
          }
          mask |= (in >= 0 ? 1U : 0U) << (tap % 32);
          put(in);
        }
      }
    }
    count((tap - 1) / 32 * 32, mask);
    return mask;
  }
};

// To the map: for pairs, where it could not be built, minus the status of the index or the output.
__device__ void give_counts(const BlockSet& set,
                            const Coords& out,
                            const uint32_t* counts_of_block,
                            const Counts& counts) {
  __syncthreads();
  Status failure = Status::fine;
  if (blockIdx.x == 0) {
    const Status status = set.head->status;
    failure = status > Status::distinct || out.rows == 0 ? status : failure_in(out.data[0]);
  }
  for (int i = threadIdx.x; i <= counts.taps; i += blockDim.x) {
    if (counts_of_block[i] != 0) counts.add(i, counts_of_block[i]);
    if (failure > Status::distinct && i < counts.taps) {
      counts.words[i] = -static_cast<uint64_t>(failure);
    }
  }
  counts.give();
}

constexpr int fill_threads = 256;
constexpr int cube_blocks = 4;  // of a multiprocessor, for the registers

// The blocks under a kernel of at most 5 voxels an axis, two on every axis, in shared memory: the
// halves of their masks, and the ranks of the first voxels of those.
struct Cube {
  uint2 halves[8][2][fill_threads];  // bits, rank
};

// The place of tap (0, 0, 0) in the first of the blocks, which are loaded.
__device__ int3 load_cube(const Window& window, const int (&sizes)[3], Cube& cube) {
  const BlockSet& set = window.set;
  const Frame& frame = window.frame;
  const int64_t(&corner)[3] = window.corner;
  int place[3];  // of tap (0, 0, 0) in the block under the corner
  for (int axis = 0; axis < 3; ++axis) place[axis] = static_cast<int>(corner[axis] & 3);
  const auto crosses = [&](int axis) { return place[axis] + sizes[axis] > 4; };
  // Whether the block under the corner or the next is needed and inside the box, of whole blocks.
  const auto wants = [&](int axis, int side) {
    return static_cast<uint64_t>(corner[axis] + 4 * side) <= frame.last[axis + 1] &&
           (side == 0 || crosses(axis));
  };
  constexpr int at_once = 4;  // loads on their way
#pragma unroll
  for (int side_x = 0; side_x < 2; ++side_x) {
    // Rows that ascend have one x in most warps.
    if (side_x == 1 && !__any_sync(all_lanes, crosses(0))) break;
    BlockKey keys[at_once];
    Block blocks[at_once];
    ulonglong2 looks[at_once];
    unroll<at_once>([&](int i) {
      const int side_y = i >> 1;
      const int side_z = i & 1;
      keys[i] = place_of(frame, window.batch, corner[0] + 4 * side_x, corner[1] + 4 * side_y,
                         corner[2] + 4 * side_z)
                    .key;
      looks[i] = make_ulonglong2(0, 0);
      if (window.in_batch && wants(0, side_x) && wants(1, side_y) && wants(2, side_z)) {
        blocks[i].slot = Probe(set, keys[i]).slot;
        looks[i] = *reinterpret_cast<const ulonglong2*>(set.slots + blocks[i].slot);
      }
    });
    uint32_t ranks[at_once];
    unroll<at_once>([&](int i) {
      blocks[i].mask = looks[i].y;
      // The first look nearly always does.
      if (looks[i].x != 0 && looks[i].x != keys[i].brick + 1) blocks[i] = find_block(set, keys[i]);
      ranks[i] = blocks[i].mask != 0 ? set.ranks[blocks[i].slot] : 0;
    });
    unroll<at_once>([&](int i) {
      uint2(&halves)[2][fill_threads] = cube.halves[4 * side_x + i];
      const auto low = static_cast<uint32_t>(blocks[i].mask);
      const auto high = static_cast<uint32_t>(blocks[i].mask >> 32);
      halves[0][threadIdx.x] = make_uint2(low, ranks[i]);
      halves[1][threadIdx.x] = make_uint2(high, ranks[i] + __popc(low));
    });
  }
  return make_int3(place[0], place[1], place[2]);
}

// The taps of one line along z: presence bits and the ranks where they start in the two blocks.
struct Line {
  uint32_t bits;
  uint32_t rank;
  uint32_t next_rank;

  // From the first of the blocks on.
  __device__ Line(const Cube& cube, int x, int y, int z) {
    const int block = (x >> 2) * 4 + (y >> 2) * 2;
    const int half = x >> 1 & 1;
    const int at = (x & 1) << 4 | (y & 3) << 2;
    const uint2 near = cube.halves[block][half][threadIdx.x];
    const uint2 far = cube.halves[block + 1][half][threadIdx.x];
    bits = ((near.x >> at & 15) | (far.x >> at & 15) << 4) >> z;
    rank = near.y + __popc(near.x & ((1U << (at + z)) - 1));
    next_rank = far.y + __popc(far.x & ((1U << at) - 1));
  }
};

// Lane i gets bit i of every lane's word.
__device__ uint32_t transpose_bits(uint32_t word) {
  const unsigned lane = threadIdx.x % 32;
  uint32_t keep = 0x0000ffff;  // bits whose number lacks the step
  for (unsigned step = 16; step > 0; step /= 2, keep ^= keep << step) {
    const uint32_t other = __shfl_xor_sync(all_lanes, word, step);
    word = (lane & step) != 0 ? (word & ~keep) | (other >> step & keep)
                              : (word & keep) | (other << step & ~keep);
  }
  return word;
}

__device__ void write_first(const Table& table, int64_t middle_tap, uint32_t row, uint32_t* count) {
  if (table.first == nullptr) return;
  const int32_t own = table.neighbours[middle_tap + row];
  table.first[row] = own >= 0 ? own : static_cast<int32_t>(row);
  if (own >= 0 && own != static_cast<int32_t>(row)) atomicAdd(count, 1U);
}

constexpr int some_cube = 0;
constexpr int any_kernel = -1;

// size: of all axes where it is known when compiling, at most 3. With it the taps of a plane are
// loaded before the first of them is stored, as a store waits for its value and holds back the
// loads behind it. The lanes of a warp stay together to count their pairs, each those of one tap.
template <int size>
__global__ void __launch_bounds__(fill_threads, size == any_kernel ? 1 : blocks_here(cube_blocks))
    fill_table(BlockSet set, Reach reach, Coords out, Table table, Counts counts) {
  extern __shared__ uint32_t counts_of_block[];  // [taps + 1]
  __shared__ Cube cube;
  __shared__ Frame frame;
  constexpr bool has_mask = size > 0;
  const int sizes[3] = {size > 0 ? size : reach.axes[0].taps, size > 0 ? size : reach.axes[1].taps,
                        size > 0 ? size : reach.axes[2].taps};
  const int taps = sizes[0] * sizes[1] * sizes[2];
  for (int i = threadIdx.x; i <= taps; i += fill_threads) counts_of_block[i] = 0;
  if (threadIdx.x == 0) frame = set.head->frame;  // other stores might change the original
  __syncthreads();
  const bool fine = is_fine(set);
  const int lane = threadIdx.x % 32;
  // Numbers of rows fit 31 bits, and registers are short.
  const auto rows = static_cast<uint32_t>(out.rows);
  for (uint32_t first = blockIdx.x * fill_threads + threadIdx.x - lane; first < rows;
       first += gridDim.x * fill_threads) {
    const uint32_t row = first + lane;
    const bool used = row < rows;
    Window window(set, frame, reach, used ? out.data[row] : padding_row());
    window.in_batch &= used && fine;
    int32_t* neighbours = table.neighbours + row;
    uint32_t mask = 0;
    const auto put = [&](int32_t in) {
      if (used) *neighbours = in;
      neighbours += rows;
    };
    const auto count = [&](int first_tap, uint32_t bits) {
      const uint32_t rows_with = transpose_bits(bits);
      if (rows_with != 0) atomicAdd(&counts_of_block[first_tap + lane], __popc(rows_with));
    };
    // That the row's inputs along z follow each other.
    uint32_t steady = has_mask ? steady_bit : 0;
    if constexpr (size == any_kernel) {
      mask = window.walk(reach.axes, put, count);
    } else {
      const int3 place = load_cube(window, sizes, cube);
      int tap = 0;
#pragma unroll
      for (int x = 0; x < sizes[0]; ++x) {
        int32_t found[has_mask ? size * size : 1];
        uint32_t plane = 0;
        const int first_tap = tap;
#pragma unroll
        for (int y = 0; y < sizes[1]; ++y) {
          const Line line(cube, place.x + x, place.y + y, place.z);
          plane |= (line.bits & ((1U << sizes[2]) - 1)) << (tap - first_tap);
          uint32_t rank = line.rank;
#pragma unroll
          for (int z = 0; z < sizes[2]; ++z, ++tap) {
            if (place.z + z == 4) rank = line.next_rank;
            // Complements of rows: 0 stands for none.
            const auto in = static_cast<int32_t>(~(line.bits >> z & 1 ? set.rows[rank++] : 0));
            if (has_mask) {
              found[y * size + z] = in;
            } else {
              put(in);
            }
          }
        }
        if constexpr (has_mask) {
          unroll<size * size>([&](int i) {
            put(found[i]);
            const bool adjacent = i % size != 0 && (found[i - 1] | found[i]) >= 0;
            if (adjacent && found[i] - found[i - 1] != 1) steady = 0;
          });
        } else {
          count(first_tap, plane);
        }
        mask |= plane << first_tap % 32;
      }
    }
    if (used) write_first(table, int64_t{taps / 2} * rows, row, &counts_of_block[taps]);
    if (used && table.masks != nullptr) table.masks[row] = mask | steady;
    if (has_mask) count(0, mask);
  }
  give_counts(set, out, counts_of_block, counts);
}

// All have the same parameters.
auto fill_kernel(const Geometry& geometry) {
  const auto& size = geometry.size;
  if (geometry.dilation != Int3{1, 1, 1} || *std::max_element(size.begin(), size.end()) > 5) {
    return fill_table<any_kernel>;
  }
  if (size == Int3{3, 3, 3}) return fill_table<3>;
  return size == Int3{2, 2, 2} ? fill_table<2> : fill_table<some_cube>;
}

// Of a map without masks and numbers of repeats, which it gets, on so many sides.
Counts counts_of(const Context& ctx, int sides, int64_t* host, KernelMap* map) {
  const int taps = map->taps();
  if (taps <= 32) map->masks = make_matrix(ctx, map->n_out, 1, Dtype::i32);
  Counts counts{map->pairs_per_tap.as<uint64_t>(), taps, sides};
  map->in_repeats = map->out_repeats = map->pairs_per_tap;
  map->in_repeats.data = counts.words + taps;
  map->out_repeats.data = counts.words + taps + sides - 1;
  map->in_repeats.cols = map->out_repeats.cols = 1;
  if (host != nullptr) {
    void* mapped = nullptr;
    check_cuda(cudaHostGetDevicePointer(&mapped, host, 0), "cudaHostGetDevicePointer");
    counts.host = static_cast<uint64_t*>(mapped);
  }
  return counts;
}

// From the first side to the last. in_first of a symmetric map is what the middle tap finds.
void fill(const Context& ctx, const Sides& sides, KernelMap* map) {
  const Coords& out = sides.sides[1].coords;
  Grid grid = over(ctx, std::max<int64_t>(out.rows, 1));
  // A block of threads has at most three rounds, so that the last blocks end together.
  grid.blocks = std::max(grid.blocks, ceil_div(out.rows, 3 * grid.threads));
  grid.shared_bytes = sizeof(uint32_t) * (map->taps() + 1);
  const Table table = {map->neighbours.as<int32_t>(), map->masks.as<uint32_t>(),
                       map->symmetric ? map->in_first.as<int32_t>() : nullptr};
  Counts counts = sides.counts;
  if (!map->symmetric) counts.host = nullptr;
  launch(ctx, grid, fill_kernel(map->geometry), sides.sides[0].set, Reach(map->geometry, {}), out,
         table, counts);
  if (!map->symmetric) write_first_rows(ctx, sides);
}

}  // namespace

void fill_submanifold_map(const Context& ctx,
                          const VoxelIndex::State* index,
                          const MatrixRef& coords,
                          KernelMap* map,
                          int64_t* answer) {
  const Counts counts = counts_of(ctx, 1, answer, map);
  map->out_first = map->in_first = make_matrix(ctx, coords.rows, 1, Dtype::i32);
  const Matrix aligned = aligned_input(ctx, coords);
  BlockSetMemory made;
  if (index == nullptr) made = make_block_set(ctx, coords.rows, coords.rows);
  const BlockSet& set = index == nullptr ? made : static_cast<const BlockIndex&>(*index).set();
  Sides sides({Coords(aligned), set, map->in_first.as<int32_t>()});
  sides.counts = counts;
  if (index == nullptr) {
    index_rows(ctx, sides);
  } else {
    fill_bytes(ctx, counts.words, 0, sizeof(uint64_t) * (counts.taps + 3));
  }
  fill(ctx, sides, map);
}

void fill_kernel_map(const Context& ctx,
                     const MatrixRef& in_coords,
                     const MatrixRef& out_coords,
                     KernelMap* map,
                     int64_t* answer) {
  const Counts counts = counts_of(ctx, 2, answer, map);
  map->in_first = make_matrix(ctx, in_coords.rows, 1, Dtype::i32);
  map->out_first = make_matrix(ctx, out_coords.rows, 1, Dtype::i32);
  const Matrix in = aligned_input(ctx, in_coords);
  const Matrix out = aligned_input(ctx, out_coords);
  const BlockSetMemory in_set = make_block_set(ctx, in.rows, in.rows);
  const BlockSetMemory out_set = make_block_set(ctx, out.rows, out.rows);
  // Rows that ascend, as those of output_coords do, cost little.
  Sides sides({Coords(in), in_set, map->in_first.as<int32_t>()},
              {Coords(out), out_set, map->out_first.as<int32_t>(), /*distinct_will_do=*/true});
  sides.counts = counts;
  index_rows(ctx, sides);
  fill(ctx, sides, map);
}

// Every pair is seen from its lowest output row, and copied to the rows that repeat its input.
void fill_transposed(const Context& ctx, const KernelMap& map, KernelMap* result) {
  const int taps = map.taps();
  const int64_t n_in = map.n_in;
  const int64_t n_out = map.n_out;
  const auto* neighbours = map.neighbours.as<int32_t>();
  const auto* in_first = map.in_first.as<int32_t>();  // null where no voxel of the side repeats
  const auto* out_first = map.out_first.as<int32_t>();
  auto* table = result->neighbours.as<int32_t>();
  auto* pairs = result->pairs_per_tap.as<unsigned long long>();
  fill_bytes(ctx, table, 0xff, sizeof(int32_t) * taps * n_in);
  copy(ctx, map.pairs_per_tap, result->pairs_per_tap);
  for_each(ctx, n_out, [=] __device__(int64_t out) {
    const bool repeats = out_first != nullptr && out_first[out] != out;
    // Loads on their way at once: a store holds back those behind it.
    constexpr int batch = 9;
    for (int tap = 0; tap < taps; tap += batch) {
      int32_t in[batch];
      unroll<batch>(
          [&](int i) { in[i] = tap + i < taps ? neighbours[(tap + i) * n_out + out] : -1; });
      unroll<batch>([&](int i) {
        if (in[i] < 0) return;
        if (repeats) {
          atomicAdd(&pairs[tap + i], ~0ULL);
        } else {
          table[(tap + i) * n_in + in[i]] = static_cast<int32_t>(out);
        }
      });
    }
  });
  for_each(ctx, in_first != nullptr ? n_in : 0, [=] __device__(int64_t row) {
    const int64_t lowest = in_first[row];
    for (int64_t tap = 0; lowest != row && tap < taps; ++tap) {
      const int32_t out = table[tap * n_in + lowest];
      table[tap * n_in + row] = out;
      if (out >= 0) atomicAdd(&pairs[tap], 1ULL);
    }
  });
}

void check_built(const KernelMap& map, int64_t first_pairs) {
  check_made(static_cast<Status>(std::max<int64_t>(-first_pairs, 0)), map.n_in);
}

}  // namespace voxgemm::cuda
