// SPDX-License-Identifier: Apache-2.0
//
// Depthwise convolution of 16-bit floats by matrix instructions, from sm_80 on:
// y[r, c] = bias[c] + sum over taps t of x[in(r, t), c] w[t, c]. Ordinary instructions would widen
// both operands first, four instructions a product. A matrix instruction takes what was loaded as
// it was loaded; fifteen of sixteen of its products are with zeros, and it still costs less.
//
// A warp owns 32 rows and `chunks` times 32 columns, and walks the taps that any of its rows has.
// Lane l, with g = l / 4 and u = l % 4, loads 16 bytes of row g of every 8: columns 8u to 8u + 7 of
// a chunk. Words 2i and 2i + 1 of these are its part of B [16 columns, 8 rows]; A [16 columns, 16
// columns] is diagonal and has the tap's weights. Rows of a tap are on their way while those of the
// tap before are added. Times and other forms are in docs/performance.md.
//
// Of A a lane has elements (g, 2u + {0, 1}) and (g + 8, 2u + 8 + {0, 1}): lanes with u = g / 2 have
// a weight in each, others zero. Shared memory has these words of every tap, and zeros that the
// others read, in other banks. Row numbers come to shared memory a warp for itself, [taps][rows].
// A lane ends with every second of 8 columns of two rows, and swaps with lane l ^ 4.
//
// A zero for an absent row times an infinite weight, or a zero off the diagonal times an infinite
// element, is NaN: sums that come out NaN are computed again, over present rows and one by one.
#pragma once

#include "cuda/gather.cuh"
#include "cuda/ptx/mma.cuh"

namespace voxgemm::cuda::depthwise_sm80 {

constexpr int group_rows = 32;
constexpr int chunk_cols = 32;
// Which of their taps the rows have is one word.
constexpr int taps_at_once = 32;
constexpr int convolve_warps = 4;
// Rows that a block's warps have in hand, and tiles that a block does: its weights come to shared
// memory once for all of them.
constexpr int tile_rows = convolve_warps * group_rows;
constexpr int block_tiles = 2;
constexpr int blocks_at_once = 3;  // on a multiprocessor

struct Convolution {
  Gather g;
  const void* x;
  const void* w;     // [taps, cols]
  uint32_t w_bytes;  // between taps
  int last_tap;      // what is mirrored about, or -1: taps as they are
  const void* bias;  // [cols] or null
  void* y;
  uint32_t y_bytes;
  uint8_t* left = nullptr;  // of a tile, 0: it is there already; null: none is

  __device__ int weight_row(int tap) const { return last_tap < 0 ? tap : last_tap - tap; }
};

template <class T>
__device__ inline const T* at(const void* matrix, int64_t element) {
  return static_cast<const T*>(matrix) + element;
}

// Eight columns of a row over its present taps.
template <class T>
__device__ inline Sums<T, 8> convolve_again(const Convolution& c, int64_t row, int64_t col) {
  Sums<T, 8> sums;
#pragma unroll 1
  for (int tap = 0; tap < c.g.taps; ++tap) {
    const int32_t in = c.g.rows[tap * c.g.tap_stride + row];
    if (static_cast<uint32_t>(in) >= c.g.rows_in) continue;
    sums.add(*row_of<Pack<T, 8>>(at<T>(c.x, col), in, c.g.x_bytes),
             *row_of<Pack<T, 8>>(at<T>(c.w, col), c.weight_row(tap), c.w_bytes));
  }
  return sums;
}

template <class T>
__device__ inline void write_row(const Convolution& c, int64_t row, int64_t col, Sums<T, 8> y) {
  for (int i = 0; i < 8 && c.bias != nullptr; ++i) y.v[i] += widen(*at<T>(c.bias, col + i));
  y.write(reinterpret_cast<T*>(static_cast<char*>(c.y) + row * c.y_bytes) + col);
}

// Words of the weights: [taps_at_once + 1][chunks][word][g]. The last tap has zeros; lanes off the
// diagonal read them a word further, in other banks.
constexpr int zero_shift = 8;
template <int chunks>
constexpr int tap_words = chunks * 4 * 8;
template <int chunks>
constexpr int weight_words = (taps_at_once + 1) * tap_words<chunks> + zero_shift;

// Brings the weights of taps from `first_tap` on to shared memory; past the last tap and column
// they are zero.
template <class T, int chunks>
__device__ inline void fetch_weights(const Convolution& c,
                                     int first_tap,
                                     int64_t first_col,
                                     uint32_t* weights) {
  for (int i = static_cast<int>(threadIdx.x); i < weight_words<chunks>; i += blockDim.x) {
    const int tap = i / tap_words<chunks>;
    const int g = i % 8;
    const int64_t col = first_col + i / 32 % chunks * chunk_cols + g / 2 * 8 + i / 8 % 4 * 2;
    uint32_t w = 0;
    if (tap < min(taps_at_once, c.g.taps - first_tap) && col < c.g.cols) {
      w = *row_of<uint32_t>(at<T>(c.w, col), c.weight_row(first_tap + tap), c.w_bytes);
    }
    weights[i] = w & (g % 2 == 0 ? 0xffff : 0xffff0000);
  }
}

// Brings the row numbers of a group at taps from `first_tap` on to [tap][rows], -1 where they are
// absent, and returns which of the taps any row has. By a warp, a lane a row; rows g, g + 8, g + 16
// and g + 24 stand side by side.
__device__ inline uint32_t fetch_group(const Gather& g,
                                       int first_tap,
                                       int64_t first_row,
                                       int32_t (&numbers)[taps_at_once][group_rows]) {
  constexpr int batch = 16;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const bool exists = first_row + lane < g.rows_out;
  const int taps = exists ? min(taps_at_once, g.taps - first_tap) : 0;
  const int32_t* from = g.rows + first_tap * g.tap_stride + (exists ? first_row + lane : 0);
  uint32_t present = 0;
  __syncwarp();
#pragma unroll
  for (int tap = 0; tap < taps_at_once; tap += batch) {
    int32_t in[batch];
#pragma unroll
    for (int i = 0; i < batch; ++i) {
      in[i] = tap + i < taps ? *from : -1;
      from = kept(from + g.tap_stride);
    }
#pragma unroll
    for (int i = 0; i < batch; ++i) {
      const bool there = static_cast<uint32_t>(in[i]) < g.rows_in;
      if (there) present |= 1U << (tap + i);
      numbers[tap + i][lane % 8 * 4 + lane / 8] = there ? in[i] : -1;
    }
  }
  __syncwarp();
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  present = __reduce_or_sync(0xffffffff, present);
#endif
  return present;
}

// Where a row begins: one instruction, which the compiler does not find.
__device__ inline const char* row_at(const void* column, int32_t row, uint32_t row_bytes) {
  const char* from;
  asm("mad.wide.u32 %0, %1, %2, %3;" : "=l"(from) : "r"(row), "r"(row_bytes), "l"(column));
  __builtin_assume(__isGlobal(from));
  return from;
}

// Sums of a warp: [chunk][i][rows of 8][.].
template <int chunks>
using GroupSums = float[chunks][2][group_rows / 8][4];

// The diagonals of a lane: [chunk][i], of which the first and the last word are not always zero.
template <int chunks>
struct Diagonals {
  uint32_t a[chunks][2][4];

