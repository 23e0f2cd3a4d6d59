// SPDX-License-Identifier: Apache-2.0
#pragma once

// The tiles of a weight gradient on Hopper and who computes what of them; see grad_weight_sm90.cuh.

#include <cstdint>
#include <type_traits>

#include "cuda/kernels/pass.cuh"

namespace voxgemm::cuda::grad_weight_sm90 {

// Rows of a stage, and output rows that stay together: a quarter of a tile where rows come from a
// schedule.
constexpr int batch_rows = 64;
constexpr int tile_rows = 256;

// x and dy as they were given, which is what is read where sums are NaN.
struct Params : PassArgs {
  const long long* pairs_per_tap = nullptr;  // [taps]
  // As they are gathered, f32 in terms.
  const void* x_rows = nullptr;  // [n_in, c_in]
  uint32_t x_row_bytes = 0;
  const void* dy_rows = nullptr;  // [rows, c_out]
  uint32_t dy_row_bytes = 0;
  int groups = 0;
  // Of channels, output channels fastest. Without a schedule they are cut into `parts` of `members`
  // each.
  int out_blocks = 0;
  int blocks = 0;
  int members = 0;
  int parts = 0;
  int teams = 0;
  unsigned long long* starts = nullptr;  // [groups + 1], for add_pieces()
  float* partials = nullptr;             // [2 * teams, members, piece_size], see Sums

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
  static constexpr int x_bytes = x_blocks * terms * 8192;
  static constexpr int dy_blocks = columns < 64 ? 1 : columns / 64;
  // A unit of shared memory holds a batch; or, where batches have few of many taps (on shells 4.8
  // of 9 blocks), a block of one.
  static constexpr int sets = taps / block_taps;  // of taps that share blocks
  static constexpr bool packed = taps == 8 && ins == 64;
  static constexpr int unit_blocks = packed ? 1 : x_blocks + dy_blocks;
  static constexpr int unit_bytes = unit_blocks * terms * 8192;
  static constexpr int piece_size = taps * ins * columns;
  // With a schedule: a slot has the input rows of each tap of a batch, and its output rows. Loads
  // behind the copies of 200 kB in flight take 4000 clocks.
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
  // The places of all groups on the work axis lie in shared memory behind the rest.
  static constexpr int most_taps = scheduled ? 32 : ((227 << 10) - fixed_bytes) / 8 - 2;
  static_assert(most_taps >= 32);
};

// ---- Without a schedule: the work axis

// What a tap costs a CTA, in rows that it copies, or whose neighbours it reads where those are few:
// never 0.
__device__ __forceinline__ unsigned long long tap_work(const Params& p, int tap) {
  const long long pairs = max(__ldg(p.pairs_per_tap + tap), 0LL);
  return max(pairs, static_cast<long long>(p.rows) / 6 + 1);
}

// The axis is as long as the teams together, each 2^32.
constexpr int team_bits = 32;
using AxisPlace = unsigned long long;

// starts[g]: where group g, a tap, begins. By one warp.
__device__ __forceinline__ void place_groups(const Params& p, AxisPlace* starts) {
  const int lane = threadIdx.x % 32;
  unsigned long long all = 0;
  for (int first = 0; first < p.groups; first += 32) {
    const int group = first + lane;
    unsigned long long sum = group < p.groups ? tap_work(p, group) : 0;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const unsigned long long other = __shfl_up_sync(0xffffffff, sum, step);
      if (lane >= step) sum += other;
    }
    if (group < p.groups) starts[group + 1] = all + sum;
    all += __shfl_sync(0xffffffff, sum, 31);
  }
  if (lane == 0) starts[0] = 0;
  const AxisPlace end = static_cast<AxisPlace>(p.teams) << team_bits;
  const double scale = static_cast<double>(end) / static_cast<double>(all);
  for (int group = lane + 1; group < p.groups; group += 32) {
    starts[group] = static_cast<AxisPlace>(static_cast<double>(starts[group]) * scale);
  }
  __syncwarp();
  if (lane == 0) starts[p.groups] = end;
}

// A group of one part, as a stretch of the axis.
struct Entry {
  int group;
  int part;
  AxisPlace begin;
  AxisPlace end;
};

struct Axis {
  const Params& p;
  const AxisPlace* starts;  // [groups + 1]

  __device__ __forceinline__ Entry entry(int group, int part) const {
    const AxisPlace begin = starts[group];
    const AxisPlace length = starts[group + 1] - begin;
    if (p.parts == 1) return {group, 0, begin, begin + length};
    return {group, part, begin + length * part / p.parts, begin + length * (part + 1) / p.parts};
  }
  __device__ __forceinline__ Entry at(AxisPlace place) const {
    int low = 0;
    int high = p.groups;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (starts[middle] <= place ? low : high) = middle;
    }
    Entry found = entry(low, 0);
    for (int part = 1; place >= found.end; ++part) found = entry(low, part);
    return found;
  }
};

