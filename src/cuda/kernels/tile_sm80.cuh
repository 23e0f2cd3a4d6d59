// SPDX-License-Identifier: Apache-2.0
#pragma once

// What the kernels on the warp's matrix instructions share: operands in shared memory, their
// products, the gather of rows, and the pipeline of stages. A CTA has four warps, two by two over a
// tile of sums; a warp holds row_blocks x col_blocks blocks of 16 x 8 in the layout of ptx/mma.cuh.
//
// Shared memory. An operand is cut in panels with lines of 128 bytes, 8 pieces of 16 bytes. An
// operand that is contiguous along the reduction (deep) has one panel, a line of it for each row or
// column of the tile; else panels have a line for each step of the reduction and 128 bytes of the
// tile's rows or columns, side by side. Piece p of line r lies at p ^ (r & 7), so that ldmatrix
// meets no bank twice, and of f32 that is not deep, whose words are read singly, at p ^ 2 (r & 3).
//
// f32 operands become tf32, or two or three bf16 each, in registers. For bf16 two 8-deep steps make
// one of 16, words t of two pieces side by side, which permutes both operands' reduction alike.
//
// `present`: 16 rows of gathered operand that a step lacks altogether are neither copied nor
// multiplied, so the waste of a tile is that of 16 rows. A word per 64 rows of a panel has a byte
// for each 16 rows and a bit for each piece.

#include <type_traits>

#include "cuda/kernels/families.h"
#include "cuda/kernels/pass.cuh"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/mma.cuh"

namespace voxgemm::cuda::sm80 {

template <Math math>
using Element = std::conditional_t<math == Math::f16,
                                   __half,
                                   std::conditional_t<math == Math::bf16, __nv_bfloat16, float>>;

// Whether the architecture being compiled has the instructions.
template <Math math>
__device__ constexpr bool runs_here() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  return math == Math::f16 || math == Math::ieee;
#else
  return true;
#endif
}

constexpr int threads = 128;
constexpr int stages = 3;
constexpr int most_shared_bytes = 99 << 10;  // of a CTA, from compute capability 8.0 on

// What the kernels know of a pass and of its rows.
struct TileParams : PassArgs {
  uint32_t x_row_bytes;
  int column_blocks;
  int pieces;  // of 16 bytes, of a tap's input channels
  int slices = 1;

  TileParams(const Variant& variant, const ConvArgs& args)
      : PassArgs(args),
        x_row_bytes(static_cast<uint32_t>(args.x.stride * size_of(args.x.dtype))),
        column_blocks(static_cast<int>(ceil_div(c_out, variant.cols))),
        pieces(static_cast<int>(ceil_div(c_in * size_of(args.x.dtype), 16))) {}
};

// A [rows, depth] B [depth, cols] of a stage; a step is 32 bytes of depth, or as many lines.
template <Math math_, int rows_, int cols_, bool a_deep_, bool b_deep_>
struct Shape {
  static constexpr Math math = math_;
  using T = Element<math>;
  static constexpr int size = sizeof(T);
  static constexpr int rows = rows_;
  static constexpr int cols = cols_;
  static constexpr bool a_deep = a_deep_;
  static constexpr bool b_deep = b_deep_;
  static constexpr int depth = a_deep ? 128 / size : 64;
  static constexpr int step_depth = 32 / size;
  static constexpr int steps = depth / step_depth;
  static constexpr int per_piece = 16 / size;
  static constexpr int row_blocks = rows / 32;  // of a warp, 16 rows each
  static constexpr int col_blocks = cols / 16;  // of a warp, 8 columns each
  static constexpr int panel_bytes = depth * 128;
  static constexpr int a_bytes = rows * depth * size;
  static constexpr int b_panels = b_deep ? 1 : (cols * size + 127) / 128;
  static constexpr int b_bytes = b_deep ? cols * depth * size : b_panels * panel_bytes;
  static constexpr int a_words = a_deep ? rows / 64 : rows * size / 128;  // of `present`
  static constexpr int stage_bytes = a_bytes + b_bytes;
  // The sums of a tile wait there for their way out. Eight words apart, lines meet no bank twice.
  static constexpr int sums_stride = cols / 2 + 8;
  static_assert(2 * rows * sums_stride * 4 <= stages * stage_bytes);
  static constexpr int ring_bytes = stages * stage_bytes;
  using Sums = float[row_blocks][col_blocks][4];
};

