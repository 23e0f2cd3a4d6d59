// SPDX-License-Identifier: Apache-2.0
#pragma once

// The tiles of a weight gradient on Hopper and who computes what of them; see grad_weight_sm90.cuh.

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
  // [groups, taps of a group], -1 behind the last; of one tap a group only the first is said.
  int8_t group_taps[32] = {};
  // Of channels, output channels fastest. Of one tap a group they are cut into `parts` of `members`
  // each.
  int out_blocks = 0;
  int blocks = 0;
  int members = 0;
  int parts = 0;
  int teams = 0;
  float* partials = nullptr;  // [teams or 2 * teams, members, piece_size], see Sums

  template <class C>
  __device__ int tap_of(int group, int j) const {
    return C::taps == 1 ? group : group_taps[group * C::taps + j];
  }
  // Of the schedule's tiles, or of the rows as they are.
  __host__ __device__ int batches(bool scheduled) const {
    const int64_t rows_of_unit = scheduled ? tile_rows : batch_rows;
    return static_cast<int>((rows + rows_of_unit - 1) / rows_of_unit * rows_of_unit / batch_rows);
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
  // A unit of shared memory holds a batch; or, where batches have few of many taps (on shells 4.8
  // of 9 blocks), a block of one.
  static constexpr int sets = taps / block_taps;  // of taps that share blocks
  static constexpr bool packed = taps == 8 && ins == 64;
  static constexpr int unit_blocks = packed ? 1 : x_blocks + dy_blocks;
  static constexpr int unit_bytes = unit_blocks * terms * 8192;
  static constexpr int piece_size = taps * ins * columns;
  // A slot has the input rows of each tap of a batch, and its output rows. Loads behind the copies
  // of 200 kB in flight take 4000 clocks.
  static constexpr int slot_bytes = (taps + 1) * batch_rows * 4;
  // Without: batches that a warp of the indexers reads in a round; the queue has two rounds.
  static constexpr int chunks = 2;
  static constexpr int reads = chunks * batch_rows / 32;  // of a lane
  static constexpr int queue_rows = 2 * 4 * chunks * batch_rows + batch_rows;
  static constexpr int slots = !scheduled ? 2 : unit_bytes > 65536 ? 4 : 8;
  static constexpr int slots_bytes = scheduled ? slots * slot_bytes : queue_rows * 8;
  // Behind the units and slots: barriers, notes and counts, of 8 batches at most.
  static constexpr int small_bytes = 20 * (slots + 8) + 32;
  static constexpr int room = (227 << 10) - 1024 - slots_bytes - small_bytes - 256;
  static constexpr int units = room / unit_bytes < 31 ? room / unit_bytes : 31;
  static constexpr int batches = packed || units > 8 ? 8 : units;  // copied and not multiplied
  // Units start at a multiple of 1024, the swizzle's period.
  static constexpr int fixed_bytes = 1024 + units * unit_bytes + slots_bytes + small_bytes;
  static constexpr int threads = 512;
  // Of consumers, and of producers and indexers: 65536 in all.
  static constexpr int consumer_registers =
      own_blocks * columns * (terms > 1 ? 3 : 1) > 128 ? 168 : 128;
  static constexpr int producer_registers = 256 - consumer_registers;
  static_assert(x_blocks % 2 == 0 && taps <= 16 && units >= (packed ? 2 * (sets + 1) : 3));
  // The places of all taps on the work axis lie in shared memory behind the rest.
  static constexpr int most_taps = scheduled ? 32 : ((227 << 10) - fixed_bytes) / 8 - 2;
  static_assert(most_taps >= 32);
};

// ---- One tap a group: the work axis

// Where taps lie on an axis of rows to copy, each as long as its work for every part of the channel
// blocks, one after the other; the teams cut it into equal pieces.
using AxisPlace = unsigned long long;

