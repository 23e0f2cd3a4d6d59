// SPDX-License-Identifier: Apache-2.0
#pragma once

// The tiles of grad_weight_sm90.cuh, who computes what of them, and what becomes of the sums.

#include <cstdint>
#include <type_traits>

#include "cuda/kernels/pass.cuh"

namespace voxgemm::cuda::grad_weight_sm90 {

// Rows of a batch: a quarter of a tile, or those of a tap as the map's table has them.
constexpr int batch_rows = 64;
constexpr int tile_rows = 256;
constexpr int quarters = tile_rows / batch_rows;

// x and dy as they were given, which is what is read where sums are NaN.
struct Params : PassArgs {
  const long long* pairs_per_tap = nullptr;  // [taps]
  // As they are gathered, f32 in terms.
  const void* x_rows = nullptr;  // [n_in, c_in]
  uint32_t x_row_bytes = 0;
  const void* dy_rows = nullptr;  // [rows, c_out]
  uint32_t dy_row_bytes = 0;
  int groups = 0;
  // Of channels, output channels fastest. Of one tap a group they are cut into `parts` of `members`
  // each; else a team has a member for every group and block.
  int out_blocks = 0;
  int blocks = 0;
  int members = 0;
  int parts = 1;
  int entries = 1;  // of the work axis
  int teams = 0;
  float* partials = nullptr;  // [slots, members, piece_size], see Piece and Sums

  // Number j of a group's taps, -1 behind the last. Taps that share blocks are neighbours, which
  // rows have together; sets of them lie `groups` apart, and from the fifth on another two further,
  // so that every group has some of the kernel's centre, faces, edges and corners.
  template <class C>
  __device__ int tap_of(int group, int j) const {
    const int set = j / C::block_taps;
    const int tap =
        (set * groups + (group + set / 4 * 2) % groups) * C::block_taps + j % C::block_taps;
    return tap < taps ? tap : -1;
  }
};

template <class Element, int taps_, int ins_, int columns_, int terms_ = 1>
struct Config {
  using T = Element;
  // Values of T whose sum an operand is: of f32 ones two or three bf16.
  static constexpr int terms = terms_;
  using Source = std::conditional_t<terms == 1, T, float>;
  static constexpr int taps = taps_;        // of a group
  static constexpr int ins = ins_;          // input channels: 16, 32, 64, 128 or 256
  static constexpr int columns = columns_;  // output channels
  // Batches are those of a schedule; else rows that have the tap are gathered into batches.
  static constexpr bool scheduled = taps > 1;
  // Zeros stand for absent rows; or terms of an infinite value are not its terms.
  static constexpr bool has_absent = scheduled || terms > 1;
  // Blocks of 64 columns that a tap fills, or taps that fill one.
  static constexpr int in_blocks = ins < 64 ? 1 : ins / 64;
  static constexpr int block_taps = ins < 64 ? 64 / ins : 1;
  static constexpr int width = 64 / block_taps;
  static constexpr int x_blocks = taps / block_taps * in_blocks;
  static constexpr int own_blocks = x_blocks / 2;  // of a consumer
  static constexpr int dy_blocks = columns < 64 ? 1 : columns / 64;
  static constexpr int sets = taps / block_taps;  // of taps that share blocks
  static constexpr int batch_bytes = (x_blocks + dy_blocks) * terms * 8192;
  static constexpr int piece_size = taps * ins * columns;
  // The input rows of each tap of a batch, and its output rows.
  static constexpr int slot_bytes = (taps + 1) * batch_rows * 4;
  // Without: batches that a warp of the indexers reads in a round; the queue has two rounds.
  static constexpr int chunks = 2;
  static constexpr int reads = chunks * batch_rows / 32;  // of a lane
  static constexpr int queue_rows = 2 * 4 * chunks * batch_rows + batch_rows;
  static constexpr int slots = !scheduled ? 2 : batch_bytes > 65536 ? 4 : 8;
  static constexpr int slots_bytes = scheduled ? slots * slot_bytes : queue_rows * 8;
  // Behind the batches and slots: barriers, notes and counts, of 8 batches at most.
  static constexpr int small_bytes = 20 * (slots + 8) + 32;
  static constexpr int room = (227 << 10) - 1024 - slots_bytes - small_bytes - 256;
  static constexpr int batches = room / batch_bytes < 8 ? room / batch_bytes : 8;
  // Batches start at a multiple of 1024, the swizzle's period.
  static constexpr int fixed_bytes = 1024 + batches * batch_bytes + slots_bytes + small_bytes;
  static constexpr int threads = 512;
  // Of consumers, and of producers and indexers: 65536 in all.
  static constexpr int consumer_registers =
      own_blocks * columns * (terms > 1 ? 3 : 1) > 128 ? 168 : 128;
  static constexpr int producer_registers = 256 - consumer_registers;
  static_assert(x_blocks % 2 == 0 && taps <= 16 && batches >= 3);
  // A team is worth its partial sums with so many rows, of one tap a group for every entry.
  static constexpr int rows_per_team = scheduled ? 256 : 512;
  // The work axis lies in shared memory behind the rest.
  static constexpr int most_taps = scheduled ? 32 : ((227 << 10) - fixed_bytes) / 8 - 2;
  static_assert(most_taps >= 32);
};

// ---- Who does what

// An axis on which entries lie one after the other, each as long as its work; the teams cut it into
// equal pieces. Of one tap a group an entry is a tap of one part of the channel blocks, its work
// rows to copy; else there is a single entry.
using AxisPlace = unsigned long long;

struct Axis {
  const Params& p;
  AxisPlace* starts;  // [entries + 1]