  __device__ Diagonals() {
    // Zeros that stay in their registers.
    for (int i = 0; i < 8 * chunks; ++i) {
      asm volatile("mov.b32 %0, 0;" : "=r"(a[i / 8][i / 4 % 2][i % 4]));
    }
  }
};

// Where a lane is, and what it reads of x.
template <class T, int chunks>
struct Lane {
  int g;
  bool diagonal;
  int64_t col;         // in the first chunk
  int chunks_here;     // that have the lane's columns
  const void* column;  // of x
  uint32_t x_bytes;    // between rows of x

  __device__ Lane(const Gather& gather, const void* x, int64_t first_col)
      : g(static_cast<int>(threadIdx.x) % 32 / 4),
        diagonal(static_cast<int>(threadIdx.x) % 4 == g / 2),
        col(first_col + threadIdx.x % 4 * 8),
        chunks_here(static_cast<int>((gather.cols - col + chunk_cols - 1) / chunk_cols)),
        column(kept(at<T>(x, col < gather.cols ? col : 0))),
        x_bytes(gather.x_bytes) {}

  // Four tiles of 8 rows, of which the lane's are those of these numbers.
  __device__ void load(const Pack<int32_t, 4>& in, uint4 (&x)[4][chunks]) const {
#pragma unroll
    for (int tile = 0; tile < 4; ++tile) {
      const char* from = row_at(column, in.v[tile], x_bytes);
#pragma unroll
      for (int chunk = 0; chunk < chunks; ++chunk) {
        x[tile][chunk] = {};
        if (in.v[tile] >= 0 && chunk < chunks_here) {
          x[tile][chunk] = *reinterpret_cast<const uint4*>(from + chunk * chunk_cols * sizeof(T));
        }
      }
    }
  }
  __device__ void multiply(const Diagonals<chunks>& d,
                           const uint4 (&x)[4][chunks],
                           GroupSums<chunks>& sums) const {
#pragma unroll
    for (int i = 0; i < 4 * chunks; ++i) {
      const int chunk = i % chunks;
      const uint4& words = x[i / chunks][chunk];
      ptx::add_product(sums[chunk][0][i / chunks], d.a[chunk][0], words.x, words.y, T());
      ptx::add_product(sums[chunk][1][i / chunks], d.a[chunk][1], words.z, words.w, T());
    }
  }
};

// Rounds and writes a group's sums. By a warp.
template <class T, int chunks>
__device__ inline void write_group(const Convolution& c,
                                   int64_t first_row,
                                   int64_t first_col,
                                   const GroupSums<chunks>& sums) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const bool odd = lane / 4 % 2 == 1;
  const int64_t row = first_row + lane % 4 * 2 + (odd ? 1 : 0);
  const int64_t col = first_col + lane / 8 * 8;
  uint32_t broken = 0;
#pragma unroll
  for (int i = 0; i < 4 * chunks; ++i) {
    const int chunk = i % chunks;
    Sums<T, 8> y;
    bool nan = false;
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const float(&d)[4] = sums[chunk][q / 2][i / chunks];
      const float first = d[q % 2 * 2];
      const float second = d[q % 2 * 2 + 1];
      const float mine = odd ? second : first;
      const float theirs = __shfl_xor_sync(0xffffffff, odd ? first : second, 4);
      y.v[2 * q] = odd ? theirs : mine;
      y.v[2 * q + 1] = odd ? mine : theirs;
      nan = nan || mine != mine || theirs != theirs;
    }
    if (row + i / chunks * 8 >= c.g.rows_out || col + chunk * chunk_cols >= c.g.cols) continue;
    if (nan) broken |= 1U << i;
    write_row(c, row + i / chunks * 8, col + chunk * chunk_cols, y);
  }
