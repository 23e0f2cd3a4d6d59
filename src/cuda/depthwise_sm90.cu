// SPDX-License-Identifier: Apache-2.0
//
// Depthwise convolution of 16-bit floats with 27 taps on Hopper, where rows that follow each other
// read rows near each other, as in raster order. Left to other kernels are tiles whose rows lie far
// apart, all later ones of a block once it met a few such in turn, and those with a sum of NaN.
//
// A block takes a piece of 128 bytes of the columns, or two, of every so many-th tile of 128 rows.
// What a tile reads at the nine taps of a plane lies in one range of rows of x; tensor copies bring
// the three ranges whole to a stage of shared memory, a line a row. Four warps fetch, a thread a
// row: it finds the ranges with the others and writes down the places of the row's neighbours.
// Eight warps multiply, 16 rows each, four at a time: eight lanes read a whole line, so that no
// two meet in a bank. Of a stage, `full` ends when its bytes have landed and its places are
// written, `free` when every warp has read it; a stage for a tile past the last ends the block.
//
// A sparse matrix instruction has four taps of four rows in B [32, 8]: column n = 2 row + half,
// k = 8 tap + 2u + e is column 32 half + 8u + 2i + e of product i of four. A's row g is a column of
// half 0, row g + 8 one of half 1, so a lane has weights in two of its four words; sums of the
// other half are not looked at. The bias is the weight of a 28th tap, whose rows are ones.
//
// What all lanes of a warp read its first releases after a __syncwarp that leaves no code, and
// racecheck reports the next write. Times and what lost are in docs/performance.md.
#include "cuda/depthwise_sm80.cuh"
#include "cuda/ptx/barrier.cuh"

namespace voxgemm::cuda::depthwise_sm80 {
namespace {

constexpr int taps = 27;
constexpr int quads = 7;   // of taps
constexpr int warps = 8;   // that multiply
constexpr int groups = 4;  // of 4 rows, of a warp
constexpr int threads = 32 * warps + tile_rows;
constexpr int line_bytes = 128;
constexpr int line_pieces = line_bytes / 16;
constexpr int piece_cols = line_bytes / 2;
constexpr int box_rows = 32;
constexpr int stages = 2;
constexpr int stage_rows = 800;
constexpr int most_pieces = 2;
constexpr int most_misses = 4;  // in turn

struct alignas(1024) Shared {
  uint4 lines[stages][stage_rows][line_pieces];
  // Where lines begin, in 16 bytes of a stage; rows r, r + 4, ... of a warp stand side by side.
  uint2 places[2][quads][tile_rows];
  uint4 weights[most_pieces][quads][32];  // a lane's of a quad
  alignas(16) uint32_t edges[2][6][4];
  int64_t first_row[stages];
  uint64_t full[stages];
  uint64_t free[stages];
};

// The row numbers of a row; past the last, some others. In flight when it returns.
__device__ inline void look_up(const Gather& g, int64_t row, uint32_t (&numbers)[taps]) {
  const int32_t* from = g.rows + (row < g.rows_out ? row : 0);
  unroll<taps>([&](int t) {
    asm volatile("ld.global.nc.b32 %0, [%1];" : "=r"(numbers[t]) : "l"(from));
    from = kept(from + g.tap_stride);
  });
}

// Where lines of rows that are fetched together are.
struct Lines {
  static constexpr uint32_t none = 1U << 31;  // the number of an absent row
  int base[3] = {};                           // row r of a plane is line r - base
  int end[4] = {};                            // of the lines before a plane, and of all