__device__ inline int lane_id() { return threadIdx.x % 32; }
__device__ inline int warp_row() { return threadIdx.x / 64; }
__device__ inline int warp_col() { return threadIdx.x / 32 % 2; }

// Lane's part of the address of a fragment: 16 rows or columns, one step. first: the warp's 16.
template <class S, bool is_a>
__device__ inline uint32_t fragment_place(int first) {
  const int lane = lane_id();
  constexpr bool deep = is_a ? S::a_deep : S::b_deep;
  if constexpr (deep || S::size == 2) {
    // A deep B, as an A that is not, goes along the step first, then to the other 8 of 16.
    const int line = is_a == deep ? lane % 16 : lane / 16 * 8 + lane % 8;
    const int half = is_a == deep ? lane / 16 : lane / 8 % 2;
    const uint32_t place = line * 128 + ((half ^ (lane & 7)) << 4);
    if (deep) return first * 2048 + place;
    return first / 4 * S::panel_bytes + (place ^ (first % 4 << 5));
  }
  const int g = lane / 4;
  const int t = lane % 4;
  const int piece = (first % 2 * 4 + g / 4) ^ (t << 1);
  return first / 2 * S::panel_bytes + t * 128 + (piece << 4) + g % 4 * 4;
}

// A: the fragment of 16 rows. B: those of two times 8 columns.
template <class S, bool is_a>
__device__ inline void load_fragment(uint32_t (&f)[4], uint32_t from, int block, int step) {
  constexpr bool deep = is_a ? S::a_deep : S::b_deep;
  if constexpr (deep) {
    ptx::load_matrices(f, (from + block * 2048) ^ (step << 5));
  } else if constexpr (S::size == 2) {
    ptx::load_matrices_transposed(
        f, (from + block / 4 * S::panel_bytes + step * 2048) ^ (block % 4 << 5));
  } else {
    const uint32_t panel = from + block / 2 * S::panel_bytes + step * 1024;
    unroll<4>([&](int q) {
      const int far = is_a ? q % 2 : q / 2;
      const int down = is_a ? q / 2 : q % 2;
      f[q] = ptx::shared<uint32_t>((panel + down * 512) ^ ((block % 2 * 4 + far * 2) << 4));
    });
  }
}

// Whether 16 rows have something to multiply in `count` steps from `step` on, by the warp's word.
template <class S>
__device__ inline bool is_present(uint32_t word, int block, int step, int count) {
  constexpr uint32_t step_bits = 3;                  // two pieces
  constexpr uint32_t row_bits = (1 << S::size) - 1;  // pieces of 16 rows
  if constexpr (S::a_deep) {
    const uint32_t bits = count == 1 ? step_bits : 5 * step_bits;
    return (word >> (block * 8 + step * 2) & bits) != 0;
  } else {
    const int group = step * S::step_depth / 16;
    return (word >> (group * 8 + block * S::size) & row_bits) != 0;
  }
}

// `count` pieces of bf16 whose sum is x, for the two f32 of a word.
template <int count>
__device__ inline void split(uint32_t first, uint32_t second, uint32_t (&pieces)[count]) {
  float x = __uint_as_float(first);
  float y = __uint_as_float(second);
  unroll<count>([&](int i) {
    pieces[i] = ptx::to_bf16(x, y);
    x -= __uint_as_float(pieces[i] << 16);
    y -= __uint_as_float(pieces[i] & 0xffff0000u);
  });
}

