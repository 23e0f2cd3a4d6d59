// SPDX-License-Identifier: Apache-2.0
#pragma once

// The tiles of a weight gradient on Hopper and who computes what of them; see
// grad_weight_sm90.cuh.

#include <cstdint>

namespace voxgemm::cuda::grad_weight_sm90 {

// The places of all groups on the work axis lie in shared memory beside the
// stages.
constexpr int most_taps = 2048;
// Output rows that stay together.
constexpr int chunk_rows = 64;
// Of a stage.
constexpr int batch_rows = 64;

struct Params {
  const int32_t* neighbours = nullptr;       // [taps, rows]
  const long long* pairs_per_tap = nullptr;  // [taps]
  int64_t rows = 0;
  int taps = 0;
  const void* x = nullptr;  // [n_in, c_in]
  uint32_t x_row_bytes = 0;
  int c_in = 0;
  const void* dy = nullptr;  // [rows, c_out]
  uint32_t dy_row_bytes = 0;
  int c_out = 0;
  int groups = 0;
  // The channel blocks of dw, output channels fastest, are cut into `parts` of
  // `members` each.
  int out_blocks = 0;
  int blocks = 0;
  int members = 0;
  int parts = 0;
  int teams = 0;
  unsigned long long* starts = nullptr;  // [groups + 1], for add_pieces()
  bool few_entries = false;              // fewer than teams
  float* partials = nullptr;             // [2 * teams, members, piece_size], see Sums
  void* dw = nullptr;
  int64_t tap_stride = 0;
  int64_t in_stride = 0;
  int64_t out_stride = 0;
  bool dw_is_f32 = false;
};

template <class Element, int taps_, int ins_, int columns_>
struct Config {
  using T = Element;
  static constexpr int taps = taps_;        // of a group
  static constexpr int ins = ins_;          // input channels: 16, 32, 64 or 128
  static constexpr int columns = columns_;  // output channels
  // As many as there is room for.
  static constexpr int stages = taps == 4 && columns == 128 ? 3 : 4;
  // Blocks of 64 columns that a tap fills, or taps that fill one.
  static constexpr int in_blocks = ins < 64 ? 1 : ins / 64;
  static constexpr int block_taps = ins < 64 ? 64 / ins : 1;
  static constexpr int width = 64 / block_taps;
  static constexpr int x_blocks = taps / block_taps * in_blocks;
  static constexpr int own_blocks = x_blocks / 2;  // of a consumer
  static constexpr int x_bytes = x_blocks * 8192;
  static constexpr int dy_blocks = columns < 64 ? 1 : columns / 64;
  static constexpr int stage_bytes = x_bytes + dy_blocks * 8192;
  static constexpr int piece_size = taps * ins * columns;
  // Queues: rows with taps in both halves of the group, in the first, in the
  // second.
  static constexpr int queues = taps == 1 ? 1 : 3;
  // That a warp of the indexers reads in a round. There are two rounds at once
  // in the queues.
  static constexpr int chunks = taps == 1 ? 2 : 1;
  static constexpr int reads = chunks * chunk_rows / 32;  // of a lane
  static constexpr int queue_rows = 2 * 4 * chunks * chunk_rows + batch_rows;
  static constexpr int queue_bytes = queues * (taps + 1) * queue_rows * 4;
  // Stages start at a multiple of 1024, the swizzle's period. Behind them:
  // queues, barriers, notes and counts.
  static constexpr int fixed_bytes =
      1024 + stages * stage_bytes + queue_bytes + 16 * (stages + 2) + 16 * stages + 64;
  // That the indexers read ahead: behind the copies of all stages, 190 kB in flight, their loads
  // take 4000 clocks, in which the copying warps need two or three rounds.
  static constexpr int rounds_ahead = taps > 2 ? 3 : 4;
  static constexpr int threads = 512;
  // Of producers and indexers, and of consumers: 65536 in all.
  static constexpr int producer_registers = taps == 8 ? 120 : piece_size == 4 * 64 * 64 ? 104 : 72;
  static constexpr int consumer_registers = 256 - producer_registers;
  static_assert(x_blocks % 2 == 0 && (taps == 1 || taps / 2 % block_taps == 0) &&
                queue_rows % batch_rows == 0);
  static_assert(fixed_bytes + 8 * (most_taps / taps + 1) <= 227 << 10);
};

// What a group costs a CTA, in rows of blocks that it copies (absent ones cost as much), or in rows
// whose neighbours it reads where those are few: never 0. How many rows have any of several taps
// lies between the largest of them and their sum; the middle is within 15% on surfaces.
template <class C>
__device__ __forceinline__ unsigned long long group_work(const Params& p, int group) {
  long long any[2] = {};
  constexpr int half = C::taps == 1 ? 1 : C::taps / 2;
  const auto middle = [&](long long largest, long long sum) {
    return (largest + min(sum, static_cast<long long>(p.rows))) / 2;
  };
#pragma unroll
  for (int h = 0; h < C::taps / half; ++h) {
    long long sum = 0;
    long long largest = 0;
#pragma unroll
    for (int j = 0; j < half; ++j) {
      const int tap = group * C::taps + h * half + j;
      const long long pairs = tap < p.taps ? max(__ldg(p.pairs_per_tap + tap), 0LL) : 0;
      sum += pairs;
      largest = max(largest, pairs);
    }
    any[h] = middle(largest, sum);
  }
  const long long rows = C::taps == 1 ? any[0] : middle(max(any[0], any[1]), any[0] + any[1]);
  const long long copies =
      rows * C::dy_blocks + (any[0] + any[1]) * (C::taps == 1 ? C::x_blocks : C::own_blocks);
  return max(copies, static_cast<long long>(p.rows));
}

// The axis is as long as the teams together, each 2^32.
constexpr int team_bits = 32;
using AxisPlace = unsigned long long;

// starts[g]: where group g begins. By one warp.
template <class C>
__device__ __forceinline__ void place_groups(const Params& p, AxisPlace* starts) {
  const int lane = threadIdx.x % 32;
  unsigned long long all = 0;
  for (int first = 0; first < p.groups; first += 32) {
    const int group = first + lane;
    unsigned long long sum = group < p.groups ? group_work<C>(p, group) : 0;
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

__device__ __forceinline__ Entry entry_of(const Params& p,
                                          const AxisPlace* starts,
                                          int group,
                                          int part) {
  const AxisPlace begin = starts[group];
  const AxisPlace length = starts[group + 1] - begin;
  if (p.parts == 1) return {group, 0, begin, begin + length};
  return {group, part, begin + length * part / p.parts, begin + length * (part + 1) / p.parts};
}

__device__ __forceinline__ Entry entry_at(const Params& p,
                                          const AxisPlace* starts,
                                          AxisPlace place) {
  int low = 0;
  int high = p.groups;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (starts[middle] <= place ? low : high) = middle;
  }
  Entry entry = entry_of(p, starts, low, 0);
  for (int part = 1; place >= entry.end; ++part) entry = entry_of(p, starts, low, part);
  return entry;
}

// What a team does of one entry: the chunks c whose place, c * 0.618... modulo
// 1 in units of 2^-32, is in [low, low + span).
struct Piece {
  int group;
  int block;  // of channels; none is left for this CTA where it is >=
              // Params::blocks
  bool whole;
  uint32_t low;
  uint32_t span;
  int slot;  // among the partial sums, unless whole

  __device__ __forceinline__ bool has(uint32_t chunk) const {
    return whole || chunk * 2654435769u - low < span;
  }
};

// The pieces of this CTA's team, in order.
class Pieces {
 public:
  __device__ __forceinline__ Pieces(const Params& p, const AxisPlace* starts)
      : p_(p),
        starts_(starts),
        team_(blockIdx.x / p.members),
        at_(static_cast<AxisPlace>(team_) << team_bits),
        end_(static_cast<AxisPlace>(team_ + 1) << team_bits) {}
  __device__ __forceinline__ bool next(Piece* piece) {
    if (at_ >= end_) return false;
    const Entry entry = entry_at(p_, starts_, at_);
    const AxisPlace end = min(end_, entry.end);
    piece->group = entry.group;
    piece->block = entry.part * p_.members + static_cast<int>(blockIdx.x) % p_.members;
    piece->whole = at_ == entry.begin && end == entry.end;
    piece->low = place_of(entry, at_);
    piece->span = (end == entry.end ? 0 : place_of(entry, end)) - piece->low;
    piece->slot = 2 * team_ + (at_ > entry.begin ? 0 : 1);
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

  const Params& p_;
  const AxisPlace* starts_;
  int team_;
  AxisPlace at_;
  AxisPlace end_;
};

// The chunks of a piece in rising order. By a whole warp.
class Chunks {
 public:
  __device__ __forceinline__ Chunks(const Params& p, const Piece& piece)
      : piece_(piece), count_(static_cast<int>((p.rows + chunk_rows - 1) / chunk_rows)) {}
  // -1 after the last.
  __device__ __forceinline__ int next() {
    while (found_ == 0) {
      if (base_ >= count_) return -1;
      const int chunk = base_ + static_cast<int>(threadIdx.x % 32);
      found_ = __ballot_sync(0xffffffff, chunk < count_ && piece_.has(chunk));
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