#pragma unroll 1
  for (; broken != 0; broken &= broken - 1) {
    const int i = __ffs(static_cast<int>(broken)) - 1;
    const int64_t again = row + i / chunks * 8;
    const int64_t from = col + i % chunks * chunk_cols;
    write_row(c, again, from, convolve_again<T>(c, again, from));
  }
}

template <class T, int chunks>
__global__ __launch_bounds__(convolve_warps * 32,
                             blocks_here(chunks == 1
                                             ? 5
                                             : blocks_at_once)) void convolve(Convolution c) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  __shared__ uint32_t weights[weight_words<chunks>];
  __shared__ __align__(16) int32_t all_numbers[convolve_warps][taps_at_once][group_rows];
  const int warp = static_cast<int>(threadIdx.x) / 32;
  auto& numbers = all_numbers[warp];
  const int64_t first_col = static_cast<int64_t>(blockIdx.y) * chunks * chunk_cols;
  const Lane<T, chunks> lane(c.g, c.x, first_col);
  const uint32_t* mine =
      weights + lane.g + (lane.diagonal ? 0 : taps_at_once * tap_words<chunks> + zero_shift);
  const int tap_step = lane.diagonal ? tap_words<chunks> : 0;
  Diagonals<chunks> diagonals;
  const int64_t tiles = (c.g.rows_out + tile_rows - 1) / tile_rows;
  bool has_weights = false;
  const int64_t end = tiles * (blockIdx.x + 1) / gridDim.x;
  int64_t tile = tiles * blockIdx.x / gridDim.x;
  // Asked at once: a block that has none is to end soon.
  bool any = c.left == nullptr;
  for (int64_t i = tile + threadIdx.x; i < end && !any; i += blockDim.x) any = c.left[i] != 0;
  if (__syncthreads_or(any) == 0) return;
  for (; tile < end; ++tile) {
    if (c.left != nullptr && c.left[tile] == 0) continue;
    const int64_t row = tile * tile_rows + warp * group_rows;
    GroupSums<chunks> sums = {};
    for (int first_tap = 0; first_tap < c.g.taps; first_tap += taps_at_once) {
      if (!has_weights || c.g.taps > taps_at_once) {
        __syncthreads();
        fetch_weights<T, chunks>(c, first_tap, first_col, weights);
        __syncthreads();
      }
      uint32_t present = fetch_group(c.g, first_tap, row, numbers);
      const auto next = [&] {
        const int tap = __ffs(static_cast<int>(present)) - 1;
        present &= present - 1;
        return tap;
      };
      const auto load = [&](int tap, uint4(&x)[4][chunks]) {
        lane.load(load_pack<int32_t, 4>(&numbers[tap][lane.g * 4]), x);
      };
      const auto add = [&](int tap, const uint4(&x)[4][chunks]) {
        const uint32_t* w = mine + tap * tap_step;
#pragma unroll
        for (int i = 0; i < 2 * chunks; ++i) {
          diagonals.a[i / 2][i % 2][0] = w[i * 16];
          diagonals.a[i / 2][i % 2][3] = w[i * 16 + 8];
        }
        lane.multiply(diagonals, x, sums);
      };
      if (present == 0) continue;
      // A tap is on its way while the one before is added.
      uint4 x[2][4][chunks];
      int first = next();
      load(first, x[0]);
      while (present != 0) {
        const int second = next();
        load(second, x[1]);
        add(first, x[0]);
        if (present == 0) {
          add(second, x[1]);
          first = -1;
          break;
        }
        first = next();
        load(first, x[0]);
        add(second, x[1]);
      }
      if (first >= 0) add(first, x[0]);
    }
    has_weights = true;
    write_group<T, chunks>(c, row, first_col, sums);
  }
#endif
}

// On sm_90, convolves tiles whose rows of x lie near each other (depthwise_sm90.cu), points c->left
// at the others, and returns what keeps it alive; nothing where it cannot or is not faster.
template <class T>
std::shared_ptr<void> convolve_near(const Context& ctx, Convolution* c);

}  // namespace voxgemm::cuda::depthwise_sm80