// Where a warp's operands stand in a stage, and the presence of its rows.
struct Stage {
  uint32_t a;
  uint32_t b;
  uint32_t present;  // shifted so that block 0 is the warp's first
};

// Fragments in `count` pieces: of a step, f32 as tf32; of two in bf16, words q of both together.
template <class S, bool is_a, int count>
__device__ inline void load_split(uint32_t (&pieces)[count][4],
                                  uint32_t from,
                                  int block,
                                  int step) {
  if constexpr (count == 1) {
    load_fragment<S, is_a>(pieces[0], from, block, step);
    if constexpr (S::size == 2) return;
    return unroll<4>([&](int q) { pieces[0][q] = ptx::to_tf32(pieces[0][q]); });
  }
  uint32_t words[2][4];
  load_fragment<S, is_a>(words[0], from, block, step);
  load_fragment<S, is_a>(words[1], from, block, step + 1);
  // The instruction's halves of the reduction, which are the two steps: of A words (0, 2) and (1,
  // 3) of a step differ in their place along it, of B words (0, 1) and (2, 3).
  unroll<4>([&](int q) {
    const int half = is_a ? q / 2 : q % 2;
    const int low = is_a ? q % 2 : q / 2 * 2;
    uint32_t both[count];
    split(words[half][low], words[half][low + (is_a ? 2 : 1)], both);
    unroll<count>([&](int i) { pieces[i][q] = both[i]; });
  });
}

// Of 16 bits the next step's fragments are loaded ahead, for which f32 has no registers.
template <class S>
__device__ inline void multiply_fragments(typename S::Sums& d, const Stage& stage) {
  constexpr int count = S::math == Math::bf16x3 ? 2 : S::math == Math::bf16x6 ? 3 : 1;
  constexpr int steps_at_once = count == 1 ? 1 : 2;
  constexpr bool is_ahead = S::size == 2;
  using Operand = std::conditional_t<S::size == 2, typename S::T,
                                     std::conditional_t<count == 1, ptx::Tf32, __nv_bfloat16>>;
  uint32_t a[2][S::row_blocks][count][4];
  uint32_t b[2][S::col_blocks / 2][count][4];
  const auto load_a = [&](int i, int step) {
    load_split<S, true>(a[step / steps_at_once % 2][i], stage.a, i, step);
  };
  const auto load_b = [&](int step) {
    unroll<S::col_blocks / 2>(
        [&](int j) { load_split<S, false>(b[step / steps_at_once % 2][j], stage.b, j, step); });
  };
  const auto load_step = [&](int step) {
    load_b(step);
    unroll<S::row_blocks>([&](int i) { load_a(i, step); });
  };
  if (is_ahead) load_step(0);
#pragma unroll
  for (int step = 0; step < S::steps; step += steps_at_once) {
    if (!is_ahead) {
      load_b(step);
    } else if (step + 1 < S::steps) {
      load_step(step + 1);
    }
    const int now = step / steps_at_once % 2;
    unroll<S::row_blocks>([&](int i) {
      if (!is_present<S>(stage.present, i, step, steps_at_once)) return;
      if (!is_ahead) load_a(i, step);
        // The smallest products first.
#pragma unroll
      for (int sum = count - 1; sum >= 0; --sum) {
#pragma unroll
        for (int of_a = 0; of_a <= sum; ++of_a) {
          unroll<S::col_blocks>([&](int j) {
            const uint32_t(&from)[4] = b[now][j / 2][sum - of_a];
            ptx::add_product(d[i][j], a[now][i][of_a], from[j % 2 * 2], from[j % 2 * 2 + 1],
                             Operand());
          });
        }
      }
    });
  }
}

