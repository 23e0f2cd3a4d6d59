// SPDX-License-Identifier: Apache-2.0
#pragma once

// Weight gradient on Hopper: dw[t] [c_in, c_out] = sum over pairs (i, o, t) of x[i]^T dy[o], 16-bit
// operands, f32 sums, straight from the map's neighbour table.
//
// Work. A CTA computes a tile of dw: `taps` taps (a group) x `ins` input channels x `columns`
// output channels, over some of the output rows. Several taps of a group share the rows of dy they
// read, which pays where few channels make the reading of rows the limit. The CTAs of a team
// (consecutive, so that their equal reads merge) compute different channel blocks over the same
// rows. All groups stand on one axis, each as long as its work, estimated from the map's pairs per
// tap; a team takes an equal piece of the axis. A group that is cut is divided by chunks of rows,
// spread evenly: chunk c lies at the fraction of c * 0.618... within its group, so that the pieces
// are alike, and all teams walk over the rows together and meet in the second-level cache. What a
// team does not do alone is left as f32 partial sums, which add_pieces() adds in the order of
// teams. Nothing depends on timing.
//
// Pairs. Warpgroup 0 produces: in rounds its warps read the neighbours of some chunks and append
// the rows that have a tap to queues in shared memory, one queue for each set of halves of the
// group that a row has (both; the first; the second). 64 rows of a queue are a batch, so absent
// pairs cost nothing where the group is one tap or two, and little where it is four.
//
// A stage is a batch: blocks of 64 rows x 64 channels (128 bytes a row, 128-byte swizzle: 16-byte
// piece p of row r lies at piece p ^ (r & 7)):
//   X  [taps, ins / 64] blocks: rows of x, gathered by cp.async, eight lanes a row; the halves of
//      the group that the batch has
//   dY [columns / 64] blocks
// Both operands have their channels contiguous ("MN-major") and the rows are the sum's index, so
// nothing is transposed. Consumer warpgroup w multiplies half w of the X blocks with all of dY:
// half of the taps, or with one tap half of its channels.
//
// Synchronisation: `full` of a stage gets one arrival from every producer thread when its copies
// have landed and one after the stage's note is written; `free` one from every consumer warp. The
// note says which halves are there and whether a team's piece ends. cp.async writes through the
// generic proxy and wgmma reads through the asynchronous one, hence the consumers' fence. A
// consumer that skips a batch first drains what it multiplies, or the ring would stop in a run of
// skips.
//
// Rows past the end of a batch are zeros on both sides. A row that has only some taps of a half is
// zero on the side of x alone, and zero times an infinite dy is NaN, which an absent pair must not
// make: a warp with NaN among its sums computes those once more, over present pairs only
// (repair()).

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/copy.cuh"
#include "cuda/ptx/wgmma.cuh"

namespace voxgemm::cuda::grad_weight_sm90 {

// Output rows that stay together; 32 lanes read four of them each.
constexpr int chunk_rows = 128;
constexpr int batch_rows = 64;

// Where sums go: dw, or a piece's room among the partial sums.
struct Target {
  void* data = nullptr;
  int64_t tap_stride = 0;
  int64_t in_stride = 0;
  int64_t out_stride = 0;
};

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
  // The channel blocks of dw, output channels fastest, are cut into `parts` of `members` each.
  int out_blocks = 0;
  int blocks = 0;
  int members = 0;
  int parts = 0;
  int teams = 0;
  unsigned long long* starts = nullptr;  // [groups + 1], for add_pieces()
  // [2 * teams, members, taps of a group, tile], a tile's strides as `piece` says.
  float* partials = nullptr;
  Target piece;
  Target dw;
  bool dw_is_f32 = false;
};

