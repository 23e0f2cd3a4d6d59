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
// Pairs. Warpgroup 1 indexes: in rounds its warps read the neighbours of some chunks and append the
// rows that have a tap to queues in shared memory, one queue for each set of halves of the group
// that a row has (both; the first; the second). 64 rows of a queue are a batch, so absent pairs
// cost nothing where the group is one tap or two, and little where it is more. Warpgroup 0 copies:
// it turns batches into stages.
//
// A stage is a batch: blocks of 64 rows x 64 channels (128 bytes a row, 128-byte swizzle: 16-byte
// piece p of row r lies at piece p ^ (r & 7)):
//   X  [taps, ins / 64] blocks: rows of x, gathered by cp.async, eight lanes a row, for the halves
//      of the group that the batch has; with 32 or 16 input channels 2 or 4 taps side by side in a
//      block
//   dY [columns / 64] blocks
// Both operands have their channels contiguous ("MN-major") and the rows are the sum's index, so
// nothing is transposed. Consumer w, warpgroup 2 + w, multiplies half w of the X blocks with all of
// dY: half of the taps, or with one tap half of its channels.
//
// Synchronisation: `full` of a stage gets one arrival from every producer thread when its copies
// have landed and one after the stage's note is written; `free` one from every consumer warp. The
// note says which halves are there and whether a team's piece ends. cp.async writes through the
// generic proxy and wgmma reads through the asynchronous one, hence the consumers' fence. A
// consumer that skips a batch first drains what it multiplies, or the ring would stop in a run of
// skips. The queues have room for two rounds: `round` says that one is appended, `room` that all
// of its full batches are copied.
//
// Rows past the end of a batch are zeros on both sides. A row that has only some taps of a half is
// zero on the side of x alone, and zero times an infinite dy is NaN, which an absent pair must not
// make: a warp with NaN among its sums computes those once more, over present pairs only
// (repair()).
//
// A copy instruction of a warp (512 bytes) takes 13 clocks on an H200, and absent rows count like
// present ones, so copying is the limit, and the copying warps do nothing else. Lost: indexing by
// the same warps, 2600 clocks a round of 512 rows, a quarter to a half of the time; fewer
// instructions around the copies by immediate offsets gained nothing.

#include "cuda/kernels/grad_weight_sm90_pieces.cuh"
#include "cuda/kernels/grad_weight_sm90_sums.cuh"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/copy.cuh"
#include "cuda/ptx/wgmma.cuh"

namespace voxgemm::cuda::grad_weight_sm90 {

struct Shared {
  uint32_t stages;  // addresses in shared memory
  uint32_t full;    // barriers of the stages
  uint32_t free;
  uint32_t round;     // of the two rounds: there is one
  uint32_t room;      // it is copied
  int32_t* queues;    // [queues, taps + 1, queue_rows]: input rows of the taps, output row
  int* counts;        // [2 rounds, 4 warps]
  int* rounds;        // [2]: rows appended to the queues
  uint32_t* notes;    // [stages]
  AxisPlace* starts;  // [groups + 1]
};

// Bits 0 and 1 of a note: the halves that are there.
constexpr uint32_t note_end = 4;
constexpr int round_last = 1 << 30;

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

__device__ __forceinline__ int wrapped(int at, int size) { return at >= size ? at - size : at; }

// A number for each queue in one word.
template <class C>
__device__ __forceinline__ int number_of(int packed, int queue) {
  return C::queues == 1 ? packed : packed >> (10 * queue) & 1023;
}
static_assert(Config<__half, 2, 64, 64>::queue_rows <= 1023);

// Appends the rows that have a tap to the queues.
template <class C>
class Indexer {
 public:
  __device__ __forceinline__ Indexer(const Params& p, const Shared& shared)
      : p_(p), shared_(shared) {}