// Four steps of depth 1 from 4 * quad on, of one row or column of an operand. first: of the warp's.
template <class S, bool is_a>
__device__ inline void load_quad(float (&v)[4], uint32_t from, int line, int quad) {
  if constexpr (is_a ? S::a_deep : S::b_deep) {
    const auto four = ptx::shared<float4>(from + line * 128 + ((quad ^ (line & 7)) << 4));
    unroll<4>([&](int k) { v[k] = (&four.x)[k]; });
  } else {
    unroll<4>([&](int k) {
      const int piece = line % 32 / 4 ^ (k << 1);
      v[k] = ptx::shared<float>(from + line / 32 * S::panel_bytes + (quad * 4 + k) * 128 +
                                piece * 16 + line % 4 * 4);
    });
  }
}

// Fused multiply-adds in the order of the reduction.
template <class S>
__device__ inline void multiply_ieee(typename S::Sums& d, const Stage& stage) {
  const int row = warp_row() * S::rows / 2 + lane_id() / 4;
  const int col = warp_col() * S::cols / 2 + lane_id() % 4 * 2;
#pragma unroll 1
  for (int quad = 0; quad < S::depth / 4; ++quad) {
    float b[S::col_blocks][2][4];
    unroll<S::col_blocks>([&](int j) {
      load_quad<S, false>(b[j][0], stage.b, col + j * 8, quad);
      load_quad<S, false>(b[j][1], stage.b, col + j * 8 + 1, quad);
    });
    unroll<S::row_blocks>([&](int i) {
      if (!is_present<S>(stage.present, i, quad / 2, 1)) return;
      float a[2][4];
      load_quad<S, true>(a[0], stage.a, row + i * 16, quad);
      load_quad<S, true>(a[1], stage.a, row + i * 16 + 8, quad);
      unroll<4>([&](int k) {
        unroll<S::col_blocks>([&](int j) {
          unroll<4>([&](int e) { d[i][j][e] = fmaf(a[e / 2][k], b[j][e % 2][k], d[i][j][e]); });
        });
      });
    });
  }
}

// The warp's view of the stage at `address`, whose presence words are at `present`.
template <class S>
__device__ inline Stage stage_of(uint32_t address, const uint32_t* present) {
  // The warp's blocks are a whole word, or half of the only one.
  constexpr int blocks_of_word = S::a_deep ? 4 : 8 / S::size;
  static_assert(S::row_blocks == blocks_of_word || (S::a_deep && 2 * S::row_blocks == 4));
  const int first = warp_row() * S::row_blocks;
  Stage stage = {address, address + S::a_bytes,
                 present[first / blocks_of_word] >> first % blocks_of_word * 8};
  if constexpr (S::math != Math::ieee) {
    stage.a += fragment_place<S, true>(first);
    stage.b += fragment_place<S, false>(warp_col() * S::col_blocks / 2);
  }
  return stage;
}

// Input rows of four neighbouring rows of work, -1 where absent.
struct Four {
  int row[4] = {-1, -1, -1, -1};
  __device__ bool any() const { return (row[0] & row[1] & row[2] & row[3]) >= 0; }
};
// Of an index block; at: a multiple of 4.
__device__ inline Four four_of_block(const int32_t* at) {
  const int4 v = __ldg(reinterpret_cast<const int4*>(at));
  return {{v.x, v.y, v.z, v.w}};
}
// Entries [first, first + 4) of a list that ends at `end`.
__device__ inline Four four_of_list(const int32_t* list, int64_t first, int64_t end) {
  Four four;
  unroll<4>([&](int i) {
    if (first + i < end) four.row[i] = __ldg(list + first + i);
  });
  return four;
}