  __device__ void find(const uint32_t (&numbers)[taps], uint32_t (&edges)[6][4]) {
    // The lowest number of a plane, and how far the highest is from 2^31 - 1.
    uint32_t edge[6] = {~0U, ~0U, ~0U, ~0U, ~0U, ~0U};
    unroll<taps>([&](int t) {
      edge[t / 9] = min(edge[t / 9], numbers[t]);
      edge[3 + t / 9] = min(edge[3 + t / 9], none - 1 - numbers[t]);
    });
    const int warp = static_cast<int>(threadIdx.x) % tile_rows / 32;
    unroll<6>([&](int i) { edges[i][warp] = __reduce_min_sync(0xffffffff, edge[i]); });
    ptx::named_barrier(1, tile_rows);
    unroll<3>([&](int p) {
      const uint4 lows = reinterpret_cast<const uint4&>(edges[p]);
      const uint4 highs = reinterpret_cast<const uint4&>(edges[3 + p]);
      const uint32_t low = min(min(lows.x, lows.y), min(lows.z, lows.w));
      const uint32_t high = none - 1 - min(min(highs.x, highs.y), min(highs.z, highs.w));
      const bool any = low < none;
      const int boxes = any ? min(high - low, uint32_t{stage_rows}) / box_rows + 1 : 0;
      base[p] = any ? static_cast<int>(low) - end[p] : 0;
      end[p + 1] = end[p] + boxes * box_rows;
    });
  }
  // Of a neighbour; of an absent one it is all ones but three.
  __device__ uint32_t place(const uint32_t (&numbers)[taps], int t) const {
    return t < taps ? min(numbers[t] - base[t / 9], 0xffffU / line_pieces) * line_pieces : 0;
  }
};

__device__ inline void fetch(const CUtensorMap& x,
                             const Convolution& c,
                             int pieces,
                             Shared& shared) {
  const int thread = static_cast<int>(threadIdx.x) % tile_rows;
  const int spot = thread / 16 * 16 + thread % 4 * groups + thread % 16 / 4;
  const int64_t step = int64_t{gridDim.x} * tile_rows;
  ptx::Ring<stages> ring;
  uint32_t ahead[taps];
  look_up(c.g, int64_t{blockIdx.x} * tile_rows + thread, ahead);
  int buffer = 0;  // of edges
  int slot = 0;    // of places
  int misses = 0;
#pragma unroll 1
  for (int64_t first = int64_t{blockIdx.x} * tile_rows;; first += step) {
    const bool ends = first >= c.g.rows_out;
    Lines lines;
    uint32_t numbers[taps];
    if (!ends && misses < most_misses) {
      const uint32_t rows_in = first + thread < c.g.rows_out ? c.g.rows_in : 0;
      unroll<taps>([&](int t) { numbers[t] = ahead[t] < rows_in ? ahead[t] : Lines::none; });
      look_up(c.g, first + step + thread, ahead);
      lines.find(numbers, shared.edges[buffer ^= 1]);
      misses = lines.end[3] > stage_rows ? misses + 1 : 0;
    }
    if (!ends && misses > 0) {
      c.left[first / tile_rows] = 1;
      continue;
    }
#pragma unroll 1
    for (int piece = 0; piece < pieces; ++piece, ring.next()) {
      const int col = (static_cast<int>(blockIdx.y) * pieces + piece) * piece_cols;
      const uint32_t full = ptx::shared_address(&shared.full[ring.at]);
      ptx::barrier_wait(ptx::shared_address(&shared.free[ring.at]), ring.parity ^ 1);
      if (thread == 0) {
        shared.first_row[ring.at] = first;
        ptx::barrier_expect(full, lines.end[3] * line_bytes);
      }
      if (thread % 32 == 0) {
#pragma unroll 1
        for (int line = thread; line < lines.end[3]; line += 4 * box_rows) {
          const int base = line < lines.end[1]   ? lines.base[0]
                           : line < lines.end[2] ? lines.base[1]
                                                 : lines.base[2];
          ptx::copy_box(ptx::shared_address(shared.lines[ring.at][line]), &x, full,
                        {col, line + base, 0});
        }
      }
      __syncwarp();
      if (piece == 0) {
        unroll<quads>([&](int q) {
          const auto place = [&](int i) { return lines.place(numbers, 4 * q + i); };
          shared.places[slot][q][spot] = {place(0) | place(1) << 16, place(2) | place(3) << 16};
        });
      }
      ptx::barrier_arrive(full);
      if (ends) return;
    }
    slot ^= 1;
  }
}

// Reads 16 bytes of the line whose place is the low or the high half of a word, unless it is
// absent.
template <bool high>
__device__ inline void load_line(uint4* v, uint32_t lines, uint32_t places) {
  asm volatile(
      "{\n"
      ".reg .pred there;\n"
      ".reg .b32 from, flag;\n"
      "dp2a.lo.u32.u32 from, %5, %6, %4;\n"
      "and.b32 flag, %5, %7;\n"
      "setp.eq.u32 there, flag, 0;\n"
      "@there ld.shared.v4.b32 {%0, %1, %2, %3}, [from];\n"
      "}\n"
      : "+r"(v->x), "+r"(v->y), "+r"(v->z), "+r"(v->w)
      : "r"(lines), "r"(places), "n"(high ? 0x1000 : 0x0010), "n"(high ? 1U << 31 : 1U << 15));
}

// A lane's part of the products, and its sums.
template <class T>
struct Lane {
  int g = static_cast<int>(threadIdx.x) % 32 / 4;
  int u = static_cast<int>(threadIdx.x) % 4;
  bool first_half = u % 2 == g / 4;  // of the piece has the lane's weights
  uint32_t spread[4];                // what makes words of A of a word of weights
  uint32_t meta = g % 4 < 2 ? 0x44444444 : 0xeeeeeeee;
  uint32_t a[4][4];
  float sums[groups][4][4];