  // By one warp.
  __device__ void place() const {
    const int lane = threadIdx.x % 32;
    // Where rows are few it is their neighbours' reading that counts: never 0.
    const AxisPlace least = p.rows / 6 + 1;
    AxisPlace all = 0;
    for (int first = 0; first < p.entries; first += 32) {
      const int entry = first + lane;
      AxisPlace sum = 0;
      if (entry < p.entries) sum = max(AxisPlace(__ldg(p.pairs_per_tap + entry / p.parts)), least);
      unroll<5>([&](int i) {
        const AxisPlace other = __shfl_up_sync(0xffffffff, sum, 1 << i);
        if (lane >= 1 << i) sum += other;
      });
      if (entry < p.entries) starts[entry + 1] = all + sum;
      all += __shfl_sync(0xffffffff, sum, 31);
    }
    if (lane == 0) starts[0] = 0;
  }
  __device__ AxisPlace team_begin(int team) const { return starts[p.entries] * team / p.teams; }
  __device__ int team_of(AxisPlace place) const {
    return static_cast<int>(((place + 1) * p.teams - 1) / starts[p.entries]);
  }
  __device__ int entry_at(AxisPlace place) const {
    int entry = 0;
    while (starts[entry + 1] <= place) ++entry;
    return entry;
  }
};

// What a team does of an entry: with a schedule batches team, team + teams, ..; of one tap those
// whose place, batch * 0.618... modulo 1 in units of 2^-32, is in [low, low + span).
struct Piece {
  int group;
  int block;  // of channels; none is left for this CTA where it is >= Params::blocks
  bool whole = false;
  // Among the partial sums, unless whole: of the entry's first team teams + team, else team.
  int slot = 0;
  uint32_t low = 0;
  uint32_t span = 0;

