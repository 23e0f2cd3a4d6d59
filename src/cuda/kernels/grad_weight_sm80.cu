// SPDX-License-Identifier: Apache-2.0
// Compiled once for each arithmetic, VOXGEMM_MATH.
//
// Weight gradient by the warp's matrix instructions, from sm_75 on: dW[t] = sum over pairs of
// x[i]^T dy[o], f32 sums, over the tiles of a schedule by mask or of natural order (schedule.h).
//
// It is one product: dW [taps * c_in, c_out] is the transpose of x laid out as [rows, taps * c_in],
// zero where a row lacks a tap, times dy. A CTA owns 128 (or 64) of those taps * c_in and a block
// of columns, so a row of dy that it reads serves all taps it has: one of 128 channels, four of 32.
// It walks the rows in granules of 64, in the order of the schedule, and passes over granules that
// have none of its taps; a granule is a stage. CTAs of the same slice and other taps are
// neighbours, and read the same rows at about the same time.
//
// A stage: x [64, rows of the tile] and dy [64, cols], both in panels with a line for each row
// (tile_sm80.cuh); the instructions want both transposed, which ldmatrix does for 16 bits. A thread
// copies one piece of four lines of every panel. The warps look at 32 granules at a time; the input
// rows of one are loaded when that before has been copied. Stages are as in implicit_gemm_sm80.cu.
//
// Slices: a CTA takes every slices-th granule (they stand by falling number of taps, so all slices
// get alike) and leaves f32 sums, which add_slices() adds in order. Slices depend on the problem
// alone, so the bits do too. Sums that come out NaN are computed once more (pass.cuh).

#include "cuda/kernels/tile_sm80.cuh"

namespace voxgemm::cuda::sm80 {

// w is where a CTA writes: dW, or f32 sums of the slices, one behind the other.
struct GradParams : TileParams {
  uint32_t dy_row_bytes = 0;
  int tile_rows = 64;
  int64_t group_tiles = 0;
  GradCut cut = {};
};

template <Math math, int rows, int cols>
struct GradConfig : Shape<math, rows, cols, false, false> {
  using S = typename GradConfig::Shape;
  static constexpr int shared_bytes = S::ring_bytes + 4 * stages * S::a_words;
  static_assert(shared_bytes <= most_shared_bytes);
  static constexpr int ctas_of_sm = rows * cols > 128 * 64 || S::size == 4 ? 2 : 3;
};

// The part of dW that a CTA computes: some taps of a group, a block of columns, a slice of rows.
template <class C>
struct GradTile {
  const GradParams& p;
  int column = static_cast<int>(blockIdx.x) % p.column_blocks * C::cols;
  int row_block = static_cast<int>(blockIdx.x) / p.column_blocks;
  int first_piece = row_block % p.cut.row_blocks * (C::rows / C::per_piece);
  int group = row_block / p.cut.row_blocks % p.cut.groups;
  int slice = row_block / p.cut.row_blocks / p.cut.groups;
  int first_tap = taps_before(group);
  int taps = taps_before(group + 1) - first_tap;  // of the group

  __device__ int taps_before(int number) const {
    return static_cast<int>(int64_t{number} * p.taps / p.cut.groups);
  }
};

// 64 rows of the schedule.
struct Granule {
  int first = 0;  // position of its first row; those and blocks have 31 bits
  int rows = 0;
  int first_block = 0;  // of its tile
  int in_tile = 0;      // its first row in the index blocks
  uint32_t mask = 0;    // of its tile
};

// The granules of a slice that have a tap of the CTA. All threads of a CTA walk alike.
template <class C>
struct Walk {
  const GradParams& p;
  const GradTile<C>& tile;
  uint32_t wanted;  // taps of the group, bit 0 = its first; all where natural order has no masks
  int count = static_cast<int>(p.tiles != nullptr ? p.group_tiles * (p.tile_rows / 64)
                                                  : (p.rows + 63) / 64);
  int at = tile.slice + (lane_id() - 32) * p.slices;  // this lane's granule, of fewer than 2^25
  uint32_t todo = 0;
  Granule mine = {};