// What a team does of one group of taps: with a schedule, batches b = low modulo step; without, of
// one entry of the axis, those whose place, b * 0.618... modulo 1 in units of 2^-32, is in
// [low, low + span).
struct Piece {
  int group;
  int block;  // of channels; none is left for this CTA where it is >= Params::blocks
  bool whole;
  uint32_t low;
  uint32_t span;
  int step;
  int slot;         // among the partial sums, unless whole
  const int* taps;  // of the group, -1 behind the last; null: the group is its tap

  __device__ __forceinline__ bool has(uint32_t batch) const {
    return whole || batch * 2654435769u - low < span;
  }
  __device__ __forceinline__ int tap(int j) const { return taps != nullptr ? taps[j] : group; }
};

// The pieces of this CTA's team on the axis, in order.
class Pieces {
 public:
  __device__ __forceinline__ explicit Pieces(const Axis& axis)
      : axis_(axis),
        team_(blockIdx.x / axis.p.members),
        at_(static_cast<AxisPlace>(team_) << team_bits),
        end_(static_cast<AxisPlace>(team_ + 1) << team_bits) {}
  __device__ __forceinline__ bool next(Piece* piece) {
    if (at_ >= end_) return false;
    const Entry entry = axis_.at(at_);
    const int members = axis_.p.members;
    const AxisPlace end = min(end_, entry.end);
    piece->group = entry.group;
    piece->block = entry.part * members + static_cast<int>(blockIdx.x) % members;
    piece->whole = at_ == entry.begin && end == entry.end;
    piece->low = place_of(entry, at_);
    piece->span = (end == entry.end ? 0 : place_of(entry, end)) - piece->low;
    piece->slot = 2 * team_ + (at_ > entry.begin ? 0 : 1);
    piece->taps = nullptr;
    at_ = end;
    return true;
  }

 private:
  // Exact enough: the piece that ends here and the one that begins here agree on it. Never 0 within
  // an entry: a span of 0 stands for none, so the last piece must not begin there.
  __device__ __forceinline__ static uint32_t place_of(const Entry& entry, AxisPlace at) {
    if (at == entry.begin) return 0;
    const double part =
        static_cast<double>(at - entry.begin) / static_cast<double>(entry.end - entry.begin);
    return static_cast<uint32_t>(max(min(part * 4294967296.0, 4294967295.0), 1.0));
  }

  Axis axis_;
  int team_;
  AxisPlace at_;
  AxisPlace end_;
};

// ---- With a schedule: a member of a team for every group and block

// The taps of all groups, -1 behind the last of one. Taps with many pairs and with few are dealt
// out so that groups are alike. By one warp.
template <class C>
__device__ __forceinline__ void deal_taps(const Params& p, int* taps) {
  const int lane = threadIdx.x % 32;
  for (int i = lane; i < p.groups * C::taps; i += 32) taps[i] = -1;
  __syncwarp();
  const long long pairs = lane < p.taps ? __ldg(p.pairs_per_tap + lane) : -1;
  int rank = 0;
  for (int other = 0; other < p.taps; ++other) {
    const long long theirs = __shfl_sync(0xffffffff, pairs, other);
    rank += theirs > pairs || (theirs == pairs && other < lane) ? 1 : 0;
  }
  if (lane < p.taps) {
    const int round = rank / p.groups;
    const int turn = rank % p.groups;
    taps[(round % 2 == 0 ? turn : p.groups - 1 - turn) * C::taps + round] = lane;
  }
  __syncwarp();
}

// Of this CTA.
template <class C>
__device__ __forceinline__ Piece piece_of_member(const Params& p, const int* taps) {
  const int member = static_cast<int>(blockIdx.x) % p.members;
  const int team = static_cast<int>(blockIdx.x) / p.members;
  const int group = member / p.blocks;
  return {.group = group,
          .block = member % p.blocks,
          .whole = p.teams == 1,
          .low = static_cast<uint32_t>(team),
          .span = 0,
          .step = p.teams,
          .slot = team,
          .taps = taps + group * C::taps};
}

// The batches of a piece in rising order. By a whole warp.
class Batches {
 public:
  __device__ __forceinline__ Batches(const Params& p, const Piece& piece)
      : piece_(piece), count_(p.batches(false)) {}
  // -1 after the last.
  __device__ __forceinline__ int next() {
    while (found_ == 0) {
      if (base_ >= count_) return -1;
      const int batch = base_ + static_cast<int>(threadIdx.x % 32);
      found_ = __ballot_sync(0xffffffff, batch < count_ && piece_.has(batch));
      base_ += 32;
    }
    const int bit = __ffs(found_) - 1;
    found_ &= found_ - 1;
    return base_ - 32 + bit;
  }

 private:
  const Piece& piece_;
  int count_;
  int base_ = 0;
  uint32_t found_ = 0;
};

}  // namespace voxgemm::cuda::grad_weight_sm90
