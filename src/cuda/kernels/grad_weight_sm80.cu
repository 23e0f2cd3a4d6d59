// SPDX-License-Identifier: Apache-2.0
// Compiled once for each arithmetic, VOXGEMM_MATH.
//
// Weight gradient by the warp's matrix instructions, on everything from sm_75 on: dW[t] = sum over
// pairs of x[i]^T dy[o], f32 sums, over the tiles of a schedule by mask or of natural order
// (schedule.h).
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
// rows of a granule are loaded when the one before has been copied. Three stages and one barrier a
// stage, as in implicit_gemm_sm80.cu.
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

// The part of dW that a CTA computes.
struct GradTile {
  int group = 0;
  int first_tap = 0;  // of the group
  int taps = 0;       // of the group
  int first_piece = 0;
  int column = 0;
  int slice = 0;
};

template <class C>
__device__ __forceinline__ GradTile grad_tile(const GradParams& p) {
  GradTile tile;
  int number = blockIdx.x;
  tile.column = number % p.column_blocks * C::cols;
  number /= p.column_blocks;
  tile.first_piece = number % p.cut.row_blocks * (C::rows / C::per_piece);
  number /= p.cut.row_blocks;
  tile.group = number % p.cut.groups;
  tile.slice = number / p.cut.groups;
  const auto taps_before = [&](int group) {
    return static_cast<int>(int64_t{group} * p.taps / p.cut.groups);
  };
  tile.first_tap = taps_before(tile.group);
  tile.taps = taps_before(tile.group + 1) - tile.first_tap;
  return tile;
}

// 64 rows of the schedule.
struct Granule {
  int first = 0;  // position of its first row; those and blocks have 31 bits
  int rows = 0;
  int first_block = 0;  // of its tile
  int in_tile = 0;      // its first row in the index blocks
  uint32_t mask = 0;    // of its tile
};

// The granules of a slice that have a tap of the CTA. All threads of a CTA walk alike.
class Walk {
 public:
  __device__ __forceinline__ Walk(const GradParams& p, const GradTile& tile, uint32_t wanted)
      : p_(p), group_(tile.group), wanted_(wanted), at_(tile.slice + lane_id() * p.slices) {
    count_ = static_cast<int>(p.tiles != nullptr ? p.group_tiles * (p.tile_rows / 64)
                                                 : (p.rows + 63) / 64);
    load();
  }

  __device__ __forceinline__ bool next(Granule* granule) {
    while (todo_ == 0) {
      // The first lane's granule is the least.
      at_ += 32 * p_.slices;
      if (__shfl_sync(0xffffffff, at_, 0) >= count_) return false;
      load();
    }
    const int lane = __ffs(todo_) - 1;
    todo_ &= todo_ - 1;
    granule->first = __shfl_sync(0xffffffff, mine_.first, lane);
    granule->rows = __shfl_sync(0xffffffff, mine_.rows, lane);
    granule->first_block = __shfl_sync(0xffffffff, mine_.first_block, lane);
    granule->in_tile = __shfl_sync(0xffffffff, mine_.in_tile, lane);
    granule->mask = __shfl_sync(0xffffffff, mine_.mask, lane);
    return true;
  }

 private:
  __device__ __forceinline__ void load() {
    uint32_t mask = 0;  // of the granule itself
    if (at_ < count_ && p_.tiles == nullptr) {
      mine_.first = at_ * 64;
      mine_.rows = static_cast<int>(min(p_.rows - mine_.first, int64_t{64}));
      mask = ~0u;
    } else if (at_ < count_) {
      const int in_tile = p_.tile_rows / 64;
      const int64_t tile = group_ * p_.group_tiles + at_ / in_tile;
      const int4 entry = __ldg(p_.tiles + tile);
      mine_.in_tile = at_ % in_tile * 64;
      mine_.first = entry.x + mine_.in_tile;
      mine_.rows = entry.z - mine_.in_tile;
      mine_.first_block = entry.y;
      mine_.mask = 0;
      for (int i = 0; i < in_tile; ++i) mine_.mask |= __ldg(p_.masks + tile * in_tile + i);
      mask = __ldg(p_.masks + tile * in_tile + mine_.in_tile / 64);
    }
    todo_ = __ballot_sync(0xffffffff, (mask & wanted_) != 0);
  }

  const GradParams& p_;
  int group_;
  uint32_t wanted_;  // taps of the group, bit 0 = its first; all where natural order has no masks
  int at_;           // this lane's granule, of fewer than 2^25
  int count_;
  uint32_t todo_ = 0;
  Granule mine_;
};

// Fills stages, one granule after the other.
template <class C>
class GradProducer {
 public:
  __device__ __forceinline__ GradProducer(const GradParams& p,
                                          const GradTile& tile,
                                          uint32_t* present)
      : p_(p), tile_(tile), present_(present), walk_(p, tile, wanted_taps()) {
#pragma unroll
    for (int c = 0; c < C::a_words; ++c) {
      x_[c] = place_of(tile.first_piece + c * 8 + static_cast<int>(threadIdx.x) % 8, p.pieces);
    }
    step();
  }

  // Whether there is a stage of this number; asked for what was filled or is next.
  __device__ __forceinline__ bool has(int stage) const { return stage < filled_ || has_more_; }