  __device__ bool next(Granule* granule) {
    while (todo == 0) {
      // The first lane's granule is the least.
      at += 32 * p.slices;
      if (__shfl_sync(0xffffffff, at, 0) >= count) return false;
      uint32_t mask = 0;  // of the granule itself
      if (at < count && p.tiles == nullptr) {
        mine.first = at * 64;
        mine.rows = static_cast<int>(min(p.rows - mine.first, int64_t{64}));
        mask = ~0u;
      } else if (at < count) {
        const int in_tile = p.tile_rows / 64;
        const int64_t number = tile.group * p.group_tiles + at / in_tile;
        const int4 entry = __ldg(p.tiles + number);
        mine.in_tile = at % in_tile * 64;
        mine.first = entry.x + mine.in_tile;
        mine.rows = entry.z - mine.in_tile;
        mine.first_block = entry.y;
        mine.mask = 0;
        for (int i = 0; i < in_tile; ++i) mine.mask |= __ldg(p.masks + number * in_tile + i);
        mask = __ldg(p.masks + number * in_tile + mine.in_tile / 64);
      }
      todo = __ballot_sync(0xffffffff, (mask & wanted) != 0);
    }
    const int lane = __ffs(todo) - 1;
    todo &= todo - 1;
    const auto of = [&](auto value) { return __shfl_sync(0xffffffff, value, lane); };
    *granule = {of(mine.first), of(mine.rows), of(mine.first_block), of(mine.in_tile),
                of(mine.mask)};
    return true;
  }
};

// Fills stages, one granule after the other.
template <class C>
struct GradProducer {
  const GradParams& p;
  const GradTile<C>& tile;
  uint32_t* present;
  Walk<C> walk = {p, tile, wanted_taps()};
  Place x[C::a_words] = {};
  int filled = 0;
  bool has_more = false;
  Four x_rows[C::a_words] = {};
  Four dy_rows = {};

  __device__ void start() {
    unroll<C::a_words>([&](int c) {
      x[c] = place_of(tile.first_piece + c * 8 + static_cast<int>(threadIdx.x) % 8, p.pieces);
    });
    step();
  }

  // Whether there is a stage of this number; asked for what was filled or is next.
  __device__ bool has(int stage) const { return stage < filled || has_more; }

  __device__ void fill(int ring, uint32_t address) {
    const auto* from = static_cast<const char*>(p.x.data);
    unroll<C::a_words>([&](int c) {
      gather_present<C>(address + c * C::panel_bytes, from + x[c].piece * 16, p.x_row_bytes,
                        x_rows[c], present + ring * C::a_words + c);
    });
    const auto* dy = static_cast<const char*>(p.y.data);
    unroll<C::b_panels>([&](int c) {
      const int column = tile.column + (c * 8 + static_cast<int>(threadIdx.x) % 8) * C::per_piece;
      gather<C>(address + C::a_bytes + c * C::panel_bytes, dy + int64_t{C::size} * column,
                p.dy_row_bytes, column < p.c_out ? dy_rows : Four());
    });
    ++filled;
    step();
  }

  __device__ uint32_t wanted_taps() const {
    if (p.tiles == nullptr) return ~0u;
    const int first = tile.first_piece / p.pieces;
    const int last = min(tile.taps - 1, (tile.first_piece + C::rows / C::per_piece - 1) / p.pieces);
    return first > last ? 0 : (~0u << first) & (~0u >> (31 - last));
  }