// A piece of four rows of a matrix, `bytes` apart and `from` in the first, to lines 4 *
// (threadIdx.x / 8) on of the 64 at `to`: eight lanes copy a line.
template <class S>
__device__ inline void gather(uint32_t to, const char* from, uint32_t bytes, const Four& rows) {
  const int piece = threadIdx.x % 8;
  const int line = threadIdx.x / 8 * 4;
  unroll<4>([&](int i) {
    const int flip = S::a_deep || S::size == 2 ? (line & 7) + i : i << 1;
    ptx::gather_16(to + (line + i) * 128 + ((piece ^ flip) << 4), from, rows.row[i], bytes);
  });
}

// The same but for 16 lines that have nothing; notes in the byte of each 16 which pieces there are.
template <class S>
__device__ inline void gather_present(
    uint32_t to, const char* from, uint32_t bytes, const Four& rows, uint32_t* word) {
  uint32_t present = __ballot_sync(0xffffffff, rows.any());
  if (present != 0) gather<S>(to, from, bytes, rows);
  present |= present >> 16;
  present |= present >> 8;
  if (lane_id() == 0) reinterpret_cast<uint8_t*>(word)[threadIdx.x / 32] = present & 0xff;
}

// A piece of the reduction of a gathered row: `slot` counts taps, `piece` 16 bytes of a tap's
// channels. Pieces of all taps follow each other, so no channel count leaves holes in a stage.
struct Place {
  int slot = 0;
  int piece = 0;
};
__device__ inline Place place_of(int piece, int pieces_of_tap) {
  return {piece / pieces_of_tap, piece % pieces_of_tap};
}

// Lays the warp's sums out as [rows / 2, sums_stride].
template <class S>
__device__ inline float* lay_out(float* memory, const typename S::Sums& d) {
  float* own = memory + threadIdx.x / 32 * (S::rows / 2 * S::sums_stride);
  const int g = lane_id() / 4;
  const int t = lane_id() % 4;
  unroll<S::row_blocks>([&](int i) {
    unroll<S::col_blocks>([&](int j) {
      unroll<2>([&](int h) {
        *reinterpret_cast<float2*>(own + (i * 16 + h * 8 + g) * S::sums_stride + j * 8 + t * 2) =
            make_float2(d[i][j][h * 2], d[i][j][h * 2 + 1]);
      });
    });
  });
  __syncwarp();
  return own;
}

// Dynamic shared memory: the ring of stages, later the sums; presence words of each stage; others.
__device__ inline unsigned char* memory_of_block() {
  extern __shared__ __align__(128) unsigned char memory[];
  return memory;
}
template <class S>
__device__ inline uint32_t* words_of_block() {
  return reinterpret_cast<uint32_t*>(memory_of_block() + S::ring_bytes);
}

// Multiplies all stages that the producer fills, and lays the warp's sums out.
template <class S, class P>
__device__ inline const float* multiply_stages(P* producer) {
  const uint32_t ring_address = ptx::shared_address(memory_of_block());
  unroll<stages - 1>([&](int i) {
    if (producer->has(i)) producer->fill(i, ring_address + i * S::stage_bytes);
    ptx::copies_commit();
  });
  typename S::Sums d = {};
  int ring = 0;
  for (int at = 0; producer->has(at); ++at) {
    ptx::copies_wait<stages - 2>();
    __syncthreads();
    if (producer->has(at + stages - 1)) {
      const int next = ring == 0 ? stages - 1 : ring - 1;
      producer->fill(next, ring_address + next * S::stage_bytes);
    }
    ptx::copies_commit();
    const Stage stage =
        stage_of<S>(ring_address + ring * S::stage_bytes, words_of_block<S>() + ring * S::a_words);
    if (stage.present != 0) {
      if constexpr (S::math == Math::ieee) {
        multiply_ieee<S>(d, stage);
      } else {
        multiply_fragments<S>(d, stage);
      }
    }
    ring = ring == stages - 1 ? 0 : ring + 1;
  }
  ptx::copies_wait<0>();
  __syncthreads();
  return lay_out<S>(reinterpret_cast<float*>(memory_of_block()), d);
}

}  // namespace voxgemm::cuda::sm80
