// SPDX-License-Identifier: Apache-2.0
// Compiled once for each arithmetic, VOXGEMM_MATH.
//
// Convolution by the warp's matrix instructions, from sm_75 on: y[o] = bias + sum over taps of
// x[in(o, t)] W[t], f32 sums, over tiles of a schedule by mask or of natural order (schedule.h).
//
// A CTA computes one tile of rows and a block of columns, column blocks of a tile by neighbouring
// CTAs. The reduction is one sequence of 16-byte pieces, the channels of the tile's first tap, then
// of its next one, cut in stages of eight pieces (64 channels of 16 bits, 32 of f32): 8 channels or
// 96 waste nothing, and a stage can have several taps. A thread copies the same piece of every
// stage, of four rows in each 64, and loads the input rows of a tap while it is at the one before.
//
// A stage: x [rows, 8 pieces], one panel, and W [8 pieces, cols], one deep panel where input
// channels are contiguous, else panels of 128 bytes of columns with a line for each channel
// (tile_sm80.cuh). Then presence words of each stage and the taps of the tile. Three stages: two
// are on their way while one is multiplied. One barrier a stage: it says that the stage has landed
// for all, and that all have left the stage before, which is filled next.
//
// Slices: CTA (tile, columns, slice) takes one part of the stages and leaves f32 sums, which
// finish() adds in order. Groups (more than 32 taps by mask, or each tap) have every row, and a
// launch each, which adds to the sums that the one before left. No bit depends on timing.
//
// Sums leave by way of shared memory, 16 bytes a lane in whole rows; of NaN see pass.cuh.

#include "cuda/kernels/tile_sm80.cuh"

namespace voxgemm::cuda::sm80 {

struct ConvParams : TileParams {
  int groups = 1;
  int group = 0;          // of the launch
  float* sums = nullptr;  // [slices, rows, sums_stride], or null where none are kept
  int64_t sums_stride = 0;
};

template <Math math, int rows, int cols, bool in_contiguous>
struct ConvConfig : Shape<math, rows, cols, true, in_contiguous> {
  using S = typename ConvConfig::Shape;
  // Stages; presence words; taps of a tile.
  static constexpr int shared_bytes = S::ring_bytes + 4 * stages * S::a_words + 4 * 32;
  static_assert(shared_bytes <= (rows > 64 ? most_shared_bytes : 64 << 10));
  // 128 x 128: 128 sums a thread. bf16x3 of 64 x 64 is a fifth slower with three.
  static constexpr int ctas_of_sm = rows * cols > 128 * 64               ? 2
                                    : rows == 64 && math == Math::bf16x3 ? 4
                                                                         : 3;
};

struct ConvTile {
  int64_t first = 0;  // position of its first row
  int64_t first_block = 0;
  int rows = 0;
  uint32_t mask = 0;
  int taps = 0;
};

template <class C>
__device__ inline ConvTile load_tile(const ConvParams& p, int64_t number) {
  ConvTile tile;
  if (p.tiles == nullptr) {
    tile.first = number * C::rows;
    tile.rows = static_cast<int>(min(p.rows - tile.first, int64_t{C::rows}));
    tile.taps = p.taps;
    return tile;
  }
  const int4 entry = __ldg(p.tiles + number);
  tile.first = entry.x;
  tile.first_block = entry.y;
  tile.rows = entry.z;
  unroll<C::rows / 64>([&](int i) { tile.mask |= __ldg(p.masks + number * (C::rows / 64) + i); });
  tile.taps = __popc(tile.mask);
  return tile;
}

// Fills stages, one after the other.
template <class C>
struct Producer {
  const ConvParams& p;
  const ConvTile& tile;
  uint32_t* present;                               // words of each stage
  uint32_t* taps = present + stages * C::a_words;  // of the tile, after a barrier
  int64_t all = (tile.taps * p.pieces + 7) / 8;    // stages, of which `count` from `begin` on
  int begin = static_cast<int>(all * blockIdx.y / p.slices);
  int count = static_cast<int>(all * (blockIdx.y + 1) / p.slices) - begin;
  Place x = place_of(begin * 8 + static_cast<int>(threadIdx.x) % 8, p.pieces);
  Place w = C::b_deep ? x : place_of(begin * 8 + static_cast<int>(threadIdx.x) / 16, p.pieces);
  Four rows[C::rows / 64] = {};
  Four upcoming[C::rows / 64] = {};

