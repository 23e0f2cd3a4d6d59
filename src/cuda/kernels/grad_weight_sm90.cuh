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
// pairs cost nothing where the group is one tap or two, and little where it is more.
//
// A stage is a batch: blocks of 64 rows x 64 channels (128 bytes a row, 128-byte swizzle: 16-byte
// piece p of row r lies at piece p ^ (r & 7)):
//   X  [taps, ins / 64] blocks: rows of x, gathered by cp.async, eight lanes a row, for the halves
//      of the group that the batch has; with 32 or 16 input channels 2 or 4 taps side by side in a
//      block
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
//
// Measured on an H200 at 1.75 GHz, bf16: 590 TFLOP/s of useful products at 256 to 1024 channels.
// The producer is the limit: 13 clocks for a copy instruction of a warp (512 bytes; absent rows
// count like present ones) and 2600 for a round, in which nothing is copied. Half as many
// instructions around the copies, by immediate offsets, gained nothing.

#include "cuda/kernels/grad_weight_sm90_pieces.cuh"
#include "cuda/kernels/grad_weight_sm90_sums.cuh"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/copy.cuh"
#include "cuda/ptx/wgmma.cuh"

namespace voxgemm::cuda::grad_weight_sm90 {

struct Shared {
  uint32_t stages;  // addresses in shared memory
  uint32_t full;
  uint32_t free;
  int32_t* queues;             // [queues, taps + 1, queue_rows]: input rows of the taps, output row
  int* counts;                 // [4 warps]
  uint32_t* notes;             // [stages]
  unsigned long long* starts;  // [groups + 1]: the groups on the axis of one part
};

// Bits 0 and 1 of a note: the halves that are there.
constexpr uint32_t note_end = 4;

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
  int out[C::chunks];  // first output row of a chunk, this lane's
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
    round->out[part] = mine * chunk_rows + lane;
#pragma unroll
    for (int i = 0; i < chunk_rows / 32; ++i) {
      const int64_t row = static_cast<int64_t>(mine) * chunk_rows + i * 32 + lane;
      const int at = part * (chunk_rows / 32) + i;
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

// Counts or places of all queues in one word, ten bits each.
template <class C>
__device__ __forceinline__ int count_of(int packed, int queue) {
  return C::queues == 1 ? packed : packed >> (10 * queue) & 1023;
}

template <class C>
__device__ __forceinline__ void append(const Shared& shared,
                                       const Round<C>& round,
                                       Queues<C>* queues) {
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  int own = 0;          // rows of this warp, packed
  int queue[C::reads];  // of this lane's rows, or -1
  int place[C::reads];  // within the warp's rows
#pragma unroll
  for (int i = 0; i < C::reads; ++i) {
    bool first = false;
    bool second = false;
#pragma unroll
    for (int j = 0; j < C::taps; ++j) {
      (2 * j < C::taps ? first : second) |= round.in[j][i] >= 0;
    }
    queue[i] = first ? (second || C::taps == 1 ? 0 : 1) : second ? 2 : -1;
    int before = own;
#pragma unroll
    for (int q = 0; q < C::queues; ++q) {
      const uint32_t votes = __ballot_sync(0xffffffff, queue[i] == q);
      before += __popc(votes & ((1u << lane) - 1)) << (10 * q);
      own += __popc(votes) << (10 * q);
    }
    place[i] = count_of<C>(before, max(queue[i], 0));
  }
  if (lane == 0) shared.counts[warp] = own;
  // Also: every warp has read its rows of the batches before, whose places are taken now.
  ptx::named_barrier(1, 128);
  int before = 0;
  int all = 0;
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    if (w < warp) before += shared.counts[w];
    all += shared.counts[w];
  }
  int begin = 0;  // of this warp's rows in the queues, packed
#pragma unroll
  for (int q = 0; q < C::queues; ++q) {
    const int end = wrapped(queues->head[q] + queues->count[q], C::queue_rows);
    begin |= wrapped(end + count_of<C>(before, q), C::queue_rows) << (10 * q);
    queues->count[q] += count_of<C>(all, q);
  }
#pragma unroll
  for (int i = 0; i < C::reads; ++i) {
    if (queue[i] < 0) continue;
    const int at = wrapped(count_of<C>(begin, queue[i]) + place[i], C::queue_rows);
    int32_t* to = shared.queues + queue[i] * (C::taps + 1) * C::queue_rows + at;
#pragma unroll
    for (int j = 0; j < C::taps; ++j) to[j * C::queue_rows] = round.in[j][i];
    to[C::taps * C::queue_rows] = round.out[i * 32 / chunk_rows] + i * 32 % chunk_rows;
  }
  ptx::named_barrier(1, 128);
}

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
    const int32_t* at =
        shared.queues + queue * (C::taps + 1) * C::queue_rows + queues.head[queue] + first;
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
    queues.head[queue] = wrapped(queues.head[queue] + batch_rows, C::queue_rows);
    queues.count[queue] -= batch_rows;
  }

  // Absent rows behind the last ones.
  __device__ __forceinline__ void complete_batches() const {
    const int thread = threadIdx.x;
#pragma unroll
    for (int q = 0; q < C::queues; ++q) {
      if (thread >= batch_rows || thread < queues.count[q] % batch_rows) continue;
      const int at = wrapped(queues.head[q] + queues.count[q] / batch_rows * batch_rows + thread,
                             C::queue_rows);
      int32_t* to = shared.queues + q * (C::taps + 1) * C::queue_rows + at;
      for (int j = 0; j <= C::taps; ++j) to[j * C::queue_rows] = -1;
    }
    ptx::named_barrier(1, 128);
  }

  template <int queue>
  __device__ __forceinline__ void copy_batches(const Operand& x, const Operand& dy, int least) {
    if constexpr (queue < C::queues) {
      while (queues.count[queue] >= least) copy_batch<queue>(x, dy);
      if (queues.count[queue] < 0) queues.count[queue] = 0;
    }
  }

  __device__ __forceinline__ void run_piece(const Piece& piece) {
    const int in = piece.block / p.out_blocks * C::ins;
    const int out = piece.block % p.out_blocks * C::columns;
    const Operand x = operand(p.x, p.x_row_bytes, in, p.c_in, C::width);
    const Operand dy = operand(p.dy, p.dy_row_bytes, out, min(p.c_out, out + C::columns), 64);
    Chunks chunks(p, piece);
    Round<C> round;
    bool more = read_round<C>(p, piece, &chunks, &round);
    while (more) {
      append<C>(shared, round, &queues);
      // The next round's neighbours are on their way while this one's rows are.
      more = read_round<C>(p, piece, &chunks, &round);
      if (!more) complete_batches();
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
  ptx::let_next_launch_start();
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

}  // namespace voxgemm::cuda::grad_weight_sm90