  // Goes to the next granule and loads its rows.
  __device__ void step() {
    Granule granule;
    has_more = walk.next(&granule);
    if (!has_more) return;
    const int line = static_cast<int>(threadIdx.x) / 8 * 4;
    if (p.tiles == nullptr) {
      unroll<4>(
          [&](int i) { dy_rows.row[i] = line + i < granule.rows ? granule.first + line + i : -1; });
    } else {
      dy_rows = four_of_list(p.order, granule.first + line, granule.first + granule.rows);
    }
    unroll<C::a_words>([&](int c) {
      const int slot = x[c].slot;
      x_rows[c] = Four();
      if (slot >= tile.taps) return;
      if (p.tiles == nullptr) {
        x_rows[c] = four_of_list(p.neighbours + (tile.first_tap + slot) * p.rows,
                                 granule.first + line, p.rows);
      } else if ((granule.mask >> slot & 1) != 0) {
        const int64_t block = granule.first_block + __popc(granule.mask & ((1u << slot) - 1));
        x_rows[c] = four_of_block(p.indices + block * p.tile_rows + granule.in_tile + line);
      }
    });
  }
};

// Writes the warp's part of the tile: finished weights, or sums. Lanes go along the input channels.
template <class C>
__device__ inline void write_gradient(const GradParams& p,
                                      const GradTile<C>& tile,
                                      const float* laid_out) {
  constexpr int rows = C::rows / 2;
  constexpr int cols = C::cols / 2;
  const int column = tile.column + warp_col() * cols;
  for (int r = lane_id(); r < rows; r += 32) {
    const int line = warp_row() * rows + r;
    const Place of = place_of(tile.first_piece + line / C::per_piece, p.pieces);
    const int in = of.piece * C::per_piece + line % C::per_piece;
    if (of.slot >= tile.taps || in >= p.c_in) continue;
    for (int c = 0; c < cols && column + c < p.c_out; ++c) {
      const WeightPlace at = {tile.first_tap + of.slot, in, column + c};
      const float sum = laid_out[r * C::sums_stride + c];
      if (p.slices == 1) {
        p.finish_gradient<typename C::T>(at, sum);
      } else {
        static_cast<float*>(p.w.data)[tile.slice * p.w_size() + p.place_of(at)] = sum;
      }
    }
  }
}

template <class C>
__global__ void __launch_bounds__(threads, C::ctas_of_sm)
    grad_weight(const __grid_constant__ GradParams p) {
  if constexpr (runs_here<C::math>()) {
    const GradTile<C> tile = {p};
    if (tile.first_piece >= tile.taps * p.pieces) return;
    GradProducer<C> producer{p, tile, words_of_block<C>()};
    producer.start();
    write_gradient<C>(p, tile, multiply_stages<C>(&producer));
  }
}

template <class C>
void run_grad_weight(const Context& ctx, const Variant& variant, const ConvArgs& args) {
  GradParams p = {TileParams(variant, args)};
  p.dy_row_bytes = static_cast<uint32_t>(args.y.stride * size_of(args.y.dtype));
  p.cut = cut_gradient(variant, p);
  p.slices = p.cut.slices;
  p.tile_rows = args.schedule->options().tile_rows;
  // Every group has every row.
  p.group_tiles = ceil_div(p.rows, p.tile_rows);
  std::shared_ptr<void> sums;
  if (p.slices > 1) {
    sums = ctx.allocate(sizeof(float) * p.slices * p.w_size());
    p.w.data = sums.get();
    p.w.tap_stride = p.c_in;
    p.w.in_stride = 1;
    p.w.out_stride = int64_t{p.taps} * p.c_in;
  }
  launch(ctx, {.blocks = p.cut.ctas(), .threads = threads, .shared_bytes = C::shared_bytes},
         grad_weight<C>, p);
  if (p.slices == 1) return;
  launch(ctx, {.blocks = ceil_div(p.w_size(), 256)}, add_slices<typename C::T>, PassArgs(args),
         static_cast<const float*>(p.w.data), p.slices);
}

template <Math math>
void grad_weight(const Context& ctx, const Variant& variant, const ConvArgs& args) {
  if constexpr (is_16bit(math)) {
    if (variant.cols == 128) return run_grad_weight<GradConfig<math, 128, 128>>(ctx, variant, args);
    return run_grad_weight<GradConfig<math, 128, 64>>(ctx, variant, args);
  } else {
    run_grad_weight<GradConfig<math, 64, 64>>(ctx, variant, args);
  }
}

template void grad_weight<Math::VOXGEMM_MATH>(const Context&, const Variant&, const ConvArgs&);

}  // namespace voxgemm::cuda::sm80