  __device__ bool has(int batch) const { return whole || batch * 2654435769u - low < span; }
};
template <class C>
__device__ inline Piece piece_of(const Params& p, int entry, int member) {
  if (C::scheduled) return {.group = member / p.blocks, .block = member % p.blocks};
  return {.group = entry / p.parts, .block = entry % p.parts * p.members + member};
}

// Calls body(piece) for what this CTA does.
template <class C, class Body>
__device__ inline void for_pieces(const Axis& axis, const Body& body) {
  const Params& p = axis.p;
  const int team = static_cast<int>(blockIdx.x) / p.members;
  const int member = static_cast<int>(blockIdx.x) % p.members;
  if constexpr (C::scheduled) {
    Piece piece = piece_of<C>(p, 0, member);
    piece.whole = p.teams == 1;
    piece.slot = team == 0 ? p.teams : team;
    return body(piece);
  }
  const AxisPlace team_end = axis.team_begin(team + 1);
  AxisPlace at = axis.team_begin(team);
  for (int entry = axis.entry_at(at); at < team_end; ++entry) {
    const AxisPlace entry_begin = axis.starts[entry];
    const AxisPlace entry_end = axis.starts[entry + 1];
    const AxisPlace end = min(team_end, entry_end);
    // In units of 2^-32 of the entry. Not 0, where a last piece would have a span of 0, for none.
    const auto place_of = [&](AxisPlace place) {
      const AxisPlace part = (place - entry_begin << 32) / (entry_end - entry_begin);
      return static_cast<uint32_t>(max(part, AxisPlace{1}));
    };
    Piece piece = piece_of<C>(p, entry, member);
    piece.whole = at == entry_begin && end == entry_end;
    piece.slot = at == entry_begin ? p.teams + team : team;
    piece.low = at == entry_begin ? 0 : place_of(at);
    piece.span = (end == entry_end ? 0 : place_of(end)) - piece.low;
    if (piece.block < p.blocks) body(piece);
    at = end;
  }
}

// ---- What becomes of the sums of a piece: written, or left for add_pieces() to add

// Of one consumer thread. Those that go to Params::partials lie there as [own_blocks, columns / 8]
// [256 threads] [4], four consecutive sums of a thread together.
template <class C>
using Sums = float[C::own_blocks][C::columns / 2];

// Where d[m][4 * j] of a consumer thread belongs, in no tap where that is negative. Sum 2 * h + e
// behind it belongs to input channel in + 8 * h and output channel out + e.
struct Four {
  int thread;  // of 256
  int m;
  int j;
};
template <class C>
__device__ inline WeightPlace place_of(const Params& p, const Piece& piece, const Four& four) {
  const int row = four.thread % 128 / 32 * 16 + four.thread % 32 / 4;
  const int block = four.thread / 128 * C::own_blocks + four.m;
  return {p.tap_of<C>(piece.group, block / C::in_blocks * C::block_taps + row / C::width),
          piece.block / p.out_blocks * C::ins + block % C::in_blocks * 64 + row % C::width,
          piece.block % p.out_blocks * C::columns + 8 * four.j + four.thread % 4 * 2};
}
__device__ inline bool exists(const Params& p, const WeightPlace& at) {
  return at.tap >= 0 && at.in < p.c_in && at.out < p.c_out;
}

// Writes sums of a thread, of which d[0][0] is that of `first`, and those that are NaN again.
template <class C, int blocks, int count>
__device__ inline void write_sums(const Params& p,
                                  const Piece& piece,
                                  const Four& first,
                                  const float (&d)[blocks][count]) {
  using T = typename C::Source;
  const auto place = [&](int row, int column) {
    WeightPlace at = place_of<C>(p, piece, {first.thread, first.m + row / 2, first.j + column / 2});
    at.in += row % 2 * 8;
    at.out += column % 2;
    return at;
  };
  uint32_t broken = 0;  // of columns 8 * j + e, bit 2 * j + e
  const auto write = [&]<class Out>(Out* w) {
    unroll<2 * blocks>([&](int row) {
      const WeightPlace at = place(row, 0);
      if (!exists(p, at)) return;
      Out* const to = w + p.place_of(at);
      unroll<count / 2>([&](int i) {
        const int out = i / 2 * 8 + i % 2;
        const float sum = d[row / 2][i / 2 * 4 + row % 2 * 2 + i % 2];
        if (at.out + out < p.c_out) {
          to[out * p.w.out_stride] = Out(sum);
          broken |= static_cast<uint32_t>(isnan(sum)) << i;
        }
      });
    });
  };
  p.w.dtype == Dtype::f32 ? write(static_cast<float*>(p.w.data)) : write(static_cast<T*>(p.w.data));
  if constexpr (!C::has_absent) return;
  broken = __reduce_or_sync(0xffffffff, broken);
  for (; broken != 0; broken &= broken - 1) {
    for (int row = 0; row < 2 * blocks; ++row) {
      const WeightPlace at = place(row, __ffs(broken) - 1);
      if (exists(p, at)) p.finish_gradient<T>(at, NAN);
    }
  }
}

template <class C>
__device__ inline float* partials_of(const Params& p, int slot, int member) {
  return p.partials + (static_cast<int64_t>(slot) * p.members + member) * C::piece_size;
}

template <class C>
__device__ inline void finish_piece(const Params& p, const Piece& piece, const Sums<C>& d) {
  const int thread = static_cast<int>(threadIdx.x) - 256;
  if (piece.whole) return write_sums<C>(p, piece, {thread, 0, 0}, d);
  float* to = partials_of<C>(p, piece.slot, static_cast<int>(blockIdx.x) % p.members) + 4 * thread;
  unroll<C::own_blocks>([&](int m) {
    unroll<C::columns / 8>([&](int j) {
      *reinterpret_cast<float4*>(to + (m * C::columns / 8 + j) * 1024) =
          make_float4(d[m][4 * j], d[m][4 * j + 1], d[m][4 * j + 2], d[m][4 * j + 3]);
    });
  });
}

// Pieces that a thread reads at once.
constexpr int adds = 8;
constexpr int add_threads = 256;

// Row y of the grid: (entry, member) or, where entries are many, (boundary of two teams, member),
// the first boundary within an entry standing for it. Column x: four sums of all consumer threads.
template <class C>
__global__ void __launch_bounds__(add_threads) add_pieces(const __grid_constant__ Params p) {
  extern __shared__ AxisPlace starts[];
  const int member = static_cast<int>(blockIdx.y) % p.members;
  int entry = static_cast<int>(blockIdx.y) / p.members;
  int first_team = 0;
  int count = p.teams;
  if constexpr (!C::scheduled) {
    const Axis axis = {p, starts};
    if (threadIdx.x < 32) axis.place();
    __syncthreads();
    const int boundary = p.entries < p.teams ? -1 : entry;
    if (boundary >= 0) entry = axis.entry_at(axis.team_begin(boundary + 1));
    first_team = axis.team_of(starts[entry]);
    count = axis.team_of(starts[entry + 1] - 1) - first_team + 1;
    if (count == 1 || (boundary >= 0 && boundary != first_team)) return;
  }
  const Piece piece = piece_of<C>(p, entry, member);
  if (piece.block >= p.blocks) return;
  ptx::wait_for_last_launch();
  const int m = static_cast<int>(blockIdx.x) / (C::columns / 8);
  const int j = static_cast<int>(blockIdx.x) % (C::columns / 8);
  const auto load = [&](int i) {
    const int slot = first_team + i + (i == 0 ? p.teams : 0);
    const float* from = partials_of<C>(p, slot, member) + 1024 * blockIdx.x + 4 * threadIdx.x;
    return __ldcg(reinterpret_cast<const float4*>(from));
  };
  const float4 own = load(0);
  float sums[1][4] = {{own.x, own.y, own.z, own.w}};
  for (int i = 1; i < count; i += adds) {
    float4 more[adds];
    unroll<adds>([&](int t) { more[t] = i + t < count ? load(i + t) : make_float4(0, 0, 0, 0); });
    unroll<adds>([&](int t) { unroll<4>([&](int e) { sums[0][e] += (&more[t].x)[e]; }); });
  }
  write_sums<C>(p, piece, {static_cast<int>(threadIdx.x), m, j}, sums);
}

}  // namespace voxgemm::cuda::grad_weight_sm90