  __device__ void start() {
    if (threadIdx.x < 32 && p.tiles != nullptr && (tile.mask >> threadIdx.x & 1) != 0) {
      const int first_tap = p.group * p.taps / p.groups;
      const int slot = __popc(tile.mask & ((1u << threadIdx.x) - 1));
      taps[slot] = p.weight_tap(first_tap + static_cast<int>(threadIdx.x));
    }
    load_rows(x.slot, rows);
    load_upcoming();
  }

  // Whether there is a stage of this number; asked for what was filled or is next.
  __device__ bool has(int stage) const { return stage < count; }

  // ring: which of the stages; address: of it.
  __device__ void fill(int ring, uint32_t address) {
    const auto* from = static_cast<const char*>(p.x.data) + x.piece * 16;
    unroll<C::rows / 64>([&](int i) {
      gather_present<C>(address + i * 8192, from, p.x_row_bytes, rows[i],
                        present + ring * C::a_words + i);
    });
    copy_weights(address + C::a_bytes);
    if (advance(&x)) {
      unroll<C::rows / 64>([&](int i) { rows[i] = upcoming[i]; });
      load_upcoming();
    }
    if (C::b_deep) {
      w = x;
    } else {
      advance(&w);
    }
  }

  using T = typename C::T;

  // Eight pieces on; whether that is another tap.
  __device__ bool advance(Place* place) const {
    const int slot = place->slot;
    place->slot += 8 / p.pieces;
    place->piece += 8 % p.pieces;
    if (place->piece >= p.pieces) {
      place->piece -= p.pieces;
      ++place->slot;
    }
    return place->slot != slot;
  }

  // The rows of the tap that this thread comes to after the one it is at.
  __device__ void load_upcoming() {
    load_rows(x.slot + (p.pieces < 8 ? (x.piece + 8) / p.pieces : 1), upcoming);
  }

  __device__ void load_rows(int slot, Four (&to)[C::rows / 64]) const {
    const int line = static_cast<int>(threadIdx.x) / 8 * 4;
    unroll<C::rows / 64>([&](int i) {
      to[i] = Four();
      if (slot >= tile.taps) return;
      if (p.tiles != nullptr) {
        to[i] = four_of_block(p.indices + (tile.first_block + slot) * C::rows + i * 64 + line);
      } else {
        to[i] = four_of_list(p.neighbours + slot * p.rows, tile.first + i * 64 + line, p.rows);
      }
    });
  }