  __device__ __forceinline__ void run_piece(const Piece& piece) {
    Chunks chunks(p_, piece);
    Neighbours rounds[C::rounds_ahead];
    bool more[C::rounds_ahead];
#pragma unroll
    for (int i = 0; i < C::rounds_ahead; ++i) more[i] = read(piece, &chunks, &rounds[i]);
    for (;;) {
      // Unrolled, so that no neighbours on their way are waited for to change registers.
#pragma unroll
      for (int i = 0; i < C::rounds_ahead; ++i) {
        const bool last = !more[(i + 1) % C::rounds_ahead];
        append(rounds[i], last);
        if (last) return;
        more[i] = read(piece, &chunks, &rounds[i]);
      }
    }
  }

 private:
  // Of row i * 32 + lane of the warp's chunks.
  struct Neighbours {
    int in[C::taps][C::reads];
    int out[C::chunks];  // first output row of a chunk, this lane's
  };

  // Whether there was a chunk left; else all are absent.
  __device__ __forceinline__ bool read(const Piece& piece, Chunks* chunks, Neighbours* to) const {
    const int warp = threadIdx.x % 128 / 32;
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
      to->out[part] = mine * chunk_rows + lane;
#pragma unroll
      for (int i = 0; i < chunk_rows / 32; ++i) {
        const int64_t row = static_cast<int64_t>(mine) * chunk_rows + i * 32 + lane;
#pragma unroll
        for (int j = 0; j < C::taps; ++j) {
          const int tap = piece.group * C::taps + j;
          const bool there = mine >= 0 && row < p_.rows && tap < p_.taps;
          to->in[j][part * (chunk_rows / 32) + i] =
              there ? __ldg(p_.neighbours + tap * p_.rows + row) : -1;
        }
      }
    }
    return any;
  }

  __device__ __forceinline__ void append(const Neighbours& rows, bool last) {
    const int thread = threadIdx.x % 128;
    const int warp = thread / 32;
    int own = 0;          // rows of this warp
    int queue[C::reads];  // of this lane's rows, or -1
    int place[C::reads];  // within the warp's rows
#pragma unroll
    for (int i = 0; i < C::reads; ++i) {
      bool first = false;
      bool second = false;
#pragma unroll
      for (int j = 0; j < C::taps; ++j) {
        (2 * j < C::taps ? first : second) |= rows.in[j][i] >= 0;
      }
      queue[i] = first ? (second || C::taps == 1 ? 0 : 1) : second ? 2 : -1;
      int before = own;
#pragma unroll
      for (int q = 0; q < C::queues; ++q) {
        const uint32_t votes = __ballot_sync(0xffffffff, queue[i] == q);
        before += __popc(votes & ((1u << thread % 32) - 1)) << (10 * q);
        own += __popc(votes) << (10 * q);
      }
      place[i] = number_of<C>(before, max(queue[i], 0));
    }
    int* counts = shared_.counts + 4 * ring_.stage;
    if (thread % 32 == 0) counts[warp] = own;
    ptx::named_barrier(1, 128);
    int begin = ends_;
    int all = 0;
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const int count = counts[w];
      if (w < warp) begin = moved(begin, count);
      all += count;
    }
    ptx::barrier_wait(shared_.room + 8 * ring_.stage, ring_.parity ^ 1);
#pragma unroll
    for (int i = 0; i < C::reads; ++i) {
      if (queue[i] < 0) continue;
      const int at = wrapped(number_of<C>(begin, queue[i]) + place[i], C::queue_rows);
      int32_t* to = shared_.queues + queue[i] * (C::taps + 1) * C::queue_rows + at;
#pragma unroll
      for (int j = 0; j < C::taps; ++j) to[j * C::queue_rows] = rows.in[j][i];
      to[C::taps * C::queue_rows] = rows.out[i * 32 / chunk_rows] + i * 32 % chunk_rows;
    }
    ends_ = moved(ends_, all);
    if (last) complete_batches();
    if (thread == 0) shared_.rounds[ring_.stage] = last ? all | round_last : all;
    ptx::barrier_arrive(shared_.round + 8 * ring_.stage);
    ring_.next();
  }

  // Ends of the queues after so many more rows.
  __device__ __forceinline__ static int moved(int ends, int counts) {
    int result = 0;
#pragma unroll
    for (int q = 0; q < C::queues; ++q) {
      const int end = number_of<C>(ends, q) + number_of<C>(counts, q);
      result |= wrapped(end, C::queue_rows) << (10 * q);
    }
    return result;
  }

  // Absent rows behind the last ones.
  __device__ __forceinline__ void complete_batches() {
#pragma unroll
    for (int q = 0; q < C::queues; ++q) {
      const int end = number_of<C>(ends_, q);
      const int missing = -end & (batch_rows - 1);
      const int thread = threadIdx.x % 128;
      if (thread < missing) {
        int32_t* to = shared_.queues + q * (C::taps + 1) * C::queue_rows + end + thread;
        for (int j = 0; j <= C::taps; ++j) to[j * C::queue_rows] = -1;
      }
      ends_ += missing << (10 * q);
    }
  }

  const Params& p_;
  const Shared& shared_;
  Ring<2> ring_;
  int ends_ = 0;
};