  __device__ __forceinline__ void fill(int ring, uint32_t address) {
    const auto* x = static_cast<const char*>(p_.x.data);
#pragma unroll
    for (int c = 0; c < C::a_words; ++c) {
      gather_present<C>(address + c * C::panel_bytes, x + x_[c].piece * 16, p_.x_row_bytes,
                        x_rows_[c], present_ + ring * C::a_words + c);
    }
    const auto* dy = static_cast<const char*>(p_.y.data);
#pragma unroll
    for (int c = 0; c < C::b_panels; ++c) {
      const int column = tile_.column + (c * 8 + static_cast<int>(threadIdx.x) % 8) * C::per_piece;
      gather<C>(address + C::a_bytes + c * C::panel_bytes, dy + int64_t{C::size} * column,
                p_.dy_row_bytes, column < p_.c_out ? dy_rows_ : Four());
    }
    ++filled_;
    step();
  }

 private:
  __device__ __forceinline__ uint32_t wanted_taps() const {
    if (p_.tiles == nullptr) return ~0u;
    const int first = tile_.first_piece / p_.pieces;
    const int last =
        min(tile_.taps - 1, (tile_.first_piece + C::rows / C::per_piece - 1) / p_.pieces);
    return first > last ? 0 : (~0u << first) & (~0u >> (31 - last));
  }

  // Goes to the next granule and loads its rows.
  __device__ __forceinline__ void step() {
    Granule granule;
    has_more_ = walk_.next(&granule);
    if (!has_more_) return;
    const int line = static_cast<int>(threadIdx.x) / 8 * 4;
    if (p_.tiles == nullptr) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        dy_rows_.row[i] = line + i < granule.rows ? granule.first + line + i : -1;
      }
    } else {
      dy_rows_ = four_of_list(p_.order, granule.first + line, granule.first + granule.rows);
    }
#pragma unroll
    for (int c = 0; c < C::a_words; ++c) {
      const int slot = x_[c].slot;
      x_rows_[c] = Four();
      if (slot >= tile_.taps) continue;
      if (p_.tiles == nullptr) {
        x_rows_[c] = four_of_list(p_.neighbours + (tile_.first_tap + slot) * p_.rows,
                                  granule.first + line, p_.rows);
      } else if ((granule.mask >> slot & 1) != 0) {
        const int64_t block = granule.first_block + __popc(granule.mask & ((1u << slot) - 1));
        x_rows_[c] = four_of_block(p_.indices + block * p_.tile_rows + granule.in_tile + line);
      }
    }
  }

  const GradParams& p_;
  const GradTile& tile_;
  uint32_t* present_;
  Walk walk_;
  Place x_[C::a_words];
  int filled_ = 0;
  bool has_more_ = false;
  Four x_rows_[C::a_words];
  Four dy_rows_;
};

// Writes the warp's part of the tile: finished weights, or sums. Lanes go along the contiguous
// channels.
template <class C>
__device__ __forceinline__ void write_gradient(const GradParams& p,
                                               const GradTile& tile,
                                               const float* laid_out) {
  constexpr int rows = C::rows / 2;
  constexpr int cols = C::cols / 2;
  const int column = tile.column + warp_col() * cols;
  const bool along_in = p.w.in_stride == 1;
  for (int r = along_in ? lane_id() : 0; r < rows; r += along_in ? 32 : 1) {
    const int line = warp_row() * rows + r;
    const Place of = place_of(tile.first_piece + line / C::per_piece, p.pieces);
    const int in = of.piece * C::per_piece + line % C::per_piece;
    if (of.slot >= tile.taps || in >= p.c_in) continue;
    for (int c = along_in ? 0 : lane_id(); c < cols && column + c < p.c_out;
         c += along_in ? 1 : 32) {
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
    const GradTile tile = grad_tile<C>(p);
    if (tile.first_piece >= tile.taps * p.pieces) return;
    GradProducer<C> producer(p, tile, words_of_block<C>());
    write_gradient<C>(p, tile, multiply_stages<C>(&producer));
  }
}

template <class C>
void run_grad_weight(const Context& ctx, const Variant& variant, const ConvArgs& args) {
  GradParams p = {TileParams(variant, args)};
  p.dy_row_bytes = static_cast<uint32_t>(args.y.stride * size_of(args.y.dtype));
  p.cut = cut_gradient(variant, {p.taps, p.c_in, p.c_out, p.rows});
  p.slices = p.cut.slices;
  p.tile_rows = args.schedule->options().tile_rows;
  // Every group has every row.
  p.group_tiles = ceil_div(p.rows, p.tile_rows);
  const bool along_in = p.w.in_stride == 1;
  std::shared_ptr<void> sums;
  if (p.slices > 1) {
    sums = ctx.allocate(sizeof(float) * p.slices * p.w_size());
    p.w.data = sums.get();
    p.w.tap_stride = along_in ? p.c_in : int64_t{p.c_in} * p.c_out;
    p.w.in_stride = along_in ? 1 : p.c_out;
    p.w.out_stride = along_in ? int64_t{p.taps} * p.c_in : 1;
  }
  launch(ctx, {.blocks = p.cut.ctas(), .threads = threads, .shared_bytes = C::shared_bytes},
         grad_weight<C>, p);
  if (p.slices == 1) return;
  launch(ctx, {.blocks = ceil_div(p.w_size(), 256)}, add_slices<typename C::T>, PassArgs(args),
         static_cast<const float*>(p.w.data), p.slices, along_in);
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