template <class Element, int taps_, int in_blocks_, int columns_, int stages_>
struct Config {
  using T = Element;
  static constexpr int taps = taps_;            // of a group
  static constexpr int in_blocks = in_blocks_;  // of 64 input channels, a tap
  static constexpr int columns = columns_;      // output channels
  static constexpr int stages = stages_;
  static constexpr int ins = in_blocks * 64;
  static constexpr int x_blocks = taps * in_blocks;
  static constexpr int own_blocks = x_blocks / 2;  // of a consumer
  static constexpr int x_bytes = x_blocks * 8192;
  static constexpr int stage_bytes = x_bytes + columns * 128;
  static constexpr int piece_size = taps * ins * columns;
  // Queues: rows with taps in both halves of the group, in the first, in the second.
  static constexpr int queues = taps == 1 ? 1 : 3;
  // Of a producer warp in a round. Longer rounds wait for the other warps less often, and take
  // registers and shared memory.
  static constexpr int chunks = taps == 1 ? 2 : 1;
  static constexpr int reads = chunks * chunk_rows / 32;
  static constexpr int queue_rows = 4 * chunks * chunk_rows + batch_rows;
  static constexpr int queue_bytes = queues * (taps + 1) * queue_rows * 4;
  // Stages start at a multiple of 1024, the swizzle's period. Behind them: queues, counts of a
  // round, barriers, notes.
  static constexpr int fixed_bytes =
      1024 + stages * stage_bytes + queue_bytes + 4 * queues * 4 + 16 * stages + 8 * stages;
  static constexpr int threads = 384;
  static constexpr int producer_registers = 80;
  static constexpr int consumer_registers = 216;
  static_assert(x_blocks % 2 == 0 && queue_rows % batch_rows == 0);
};

struct Shared {
  uint32_t stages;  // addresses in shared memory
  uint32_t full;
  uint32_t free;
  int32_t* queues;             // [queues, taps + 1, queue_rows]: input rows of the taps, output row
  int* counts;                 // [4 warps, queues]
  uint32_t* notes;             // [stages]
  unsigned long long* starts;  // [groups + 1]: the groups on the axis of one part
};

// Bits 0 and 1 of a note: the halves that are there.
constexpr uint32_t note_end = 4;

// ---- The axis
// ------------------------------------------------------------------------------------

// Bytes gathered for a group, up to a factor, and what its neighbours cost to read: never 0. How
// many rows have any of its taps lies between the largest tap and the sum of all; the middle is
// within 15% on surfaces.
template <class C>
__device__ __forceinline__ unsigned long long group_work(const Params& p, int group) {
  long long sum = 0;
  long long largest = 0;
  for (int tap = group * C::taps; tap < min(p.taps, (group + 1) * C::taps); ++tap) {
    const long long pairs = min(max(p.pairs_per_tap[tap], 0LL), static_cast<long long>(p.rows));
    sum += pairs;
    largest = max(largest, pairs);
  }
  const long long any = (largest + min(sum, static_cast<long long>(p.rows))) / 2;
  return sum * C::ins + any * C::columns + p.rows * 16;
}

// starts[g] = the work of the groups before g. By one warp.
template <class C>
__device__ __forceinline__ void place_groups(const Params& p, unsigned long long* starts) {
  const int lane = threadIdx.x % 32;
  unsigned long long before = 0;
  for (int first = 0; first < p.groups; first += 32) {
    const int group = first + lane;
    unsigned long long sum = group < p.groups ? group_work<C>(p, group) : 0;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const unsigned long long other = __shfl_up_sync(0xffffffff, sum, step);
      if (lane >= step) sum += other;
    }
    if (group < p.groups) starts[group + 1] = before + sum;
    before += __shfl_sync(0xffffffff, sum, 31);
  }
  if (lane == 0) starts[0] = 0;
}

// Where the piece of a team begins on the axis; that of `teams` is the axis's end.
__device__ __forceinline__ unsigned long long team_begin(const Params& p,
                                                         unsigned long long axis,
                                                         int team) {
  return axis * team / p.teams;
}

// A group of one part, as a stretch of the axis.
struct Entry {
  int group;
  int part;
  unsigned long long begin;
  unsigned long long end;
};