  __device__ void copy_weights(uint32_t to) const {
    const bool inside = w.slot < tile.taps;
    const int tap = !inside              ? 0
                    : p.tiles != nullptr ? static_cast<int>(taps[w.slot])
                                         : p.weight_tap(w.slot);
    const int column = static_cast<int>(blockIdx.x) % p.column_blocks * C::cols;
    const T* from = static_cast<const T*>(p.w.data) + tap * p.w.tap_stride;
    if constexpr (C::b_deep) {
      const int piece = threadIdx.x % 8;
      const int line = threadIdx.x / 8;
      from += w.piece * C::per_piece + (column + line) * p.w.out_stride;
      to += line * 128 + ((piece ^ (line & 7)) << 4);
      unroll<C::cols / 16>([&](int i) {
        ptx::copy_16(to + i * 2048, from + i * 16 * p.w.out_stride,
                     inside && column + line + i * 16 < p.c_out);
      });
    } else {
      // Sixteen lanes copy a line, or two lines.
      constexpr int pieces = C::cols / C::per_piece;  // of a line
      constexpr int lines = 16 / pieces;              // at once
      const int piece = threadIdx.x % pieces;
      const int first = threadIdx.x % 16 / pieces;
      const int channel = w.piece * C::per_piece + first;
      const int line = threadIdx.x / 16 * C::per_piece + first;
      const int n = column + piece * C::per_piece;
      from += channel * p.w.in_stride + n;
      to += piece / 8 * C::panel_bytes + line * 128;
      unroll<C::per_piece / lines>([&](int i) {
        const int at = line + i * lines;
        const int flip = C::size == 2 ? at & 7 : (at & 3) << 1;
        ptx::copy_16(to + i * lines * 128 + (((piece % 8) ^ flip) << 4),
                     from + i * lines * p.w.in_stride,
                     inside && channel + i * lines < p.c_in && n < p.c_out);
      });
    }
  }
};

// Writes the warp's part of the tile: finished rows, or sums.
template <class C>
__device__ inline void write_tile(const ConvParams& p,
                                  const ConvTile& tile,
                                  const float* laid_out) {
  constexpr int count = C::per_piece;
  constexpr int lanes = C::cols / 2 / count;  // of a row
  const int at = lane_id() % lanes * count;
  const int n =
      static_cast<int>(blockIdx.x) % p.column_blocks * C::cols + warp_col() * (C::cols / 2) + at;
  if (n >= p.c_out) return;
  float bias[count];
  load_bias<typename C::T>(p, n, bias);
  for (int r = lane_id() / lanes; r < C::rows / 2; r += 32 / lanes) {
    const int position = warp_row() * (C::rows / 2) + r;
    if (position >= tile.rows) break;
    const int64_t row = p.row_at(tile.first + position);
    alignas(16) float v[count] = {};
    add_sums<false>(laid_out + r * C::sums_stride + at, v);
    if (p.sums != nullptr) {
      float* sums = p.sums + (blockIdx.y * p.rows + row) * p.sums_stride + n;
      if (p.group > 0) add_sums<false>(sums, v);
      if (p.slices > 1 || p.group < p.groups - 1) {
        unroll<count / 4>([&](int i) {
          reinterpret_cast<float4*>(sums)[i] = reinterpret_cast<const float4*>(v)[i];
        });
        continue;
      }
    }
    finish_piece<typename C::T>(p, row, n, v, bias);
  }
}

template <class C>
__global__ void __launch_bounds__(threads, C::ctas_of_sm)
    convolve(const __grid_constant__ ConvParams p) {
  if constexpr (runs_here<C::math>()) {
    // Every group has every row, and so many CTAs.
    const ConvTile tile =
        load_tile<C>(p, (int64_t{p.group} * gridDim.x + blockIdx.x) / p.column_blocks);
    // Sums that it would only read and write.
    if (tile.taps == 0 && p.group > 0 && p.group < p.groups - 1) return;
    Producer<C> producer{p, tile, words_of_block<C>()};
    producer.start();
    __syncthreads();
    write_tile<C>(p, tile, multiply_stages<C>(&producer));
  }
}

template <class C>
void run_conv(const Context& ctx, const Variant& variant, const ConvArgs& args) {
  ConvParams p = {TileParams(variant, args)};
  p.slices = variant.slices;
  // Whole pieces of y.
  p.sums_stride = ceil_div(p.c_out, 8) * 8;
  p.groups = variant.groups(p.taps);
  const bool kept = p.groups > 1 || p.slices > 1;
  const auto memory = make_room(ctx, Room{&p.sums, kept ? p.slices * p.rows * p.sums_stride : 0});
  for (; p.group < p.groups; ++p.group) {
    launch(ctx,
           {.blocks = ceil_div(p.rows, C::rows) * p.column_blocks,
            .columns = p.slices,
            .threads = threads,
            .shared_bytes = C::shared_bytes},
           convolve<C>, p);
  }
  if (p.slices == 1) return;
  const int64_t pieces = p.rows * ceil_div(p.c_out, C::per_piece);
  launch(ctx, {.blocks = ceil_div(pieces, 256)}, finish<typename C::T>, p, p.sums, p.sums_stride,
         p.slices);
}

template <Math math>
void convolve(const Context& ctx, const Variant& variant, const ConvArgs& args) {
  const auto run = [&]<int rows, int cols>() {
    if (args.w.in_stride == 1) {
      return run_conv<ConvConfig<math, rows, cols, true>>(ctx, variant, args);
    }
    run_conv<ConvConfig<math, rows, cols, false>>(ctx, variant, args);
  };
  if constexpr (is_16bit(math)) {
    if (variant.cols == 128) return run.template operator()<128, 128>();
  }
  if (variant.cols == 32) return run.template operator()<128, 32>();
  variant.rows == 128 ? run.template operator()<128, 64>() : run.template operator()<64, 64>();
}

template void convolve<Math::VOXGEMM_MATH>(const Context&, const Variant&, const ConvArgs&);

template <Math math>
void load_convolve() {
  load(finish<Element<math>>);
}

template void load_convolve<Math::VOXGEMM_MATH>();

}  // namespace voxgemm::cuda::sm80