  __device__ Lane(const Convolution& c, int pieces, Shared* shared) {
    const uint32_t words[2] = {g % 2 == 0 ? 0x4410U : 0x1044U, g % 2 == 0 ? 0x4432U : 0x3244U};
    unroll<4>([&](int i) { spread[i] = (i % 2 == 0) == first_half ? words[i / 2] : 0x4444; });
    for (int i = static_cast<int>(threadIdx.x) / 32; i < pieces * quads; i += warps) {
      const int col = (static_cast<int>(blockIdx.y) * pieces + i / quads) * 64;
      const auto weight = [&](int tap, int column) -> uint32_t {
        const auto* from = tap < taps ? row_of<uint16_t>(c.w, c.weight_row(tap), c.w_bytes)
                                      : static_cast<const uint16_t*>(c.bias);
        return from == nullptr ? 0 : from[column];
      };
      const auto word = [&](int product) {
        const int own = first_half ? g : 32 + (g ^ 4);
        const int tap = i % quads * 4 + u / 2;
        const int column = col + own / 32 * 32 + own % 32 / 2 * 8 + 2 * product + own % 2;
        return weight(tap, column) | weight(tap + 2, column) << 16;
      };
      shared->weights[i / quads][i % quads][threadIdx.x % 32] = {word(0), word(1), word(2),
                                                                 word(3)};
    }
    ptx::named_barrier(2, 32 * warps);
  }
  __device__ void begin(const Shared& shared, int piece, int q) {
    const uint4 words = shared.weights[piece][q][threadIdx.x % 32];
    unroll<16>([&](int i) {
      const uint32_t word = reinterpret_cast<const uint32_t*>(&words)[i / 4];
      asm volatile("prmt.b32 %0, %1, 0, %2;"
                   : "=r"(a[i / 4][i % 4])
                   : "r"(word), "r"(spread[i % 4]));
    });
  }
  __device__ void add(int q, int group, const uint4 (&x)[4]) {
    constexpr uint32_t one = std::is_same_v<T, __half> ? 0x3c003c00 : 0x3f803f80;
    const uint4 last = q + 1 < quads ? x[3] : uint4{one, one, one, one};
    unroll<4>([&](int i) {
      const auto word = [&](const uint4& v) { return reinterpret_cast<const uint32_t*>(&v)[i]; };
      const uint4 b = {word(x[0]), word(x[1]), word(x[2]), word(last)};
      ptx::add_sparse_product(sums[group][i], a[i], b, meta, T());
    });
  }
  // Lanes with even g have the even columns of both halves of row u, those with odd g the odd ones:
  // the first write half 0, the others half 1.
  __device__ bool write(const Convolution& c, int64_t first_row, int col) const {
    const bool odd = g % 2 == 1;
    bool nan = false;
    unroll<groups>([&](int group) {
      Pack<T, 8> y;
      unroll<4>([&](int i) {
        const float first = sums[group][i][0];
        const float second = sums[group][i][3];
        nan = nan || first != first || second != second;
        const float mine = odd ? second : first;
        const float theirs = __shfl_xor_sync(0xffffffff, odd ? first : second, 4);
        y.set(2 * i, odd ? theirs : mine);
        y.set(2 * i + 1, odd ? mine : theirs);
      });
      const int64_t row = first_row + 4 * group + u;
      const int chunk = odd ? 4 + (g / 2 ^ 2) : g / 2;
      ptx::store_16(static_cast<char*>(c.y) + row * c.y_bytes + (col + chunk * 8) * sizeof(T),
                    reinterpret_cast<const uint4&>(y), row < c.g.rows_out);
    });
    return nan;
  }
};

// A warp's rows of a tile. Lines of two steps are on their way while those of one are added.
template <class T>
__device__ inline void add_taps(
    Lane<T>* lane, const Shared& shared, int stage, int slot, int piece) {
  constexpr int steps = quads * groups;
  constexpr int ahead = 2;
  const int thread = static_cast<int>(threadIdx.x);
  const uint32_t lines = ptx::shared_address(shared.lines[stage]) + thread % line_pieces * 16;
  const uint2* mine = &shared.places[slot][0][thread / 32 * 16 + thread % 32 / 8 * groups];
  uint4 places[3][groups / 2];  // of two groups each
  uint4 x[ahead + 1][4] = {};
  const auto find = [&](int q) {
    unroll<groups / 2>([&](int i) {
      if (q < quads) places[q % 3][i] = reinterpret_cast<const uint4&>(mine[q * tile_rows + 2 * i]);
    });
  };
  const auto load = [&](int step) {
    if (step >= steps) return;
    if (step % groups == 0) find(step / groups + 1);
    const uint4& two = places[step / groups % 3][step % groups / 2];
    const uint2 word = step % 2 == 0 ? uint2{two.x, two.y} : uint2{two.z, two.w};
    uint4(&to)[4] = x[step % (ahead + 1)];
    unroll<4>([&](int i) { to[i] = {}; });
    load_line<false>(&to[0], lines, word.x);
    load_line<true>(&to[1], lines, word.x);
    load_line<false>(&to[2], lines, word.y);
    if (step / groups + 1 < quads) load_line<true>(&to[3], lines, word.y);
  };
  unroll<16 * groups>([&](int i) { lane->sums[i / 16][i / 4 % 4][i % 4] = 0; });
  find(0);
  unroll<ahead>(load);
  unroll<steps>([&](int step) {
    if (step % groups == 0) lane->begin(shared, piece, step / groups);
    load(step + ahead);
    lane->add(step / groups, step % groups, x[step % (ahead + 1)]);
  });
}

template <class T>
__global__ __launch_bounds__(threads, 1) void convolve_tiles(const __grid_constant__ CUtensorMap x,
                                                             const Convolution c,
                                                             int pieces) {
  extern __shared__ __align__(1024) char memory[];
  auto& shared = *reinterpret_cast<Shared*>(memory);
  if (threadIdx.x == 0) {
    ptx::barriers_init(ptx::shared_address(shared.full), stages, tile_rows + 1);  // one for bytes
    ptx::barriers_init(ptx::shared_address(shared.free), stages, warps);
    ptx::barrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x >= 32 * warps) {
    ptx::registers_down<104>();
    return fetch(x, c, pieces, shared);
  }
  ptx::registers_up<200>();
  Lane<T> lane(c, pieces, &shared);
  ptx::Ring<stages> ring;
  for (int slot = 0;; slot ^= 1) {
#pragma unroll 1
    for (int piece = 0; piece < pieces; ++piece, ring.next()) {
      ptx::barrier_wait(ptx::shared_address(&shared.full[ring.at]), ring.parity);
      const int64_t first_row = shared.first_row[ring.at];
      if (first_row >= c.g.rows_out) return;
      add_taps(&lane, shared, ring.at, slot, piece);
      __syncwarp();
      if (threadIdx.x % 32 == 0) ptx::barrier_arrive(ptx::shared_address(&shared.free[ring.at]));
      const int col = (static_cast<int>(blockIdx.y) * pieces + piece) * piece_cols;
      if (lane.write(c, first_row + threadIdx.x / 32 * 16, col)) c.left[first_row / tile_rows] = 1;
    }
  }
}

}  // namespace

template <class T>
std::shared_ptr<void> convolve_near(const Context& ctx, Convolution* c) {
  const Gather& g = c->g;
  const int64_t tiles = ceil_div(g.rows_out, tile_rows);
  const int64_t pieces = g.cols / piece_cols;
  const bool can = architecture(ctx.device) / 10 == 9 && g.taps == taps &&
                   g.cols % piece_cols == 0 && g.rows_in > 0;
  // Of few tiles, a launch more costs more than it saves.
  if (!can || tiles * pieces < 2 * multiprocessors(ctx)) return nullptr;
  std::shared_ptr<void> memory = make_room(ctx, Room{&c->left, tiles});
  fill_bytes(ctx, c->left, 0, tiles);
  // Two pieces a block find the places of neighbours once.
  const int together = pieces % most_pieces == 0 ? most_pieces : 1;
  Grid grid = {.columns = pieces / together, .threads = threads, .shared_bytes = sizeof(Shared)};
  grid.blocks = std::clamp<int64_t>(multiprocessors(ctx) / grid.columns, 1, tiles);
  const CUtensorMap x = tensor_map(c->x, {g.cols, g.rows_in, 1}, {g.x_bytes, g.x_bytes},
                                   {piece_cols, box_rows, 1}, CU_TENSOR_MAP_SWIZZLE_NONE);
  launch(ctx, grid, convolve_tiles<T>, x, *c, together);
  return memory;
}
template std::shared_ptr<void> convolve_near<__half>(const Context&, Convolution*);
template std::shared_ptr<void> convolve_near<__nv_bfloat16>(const Context&, Convolution*);

}  // namespace voxgemm::cuda::depthwise_sm80