__device__ __forceinline__ Entry entry_at(const Params& p,
                                          const unsigned long long* starts,
                                          unsigned long long place) {
  int low = 0;
  int high = p.groups;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (starts[middle] * p.parts <= place ? low : high) = middle;
  }
  const unsigned long long first = starts[low] * p.parts;
  const unsigned long long length = starts[low + 1] - starts[low];
  const int part = static_cast<int>((place - first) / length);
  return {low, part, first + part * length, first + (part + 1) * length};
}

// What a team does of one entry: the chunks c whose place, c * 0.618... modulo 1 in units of 2^-32,
// is in [low, low + span).
struct Piece {
  int group;
  int block;  // of channels; none is left for this CTA where it is >= Params::blocks
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
  __device__ __forceinline__ Pieces(const Params& p, const unsigned long long* starts)
      : p_(p), starts_(starts), team_(blockIdx.x / p.members) {
    const unsigned long long axis = starts[p.groups] * p.parts;
    at_ = team_begin(p, axis, team_);
    end_ = team_begin(p, axis, team_ + 1);
  }
  __device__ __forceinline__ bool next(Piece* piece) {
    if (at_ >= end_) return false;
    const Entry entry = entry_at(p_, starts_, at_);
    const unsigned long long end = min(end_, entry.end);
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
  // Exact enough: the piece that ends here and the one that begins here agree on it.
  __device__ __forceinline__ static uint32_t place_of(const Entry& entry, unsigned long long at) {
    const double part =
        static_cast<double>(at - entry.begin) / static_cast<double>(entry.end - entry.begin);
    return static_cast<uint32_t>(min(part * 4294967296.0, 4294967295.0));
  }

  const Params& p_;
  const unsigned long long* starts_;
  int team_;
  unsigned long long at_;
  unsigned long long end_;
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

// ---- The producer
// --------------------------------------------------------------------------------

template <int stages>
struct Ring {
  int stage = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void next() {
    if (++stage == stages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// Neighbours that a lane holds for a round: of row i * 32 + lane of the warp's chunks.
template <class C>
struct Round {
  int in[C::taps][C::reads];
  int out[C::reads];
};

// Whether there was a chunk left.
template <class C>
__device__ __forceinline__ bool read_round(const Params& p,
                                           const Piece& piece,
                                           Chunks* chunks,
                                           Round<C>* round) {
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  bool any = false;
#pragma unroll
  for (int part = 0; part < C::chunks; ++part) {
    int mine = -1;
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const int chunk = chunks->next();
      any = any || chunk >= 0;
      if (w == warp) mine = chunk;
    }
#pragma unroll
    for (int i = 0; i < chunk_rows / 32; ++i) {
      const int64_t row = static_cast<int64_t>(mine) * chunk_rows + i * 32 + lane;
      const int at = part * (chunk_rows / 32) + i;
      round->out[at] = static_cast<int>(row);
#pragma unroll
      for (int j = 0; j < C::taps; ++j) {
        const int tap = piece.group * C::taps + j;
        const bool there = mine >= 0 && row < p.rows && tap < p.taps;
        round->in[j][at] = there ? __ldg(p.neighbours + tap * p.rows + row) : -1;
      }
    }
  }
  return any;
}

// Queue positions; all producer threads hold the same.
template <class C>
struct Queues {
  int head[C::queues] = {};
  int count[C::queues] = {};
};

__device__ __forceinline__ int wrapped(int at, int size) { return at >= size ? at - size : at; }

template <class C>
__device__ __forceinline__ void append(const Shared& shared,
                                       const Round<C>& round,
                                       Queues<C>* queues) {
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  int own[C::queues] = {};  // rows of this warp
  int queue[C::reads];      // of this lane's rows, or -1
  int place[C::reads];      // within the warp's rows
#pragma unroll
  for (int i = 0; i < C::reads; ++i) {
    bool first = false;
    bool second = false;
#pragma unroll
    for (int j = 0; j < C::taps; ++j) {
      (2 * j < C::taps ? first : second) |= round.in[j][i] >= 0;
    }
    queue[i] = first ? (second || C::taps == 1 ? 0 : 1) : second ? 2 : -1;
#pragma unroll
    for (int q = 0; q < C::queues; ++q) {
      const uint32_t votes = __ballot_sync(0xffffffff, queue[i] == q);
      if (queue[i] == q) place[i] = own[q] + __popc(votes & ((1u << lane) - 1));
      own[q] += __popc(votes);
    }
  }
#pragma unroll
  for (int q = 0; q < C::queues; ++q) {
    if (lane == q) shared.counts[warp * C::queues + q] = own[q];
  }
  // Also: every warp has read its rows of the batches before, whose places are taken now.
  ptx::named_barrier(1, 128);
#pragma unroll
  for (int q = 0; q < C::queues; ++q) {
    int before = 0;
    int all = 0;
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const int count = shared.counts[w * C::queues + q];
      if (w < warp) before += count;
      all += count;
    }
    const int begin = queues->head[q] + queues->count[q] + before;
    int32_t* to = shared.queues + q * (C::taps + 1) * C::queue_rows;
#pragma unroll
    for (int i = 0; i < C::reads; ++i) {
      if (queue[i] != q) continue;
      const int at = wrapped(wrapped(begin, C::queue_rows) + place[i], C::queue_rows);
#pragma unroll
      for (int j = 0; j < C::taps; ++j) to[j * C::queue_rows + at] = round.in[j][i];
      to[C::taps * C::queue_rows + at] = round.out[i];
    }
    queues->count[q] += all;
  }
  ptx::named_barrier(1, 128);
}

// What a producer thread copies of an operand: a 16-byte piece of four rows of every block.
struct Operand {
  const char* data;  // at the thread's piece of the tile's first channels
  uint32_t row_bytes;
  int left;  // channels from there to the end
};

__device__ __forceinline__ Operand operand(const void* data,
                                           uint32_t row_bytes,
                                           int channel,
                                           int channels) {
  channel += threadIdx.x % 8 * 8;
  return {static_cast<const char*>(data) + 2 * static_cast<int64_t>(channel), row_bytes,
          channels - channel};
}

template <class C>
struct Producer {
  const Params& p;
  const Shared& shared;
  Ring<C::stages> ring;
  Queues<C> queues;

  __device__ __forceinline__ uint32_t claim_stage() const {
    ptx::barrier_wait(shared.free + 8 * ring.stage, ring.parity ^ 1);
    return shared.stages + ring.stage * C::stage_bytes;
  }
  __device__ __forceinline__ void finish_stage(uint32_t note) {
    const uint32_t full = shared.full + 8 * ring.stage;
    ptx::copies_arrive(full);
    if (threadIdx.x == 0) {
      shared.notes[ring.stage] = note;
      ptx::barrier_arrive(full);
    }
    ring.next();
  }

  // Four rows of `blocks` blocks of a stage, of this thread's piece.
  template <int blocks>
  __device__ __forceinline__ void copy_rows(uint32_t to, const Operand& from, const int4& rows) {
    const int piece = threadIdx.x % 8;
    const int first = threadIdx.x / 8 * 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = i == 0 ? rows.x : i == 1 ? rows.y : i == 2 ? rows.z : rows.w;
      const uint32_t at = to + (first + i) * 128 + ((piece ^ ((first + i) & 7)) << 4);
#pragma unroll
      for (int b = 0; b < blocks; ++b) {
        ptx::gather_16(at + b * 8192, from.data + b * 128, row, from.row_bytes,
                       b * 64 >= from.left);
      }
    }
  }

  // The first `count` rows of a queue, at most 64.
  template <int queue>
  __device__ __forceinline__ void copy_batch(const Operand& x, const Operand& dy, int count) {
    constexpr int begin = queue == 2 ? C::taps / 2 : 0;
    constexpr int end = queue == 1 ? C::taps / 2 : C::taps;
    const int first = threadIdx.x / 8 * 4;
    const int32_t* at =
        shared.queues + queue * (C::taps + 1) * C::queue_rows + queues.head[queue] + first;
    const auto rows_of = [&](int j) {
      int4 rows = *reinterpret_cast<const int4*>(at + j * C::queue_rows);
      if (first + 0 >= count) rows.x = -1;
      if (first + 1 >= count) rows.y = -1;
      if (first + 2 >= count) rows.z = -1;
      if (first + 3 >= count) rows.w = -1;
      return rows;
    };
    int4 in[end - begin];
#pragma unroll
    for (int j = begin; j < end; ++j) in[j - begin] = rows_of(j);
    const int4 out = rows_of(C::taps);
    const uint32_t stage = claim_stage();
#pragma unroll
    for (int j = begin; j < end; ++j) {
      copy_rows<C::in_blocks>(stage + j * C::in_blocks * 8192, x, in[j - begin]);
    }
    copy_rows<C::columns / 64>(stage + C::x_bytes, dy, out);
    finish_stage(queue == 0 ? 3 : queue);
    queues.head[queue] = wrapped(queues.head[queue] + batch_rows, C::queue_rows);
    queues.count[queue] -= count;
  }

  template <int queue>
  __device__ __forceinline__ void copy_batches(const Operand& x, const Operand& dy, int least) {
    if constexpr (queue < C::queues) {
      while (queues.count[queue] >= least) {
        copy_batch<queue>(x, dy, min(queues.count[queue], batch_rows));
      }
    }
  }

  __device__ __forceinline__ void run_piece(const Piece& piece) {
    const Operand x = operand(p.x, p.x_row_bytes, piece.block / p.out_blocks * C::ins, p.c_in);
    const Operand dy =
        operand(p.dy, p.dy_row_bytes, piece.block % p.out_blocks * C::columns, p.c_out);
    Chunks chunks(p, piece);
    Round<C> round;
    bool more = read_round<C>(p, piece, &chunks, &round);
    while (more) {
      append<C>(shared, round, &queues);
      // The next round's neighbours are on their way while this one's rows are.
      more = read_round<C>(p, piece, &chunks, &round);
      const int least = more ? batch_rows : 1;
      copy_batches<0>(x, dy, least);
      copy_batches<1>(x, dy, least);
      copy_batches<2>(x, dy, least);
    }
    claim_stage();
    finish_stage(note_end);
  }
};

// ---- The consumers
// -------------------------------------------------------------------------------

template <class C>
using Sums = float[C::own_blocks][C::columns / 2];

// Where a lane's sums lie: of block m, h and (j, e), the tap `tap(m)` of the group, input channel
// in(m) + 8 * h and output channel out + 8 * j + e.
template <class C>
struct Place {
  int consumer = threadIdx.x / 128 - 1;
  int lane = threadIdx.x % 32;
  __device__ __forceinline__ int tap(int m) const {
    return (consumer * C::own_blocks + m) / C::in_blocks;
  }
  __device__ __forceinline__ int in(int m) const {
    return (consumer * C::own_blocks + m) % C::in_blocks * 64 +
           static_cast<int>(threadIdx.x) % 128 / 32 * 16 + lane / 4;
  }
  __device__ __forceinline__ int out() const { return lane % 4 * 2; }
};

// Where the sums of (m, h) begin, in `to`; null if they are outside of dw.
template <class C, class Out>
__device__ __forceinline__ Out* first_sum(
    const Params& p, const Piece& piece, const Target& to, int m, int h) {
  const Place<C> place;
  const int in = place.in(m) + h * 8;
  const bool inside = piece.group * C::taps + place.tap(m) < p.taps &&
                      piece.block / p.out_blocks * C::ins + in < p.c_in;
  return inside ? static_cast<Out*>(to.data) + place.tap(m) * to.tap_stride + in * to.in_stride +
                      place.out() * to.out_stride
                : nullptr;
}

template <class C, class Out>
__device__ __forceinline__ void store_sums(const Params& p,
                                           const Piece& piece,
                                           const float (&d)[C::columns / 4],
                                           Out* at,
                                           int64_t stride) {
  if (at == nullptr) return;
  const int left = p.c_out - piece.block % p.out_blocks * C::columns - Place<C>().out();
#pragma unroll
  for (int j = 0; j < C::columns / 8; ++j) {
    if (j * 8 < left) at[0] = Out(d[2 * j]);
    if (j * 8 + 1 < left) at[stride] = Out(d[2 * j + 1]);
    at += 8 * stride;
  }
}

// The sums of (m, h) once more, over present pairs only. By a whole warp.
template <class C>
__device__ __forceinline__ void repair(
    const Params& p, const Piece& piece, int m, int h, float (&d)[C::columns / 4]) {
  using T = typename C::T;
  const Place<C> place;
  const int in = piece.block / p.out_blocks * C::ins + place.in(m) + h * 8;
  const int out = piece.block % p.out_blocks * C::columns + place.out();
  const int tap = piece.group * C::taps + place.tap(m);
#pragma unroll
  for (int i = 0; i < C::columns / 4; ++i) d[i] = 0;
  Chunks chunks(p, piece);
  for (int chunk = chunks.next(); chunk >= 0; chunk = chunks.next()) {
    const int64_t first = static_cast<int64_t>(chunk) * chunk_rows;
    const int64_t end = min(p.rows, first + chunk_rows);
    for (int64_t row = first; row < end; ++row) {
      const int from = tap < p.taps ? p.neighbours[tap * p.rows + row] : -1;
      if (from < 0 || in >= p.c_in) continue;
      const auto* x = reinterpret_cast<const T*>(static_cast<const char*>(p.x) +
                                                 from * static_cast<int64_t>(p.x_row_bytes));
      const auto* dy = reinterpret_cast<const T*>(static_cast<const char*>(p.dy) +
                                                  row * static_cast<int64_t>(p.dy_row_bytes));
      const auto value = static_cast<float>(x[in]);
#pragma unroll
      for (int i = 0; i < C::columns / 4; ++i) {
        const int n = out + i / 2 * 8 + i % 2;
        if (n < p.c_out) d[i] += value * static_cast<float>(dy[n]);
      }
    }
  }
}

template <class C, class Out>
__device__ __forceinline__ void write_sums(const Params& p,
                                           const Piece& piece,
                                           const Target& to,
                                           const Sums<C>& d) {
  uint32_t broken = 0;
#pragma unroll
  for (int m = 0; m < C::own_blocks; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float row[C::columns / 4];
      bool nan = false;
#pragma unroll
      for (int i = 0; i < C::columns / 4; ++i) {
        row[i] = d[m][i / 2 * 4 + h * 2 + i % 2];
        nan = nan || isnan(row[i]);
      }
      store_sums<C>(p, piece, row, first_sum<C, Out>(p, piece, to, m, h), to.out_stride);
      broken |= static_cast<uint32_t>(nan) << (2 * m + h);
    }
  }
  if constexpr (C::taps > 1) {
    broken = __reduce_or_sync(0xffffffff, broken);
    for (; broken != 0; broken &= broken - 1) {
      const int at = __ffs(broken) - 1;
      float row[C::columns / 4];
      repair<C>(p, piece, at / 2, at % 2, row);
      store_sums<C>(p, piece, row, first_sum<C, Out>(p, piece, to, at / 2, at % 2), to.out_stride);
    }
  }
}

template <class C>
__device__ __forceinline__ void finish_piece(const Params& p,
                                             const Piece& piece,
                                             const Sums<C>& d) {
  if (!piece.whole) {
    const int64_t number = static_cast<int64_t>(piece.slot) * p.members + blockIdx.x % p.members;
    Target to = p.piece;
    to.data = p.partials + number * C::piece_size;
    return write_sums<C, float>(p, piece, to, d);
  }
  const int64_t at = piece.group * C::taps * p.dw.tap_stride +
                     piece.block / p.out_blocks * C::ins * p.dw.in_stride +
                     piece.block % p.out_blocks * C::columns * p.dw.out_stride;
  Target to = p.dw;
  if (p.dw_is_f32) {
    to.data = static_cast<float*>(p.dw.data) + at;
    write_sums<C, float>(p, piece, to, d);
  } else {
    to.data = static_cast<typename C::T*>(p.dw.data) + at;
    write_sums<C, typename C::T>(p, piece, to, d);
  }
}

template <class C>
__device__ __forceinline__ void multiply(Sums<C>& d, uint32_t x, uint32_t dy) {
  using Multiply = ptx::Wgmma<typename C::T, C::columns, true, true>;
#pragma unroll
  for (int k = 0; k < batch_rows / 16; ++k) {
    const uint64_t columns = ptx::swizzled_operand(dy + k * 2048, 8192, 1024);
#pragma unroll
    for (int m = 0; m < C::own_blocks; ++m) {
      Multiply::add(d[m], ptx::swizzled_operand(x + m * 8192 + k * 2048, 8192, 1024), columns);
    }
  }
}

template <class C>
__device__ __forceinline__ void pin_all(Sums<C>& d) {
#pragma unroll
  for (int m = 0; m < C::own_blocks; ++m) ptx::pin(d[m]);
}

template <class C>
__device__ __forceinline__ void consume(const Params& p, const Shared& shared) {
  const int consumer = threadIdx.x / 128 - 1;
  // One tap: every batch is for both.
  const uint32_t half = C::taps == 1 ? 3 : 1u << consumer;
  const auto release = [&](int stage) {
    if (threadIdx.x % 32 == 0) ptx::barrier_arrive(shared.free + 8 * stage);
  };
  Ring<C::stages> ring;
  Pieces pieces(p, shared.starts);
  Piece piece;
  while (pieces.next(&piece)) {
    if (piece.block >= p.blocks) continue;
    Sums<C> d;
#pragma unroll
    for (int m = 0; m < C::own_blocks; ++m) {
#pragma unroll
      for (int i = 0; i < C::columns / 2; ++i) d[m][i] = 0;
    }
    int multiplying = -1;  // the stage whose products may be unfinished
    const auto drain = [&] {
      ptx::wgmma_wait<0>();
      pin_all<C>(d);
      if (multiplying >= 0) release(multiplying);
      multiplying = -1;
      release(ring.stage);
    };
    for (;;) {
      ptx::barrier_wait(shared.full + 8 * ring.stage, ring.parity);
      const uint32_t note = shared.notes[ring.stage];
      if (note == note_end) break;
      if ((note & half) != 0) {
        const uint32_t x = shared.stages + ring.stage * C::stage_bytes;
        ptx::proxy_fence();
        pin_all<C>(d);
        ptx::wgmma_fence();
        multiply<C>(d, x + consumer * C::own_blocks * 8192, x + C::x_bytes);
        ptx::wgmma_commit();
        ptx::wgmma_wait<1>();
        pin_all<C>(d);
        if (multiplying >= 0) release(multiplying);
        multiplying = ring.stage;
      } else {
        drain();
      }
      ring.next();
    }
    drain();
    ring.next();
    finish_piece<C>(p, piece, d);
  }
}

template <class C>
__global__ void __launch_bounds__(C::threads, 1) grad_weight(const __grid_constant__ Params p) {
  extern __shared__ unsigned char memory[];
  Shared shared;
  const uint32_t skipped = -ptx::shared_address(memory) & 1023;
  unsigned char* behind = memory + skipped + C::stages * C::stage_bytes;
  shared.stages = ptx::shared_address(memory) + skipped;
  shared.queues = reinterpret_cast<int32_t*>(behind);
  behind += C::queue_bytes;
  shared.full = ptx::shared_address(behind);
  shared.free = shared.full + 8 * C::stages;
  behind += 16 * C::stages;
  shared.notes = reinterpret_cast<uint32_t*>(behind);
  behind += 8 * C::stages;
  shared.starts = reinterpret_cast<unsigned long long*>(behind);
  behind += 8 * (p.groups + 1);
  shared.counts = reinterpret_cast<int*>(behind);
  if (threadIdx.x < 32) {
    place_groups<C>(p, shared.starts);
  } else if (threadIdx.x == 32) {
    for (int stage = 0; stage < C::stages; ++stage) {
      ptx::barrier_init(shared.full + 8 * stage, 128 + 1);  // producer threads, the note
      ptx::barrier_init(shared.free + 8 * stage, 8);        // consumer warps
    }
    ptx::barrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    if (blockIdx.x == 0) {
      for (int g = threadIdx.x; g <= p.groups; g += 128) p.starts[g] = shared.starts[g];
    }
    ptx::registers_down<C::producer_registers>();
    Producer<C> producer{p, shared, {}, {}};
    Pieces pieces(p, shared.starts);
    Piece piece;
    while (pieces.next(&piece)) {
      if (piece.block < p.blocks) producer.run_piece(piece);
    }
  } else {
    ptx::registers_up<C::consumer_registers>();
    consume<C>(p, shared);
  }
}

// ---- The sum of pieces
// ---------------------------------------------------------------------------

// A thread adds this many elements of a piece.
constexpr int adds = 4;
constexpr int add_threads = 256;

// Row y of the grid: (boundary of two teams, member). The first boundary within an entry adds the
// entry's pieces.
template <class C, class Out>
__global__ void __launch_bounds__(add_threads) add_pieces(const __grid_constant__ Params p) {
  extern __shared__ unsigned long long starts[];
  for (int g = threadIdx.x; g <= p.groups; g += add_threads) starts[g] = p.starts[g];
  __syncthreads();
  const unsigned long long axis = starts[p.groups] * p.parts;
  const int boundary = 1 + static_cast<int>(blockIdx.y) / p.members;
  const int member = static_cast<int>(blockIdx.y) % p.members;
  const unsigned long long place = team_begin(p, axis, boundary);
  const Entry entry = entry_at(p, starts, place);
  const bool first = place > entry.begin && team_begin(p, axis, boundary - 1) <= entry.begin;
  const int block = entry.part * p.members + member;
  if (!first || block >= p.blocks) return;
  float sums[adds] = {};
  const int base = blockIdx.x * adds * add_threads + threadIdx.x;
  for (int team = boundary - 1; team < p.teams && team_begin(p, axis, team) < entry.end; ++team) {
    const int64_t slot = 2 * team + (team_begin(p, axis, team) > entry.begin ? 0 : 1);
    const float* piece = p.partials + (slot * p.members + member) * C::piece_size + base;
#pragma unroll
    for (int i = 0; i < adds; ++i) sums[i] += __ldcg(piece + i * add_threads);
  }
#pragma unroll
  for (int i = 0; i < adds; ++i) {
    const int at = base + i * add_threads;
    const int tap = entry.group * C::taps + at / (C::ins * C::columns);
    const int inner = at % (C::ins * C::columns);
    const bool ins_inner = p.piece.in_stride == 1;
    const int in =
        block / p.out_blocks * C::ins + (ins_inner ? inner % C::ins : inner / C::columns);
    const int out =
        block % p.out_blocks * C::columns + (ins_inner ? inner / C::ins : inner % C::columns);
    if (tap >= p.taps || in >= p.c_in || out >= p.c_out) continue;
    static_cast<Out*>(
        p.dw.data)[tap * p.dw.tap_stride + in * p.dw.in_stride + out * p.dw.out_stride] =
        Out(sums[i]);
  }
}

}  // namespace voxgemm::cuda::grad_weight_sm90