// What a producer thread copies of an operand: a 16-byte piece of four rows of every block.
struct Operand {
  const char* data;  // at the thread's piece of the tile's first channels
  uint32_t row_bytes;
  int left;  // channels from there to the end
};

// Of channels [first, last): its rows are repeated every `width` channels of a block.
__device__ __forceinline__ Operand
operand(const void* data, uint32_t row_bytes, int first, int last, int width) {
  const int channel = first + static_cast<int>(threadIdx.x) % 8 * 8 % width;
  return {static_cast<const char*>(data) + 2 * static_cast<int64_t>(channel), row_bytes,
          last - channel};
}

template <class C>
struct Producer {
  const Params& p;
  const Shared& shared;
  Ring<C::stages> ring;
  Ring<2> rounds;
  // All threads hold the same.
  int head[C::queues] = {};
  int count[C::queues] = {};

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

  // Four rows of `blocks` blocks of a stage, of this thread's piece. Channels past the end are left
  // as they are: they make sums that nobody reads.
  template <int blocks>
  __device__ __forceinline__ void copy_rows(uint32_t to, const Operand& from, const int4& rows) {
    const int first = threadIdx.x / 8 * 4;
    const auto row_of = [&](int i) {
      return i == 0 ? rows.x : i == 1 ? rows.y : i == 2 ? rows.z : rows.w;
    };
    const auto place = [&](int i) { return to + i * 128 + ((threadIdx.x ^ (first + i)) % 8 << 4); };
    if ((blocks - 1) * 64 < from.left) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        ptx::gather_pieces<blocks, 128, 8192>(place(i), from.data, row_of(i), from.row_bytes);
      }
    } else {
#pragma unroll
      for (int b = 0; b + 1 < blocks; ++b) {
        if (b * 64 >= from.left) break;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          ptx::gather_pieces<1, 0, 0>(place(i) + b * 8192, from.data + b * 128, row_of(i),
                                      from.row_bytes);
        }
      }
    }
  }

  // The first 64 rows of a queue.
  template <int queue>
  __device__ __forceinline__ void copy_batch(const Operand& x, const Operand& dy) {
    constexpr int begin = queue == 2 ? C::taps / 2 : 0;
    constexpr int end = queue == 1 ? C::taps / 2 : C::taps;
    const int first = threadIdx.x / 8 * 4;
    const int32_t* at = shared.queues + queue * (C::taps + 1) * C::queue_rows + head[queue] + first;
    const auto rows_of = [&](int j) {
      return *reinterpret_cast<const int4*>(at + j * C::queue_rows);
    };
    // This thread's tap of each set of taps that share blocks.
    const int tap = threadIdx.x % 8 * 8 / C::width;
    int4 in[(end - begin) / C::block_taps];
#pragma unroll
    for (int k = 0; k < (end - begin) / C::block_taps; ++k) {
      in[k] = rows_of(begin + k * C::block_taps + tap);
    }
    const int4 out = rows_of(C::taps);
    const uint32_t stage = claim_stage() + first * 128;
#pragma unroll
    for (int k = 0; k < (end - begin) / C::block_taps; ++k) {
      const int block = (begin / C::block_taps + k) * C::in_blocks;
      copy_rows<C::in_blocks>(stage + block * 8192, x, in[k]);
    }
    copy_rows<C::dy_blocks>(stage + C::x_bytes, dy, out);
    finish_stage(queue == 0 ? 3 : queue);
    head[queue] = wrapped(head[queue] + batch_rows, C::queue_rows);
    count[queue] -= batch_rows;
  }

  template <int queue>
  __device__ __forceinline__ void copy_batches(const Operand& x, const Operand& dy, int round) {
    if constexpr (queue < C::queues) {
      count[queue] += number_of<C>(round & ~round_last, queue);
      if ((round & round_last) != 0) count[queue] = (count[queue] + batch_rows - 1) & -batch_rows;
      while (count[queue] >= batch_rows) copy_batch<queue>(x, dy);
    }
  }

  __device__ __forceinline__ void run_piece(const Piece& piece) {
    const int in = piece.block / p.out_blocks * C::ins;
    const int out = piece.block % p.out_blocks * C::columns;
    const Operand x = operand(p.x, p.x_row_bytes, in, p.c_in, C::width);
    const Operand dy = operand(p.dy, p.dy_row_bytes, out, min(p.c_out, out + C::columns), 64);
    int round = 0;
    do {
      ptx::barrier_wait(shared.round + 8 * rounds.stage, rounds.parity);
      round = shared.rounds[rounds.stage];
      copy_batches<0>(x, dy, round);
      copy_batches<1>(x, dy, round);
      copy_batches<2>(x, dy, round);
      ptx::barrier_arrive(shared.room + 8 * rounds.stage);
      rounds.next();
    } while ((round & round_last) == 0);
    claim_stage();
    finish_stage(note_end);
  }
};

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
  const int consumer = threadIdx.x / 128 - 2;
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
  shared.round = shared.free + 8 * C::stages;
  shared.room = shared.round + 16;
  behind += 16 * (C::stages + 2);
  shared.notes = reinterpret_cast<uint32_t*>(behind);
  behind += 16 * C::stages;
  shared.counts = reinterpret_cast<int*>(behind);
  shared.rounds = shared.counts + 8;
  behind += 64;
  shared.starts = reinterpret_cast<AxisPlace*>(behind);
  if (threadIdx.x < 32) {
    place_groups<C>(p, shared.starts);
  } else if (threadIdx.x == 32) {
    for (int stage = 0; stage < C::stages; ++stage) {
      ptx::barrier_init(shared.full + 8 * stage, 128 + 1);  // producer threads, the note
      ptx::barrier_init(shared.free + 8 * stage, 8);        // consumer warps
    }
    for (int round = 0; round < 2; ++round) {
      ptx::barrier_init(shared.round + 8 * round, 128);  // indexers
      ptx::barrier_init(shared.room + 8 * round, 128);   // producer threads
    }
    ptx::barrier_init_fence();
  }
  __syncthreads();
  ptx::let_next_launch_start();
  const auto for_pieces = [&](const auto& body) {
    Pieces pieces(p, shared.starts);
    Piece piece;
    while (pieces.next(&piece)) {
      if (piece.block < p.blocks) body(piece);
    }
  };
  if (threadIdx.x < 128) {
    ptx::registers_down<C::producer_registers>();
    Producer<C> producer{p, shared, {}, {}};
    for_pieces([&](const Piece& piece) { producer.run_piece(piece); });
  } else if (threadIdx.x < 256) {
    ptx::registers_down<C::producer_registers>();
    if (blockIdx.x == 0) {
      for (int g = threadIdx.x - 128; g <= p.groups; g += 128) p.starts[g] = shared.starts[g];
    }
    Indexer<C> indexer(p, shared);
    for_pieces([&](const Piece& piece) { indexer.run_piece(piece); });
  } else {
    ptx::registers_up<C::consumer_registers>();
    consume<C>(p, shared);
  }
}

}  // namespace voxgemm::cuda::grad_weight_sm90