// starts[t]: where tap t begins. By one warp.
__device__ __forceinline__ void place_taps(const Params& p, AxisPlace* starts) {
  const int lane = threadIdx.x % 32;
  AxisPlace all = 0;
  for (int first = 0; first < p.taps; first += 32) {
    const int tap = first + lane;
    AxisPlace sum = 0;
    // In rows that are copied, or whose neighbours are read where those are few: never 0.
    const int64_t least = p.rows / 6 + 1;
    if (tap < p.taps) sum = max(int64_t{__ldg(p.pairs_per_tap + tap)}, least) * p.parts;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const AxisPlace other = __shfl_up_sync(0xffffffff, sum, step);
      if (lane >= step) sum += other;
    }
    if (tap < p.taps) starts[tap + 1] = all + sum;
    all += __shfl_sync(0xffffffff, sum, 31);
  }
  if (lane == 0) starts[0] = 0;
}

// A tap of one part, as a stretch of the axis.
struct Entry {
  int tap;
  int part;
  AxisPlace begin;
  AxisPlace end;
};

struct Axis {
  const Params& p;
  const AxisPlace* starts;  // [taps + 1]

  __device__ __forceinline__ AxisPlace team_begin(int team) const {
    return starts[p.taps] * team / p.teams;
  }
  __device__ __forceinline__ int team_of(AxisPlace place) const {
    return static_cast<int>(((place + 1) * p.teams - 1) / starts[p.taps]);
  }
  __device__ __forceinline__ Entry entry(int tap, int part) const {
    const AxisPlace length = (starts[tap + 1] - starts[tap]) / p.parts;
    const AxisPlace begin = starts[tap] + part * length;
    return {tap, part, begin, begin + length};
  }
  __device__ __forceinline__ Entry at(AxisPlace place) const {
    int low = 0;
    int high = p.taps;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (starts[middle] <= place ? low : high) = middle;
    }
    const AxisPlace length = (starts[low + 1] - starts[low]) / p.parts;
    return entry(low, static_cast<int>((place - starts[low]) / length));
  }
};

// What a team does of a group of taps: batches first, first + step, ..; of one tap those whose
// place, batch * 0.618... modulo 1 in units of 2^-32, is in [low, low + span).
struct Piece {
  int group;
  int block;  // of channels; none is left for this CTA where it is >= Params::blocks
  bool whole;
  int slot;  // among the partial sums, unless whole
  int first = 0;
  int step = 1;
  uint32_t low = 0;
  uint32_t span = 0;

  __device__ __forceinline__ bool has(int batch) const {
    return whole || batch * 2654435769u - low < span;
  }
};

// Calls body(piece) for what this CTA does.
template <class C, class Body>
__device__ __forceinline__ void for_pieces(const Params& p,
                                           const AxisPlace* starts,
                                           const Body& body) {
  const int team = static_cast<int>(blockIdx.x) / p.members;
  const int member = static_cast<int>(blockIdx.x) % p.members;
  if constexpr (C::scheduled) {
    body(Piece{.group = member / p.blocks,
               .block = member % p.blocks,
               .whole = p.teams == 1,
               .slot = team,
               .first = team,
               .step = p.teams});
    return;
  }
  const Axis axis = {p, starts};
  const AxisPlace team_end = axis.team_begin(team + 1);
  for (AxisPlace at = axis.team_begin(team); at < team_end;) {
    const Entry entry = axis.at(at);
    const AxisPlace end = min(team_end, entry.end);
    // Exact enough: the piece that ends here and the one that begins here agree on it. Never 0
    // within an entry: a span of 0 stands for none, so the last piece must not begin there.
    const auto place_of = [&](AxisPlace place) {
      const double part = static_cast<double>(place - entry.begin) /
                          static_cast<double>(entry.end - entry.begin) * 4294967296.0;
      return static_cast<uint32_t>(max(min(part, 4294967295.0), 1.0));
    };
    const uint32_t low = at == entry.begin ? 0 : place_of(at);
    const Piece piece = {.group = entry.tap,
                         .block = entry.part * p.members + member,
                         .whole = at == entry.begin && end == entry.end,
                         .slot = 2 * team + (at > entry.begin ? 0 : 1),
                         .low = low,
                         .span = (end == entry.end ? 0 : place_of(end)) - low};
    if (piece.block < p.blocks) body(piece);
    at = end;
  }
}

}  // namespace voxgemm::cuda::grad_weight_sm90
