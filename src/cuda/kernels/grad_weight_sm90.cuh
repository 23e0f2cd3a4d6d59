// SPDX-License-Identifier: Apache-2.0
#pragma once

// Weight gradient on Hopper: dw[t] [c_in, c_out] = sum over pairs (i, o, t) of x[i]^T dy[o], 16-bit
// operands or f32 ones in two or three terms of bf16 (split_sm90.cu), f32 sums.
//
// Work. A CTA computes a tile of dw: `taps` taps (a group) x `ins` input channels x `columns`
// output channels, over some batches of 64 output rows. It is limited by the reading of rows: where
// channels are few, several taps of a group share rows of dy.
//   Several taps a group: batches are quarters of the tiles of a masked schedule, so that few of
//     their rows lack a tap that others have. A team has a member for every group and channel
//     block; team t takes batches t, t + teams, .., and all CTAs walk over the rows together, which
//     are read from the second-level cache.
//   One tap a group (many channels: arithmetic is the limit): rows that have the tap are gathered
//     from the map's table, 64 make a batch, and no absent row is read. The teams take equal pieces
//     of one axis of taps (Axis); members of a team read the same rows, different channel blocks.
// Nothing depends on timing; what a CTA does not do alone add_pieces() adds in the order of teams.
//
// Roles. Warpgroup 1 indexes (grad_weight_sm90_slots.cuh): with a schedule it fills a ring of
// slots, each the input rows of every tap and the output rows of a batch; without one it appends
// rows to a queue. Warpgroup 0 copies the rows of batches. Consumer w, warpgroup 2 + w, multiplies
// half w of the X blocks with all of dY, of terms every two that matter.
//
// A batch lies in shared memory as blocks of 64 rows x 64 channels (128 bytes a row, 128-byte
// swizzle: 16-byte piece p of row r lies at piece p ^ (r & 7)), each for every term: X [taps,
// ins / 64] for the taps that the batch has, with 32 or 16 input channels 2 or 4 taps side by side
// in a block, and dY [columns / 64]; both with their channels contiguous ("MN-major").
//
// Synchronisation. `full` of a batch gets one arrival from every producer thread when its copies
// have landed and one after the batch's note is written; `free` one from every consumer warp. A
// note of no taps ends a piece. Slots, and the two rounds of the queue, have such a pair of
// barriers as well. A barrier's answer comes behind the copies under way: with a schedule the
// producer asks for the next slot and place before it copies, and waits only where they were not
// there. A consumer that skips a batch first drains what it multiplies, or a run of skips would
// stop the ring. What all lanes of a warp read, its first lane releases after a __syncwarp, which
// may leave no code: racecheck may then report the next write. Of terms the first lane alone reads
// notes, as there is room for few batches.
//
// Rows past the end of a batch are zeros on both sides, one that lacks a tap of it on that of x
// alone, and zero times an infinite dy is NaN: sums that are NaN when they are written are computed
// once more, over present pairs only. What was tried and lost is in docs/performance.md.

#include <type_traits>

#include "cuda/kernels/grad_weight_sm90_slots.cuh"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/copy.cuh"
#include "cuda/ptx/wgmma.cuh"

namespace voxgemm::cuda::grad_weight_sm90 {

// What a producer thread copies of an operand: a 16-byte piece of four rows of every block.
struct Operand {
  const char* data;  // at the thread's piece of the tile's first channels
  uint32_t row_bytes;
  int left;  // channels from there to the end
};

// Of channels [first, last) in `terms`: rows are repeated every `width` channels of a block.
template <int terms, int width>
__device__ inline Operand operand(const void* data, uint32_t row_bytes, int first, int last) {
  const int channel = static_cast<int>(threadIdx.x) % 8 * 8 % width;
  const int64_t place = int64_t{terms} * first + channel;
  return {static_cast<const char*>(data) + 2 * place, row_bytes, last - first - channel};
}

template <class C>
struct Producer {
  const Params& p;
  const Shared& shared;
  ptx::Ring<C::batches> ring;
  ptx::Ring<C::slots> slots;
  int head = 0;  // of the queue

  // Four rows of `blocks` blocks from number `block` on, of this thread's piece. Channels past the
  // end are left as they are: they make sums that nobody reads.
  template <int blocks, int width>
  __device__ void copy_rows(int block, const Operand& from, const int4& rows) const {
    const int first = threadIdx.x / 8 * 4;
    const uint32_t to = block_at<C>(shared, ring.at, block) + first * 128;
    const auto place = [&](int i) { return to + i * 128 + ((threadIdx.x ^ (first + i)) % 8 << 4); };
#pragma unroll
    for (int b = 0; b < blocks; ++b) {
      if (b * 64 >= from.left) break;
      unroll<4>([&](int i) {
        ptx::gather_16<C::terms, 2 * width, 8192>(place(i) + b * C::terms * 8192,
                                                  from.data + b * C::terms * 128, (&rows.x)[i],
                                                  from.row_bytes);
      });
    }
  }

  // What a thread needs of a batch.
  struct Lists {
    int note = 0;
    int4 in[C::sets] = {};  // of its tap of each set
    int4 out = {};
  };
  __device__ Lists read_slot(bool full) {
    Lists lists;
    if (!full) ptx::barrier_wait(shared.slot_full + 8 * slots.at, slots.parity);
    lists.note = shared.slot_notes[slots.at];
    const uint32_t from = shared.slots + slots.at * C::slot_bytes + threadIdx.x / 8 * 16;
    const int tap = threadIdx.x % 8 * 8 / C::width;
    unroll<C::sets>([&](int k) {
      lists.in[k] = ptx::shared<int4>(from + (k * C::block_taps + tap) * batch_rows * 4);
    });
    lists.out = ptx::shared<int4>(from + C::taps * batch_rows * 4);
    __syncwarp();
    if (threadIdx.x % 32 == 0) ptx::barrier_arrive(shared.slot_free + 8 * slots.at);
    slots.next();
    return lists;
  }

  // The next batch of the queue.
  __device__ Lists read_queue() {
    Lists lists;
    const uint32_t from = shared.slots + (head + threadIdx.x / 8 * 4) * 8;
    const int4 first = ptx::shared<int4>(from);
    const int4 second = ptx::shared<int4>(from + 16);
    lists.in[0] = make_int4(first.x, first.z, second.x, second.z);
    lists.out = make_int4(first.y, first.w, second.y, second.w);
    head = head + batch_rows == C::queue_rows ? 0 : head + batch_rows;
    return lists;
  }

  __device__ void copy_rounds(const Operand& x, const Operand& dy) {
    int left = 0;  // rows in the queue
    for (bool last = false; !last;) {
      ptx::barrier_wait(shared.slot_full + 8 * slots.at, slots.parity);
      const int round = shared.slot_notes[slots.at];
      last = (round & round_last) != 0;
      left += round & (round_last - 1);
      if (last) left = (left + batch_rows - 1) & -batch_rows;
      for (; left >= batch_rows; left -= batch_rows) {
        Lists lists = read_queue();
        lists.note = 1;
        claim(false);
        copy_x(lists, x);
        copy_dy(lists, dy);
        finish(lists.note);
      }
      __syncwarp();
      if (threadIdx.x % 32 == 0) ptx::barrier_arrive(shared.slot_free + 8 * slots.at);
      slots.next();
    }
  }

  __device__ void run_piece(const Piece& piece) {
    const int first_in = piece.block / p.out_blocks * C::ins;
    const int first_out = piece.block % p.out_blocks * C::columns;
    const Operand x = operand<C::terms, C::width>(p.x_rows, p.x_row_bytes, first_in, p.c_in);
    const Operand dy = operand<C::terms, 64>(p.dy_rows, p.dy_row_bytes, first_out,
                                             min(p.c_out, first_out + C::columns));
    if constexpr (!C::scheduled) {
      copy_rounds(x, dy);
      claim(false);
      return finish(0);
    }
    Lists lists = read_slot(false);
    claim(false);
    while (lists.note != 0) {
      const Lists now = lists;
      const bool full = ptx::barrier_test(shared.slot_full + 8 * slots.at, slots.parity);
      copy_x(now, x);
      // Loads wait behind the copies before them.
      lists = read_slot(full);
      const bool free = is_free();
      copy_dy(now, dy);
      finish(now.note);
      claim(free);
    }
    finish(lists.note);
  }

  // Whether the batch behind the one at hand has its place.
  __device__ bool is_free() const {
    ptx::Ring<C::batches> next = ring;
    next.next();
    return ptx::barrier_test(shared.free + 8 * next.at, next.parity ^ 1);
  }
  __device__ void claim(bool free) const {
    if (!free) ptx::barrier_wait(shared.free + 8 * ring.at, ring.parity ^ 1);
  }
  __device__ void finish(int note) {
    const uint32_t full = shared.full + 8 * ring.at;
    ptx::copies_arrive(full);
    if (threadIdx.x == 0) {
      shared.notes[ring.at] = note;
      ptx::barrier_arrive(full);
    }
    ring.next();
  }

  __device__ void copy_x(const Lists& lists, const Operand& x) const {
    unroll<C::sets>([&](int k) {
      if (C::scheduled && (lists.note >> k & 1) == 0) return;
      copy_rows<C::in_blocks, C::width>(k * C::in_blocks, x, lists.in[k]);
    });
  }
  __device__ void copy_dy(const Lists& lists, const Operand& dy) const {
    copy_rows<C::dy_blocks, 64>(C::x_blocks, dy, lists.out);
  }
};

template <class C>
struct Consumer {
  const Params& p;
  const Shared& shared;
  int first_block;
  ptx::Ring<C::batches> ring;
  int multiplying = -1;  // the batch whose products may be unfinished

  // Where a batch's blocks begin that this one multiplies.
  struct Blocks {
    uint32_t x;
    uint32_t dy;
    int wanted = 0;  // that are there, as bits
  };
  __device__ Blocks blocks(int note) const {
    const auto at = [&](int block) { return block_at<C>(shared, ring.at, block); };
    Blocks found = {at(first_block), at(C::x_blocks)};
    unroll<C::own_blocks>([&](int m) {
      found.wanted |= (C::scheduled ? note >> (first_block + m) / C::in_blocks & 1 : 1) << m;
    });
    return found;
  }

  __device__ static void pin(Sums<C>& d) {
    unroll<C::own_blocks>([&](int m) { ptx::pin(d[m]); });
  }
  __device__ static void clear(Sums<C>& d) {
    unroll<C::own_blocks>([&](int m) { unroll<C::columns / 2>([&](int i) { d[m][i] = 0; }); });
    if constexpr (C::terms == 1) pin(d);
  }

  // Adds the chosen blocks of x, transposed, times dy, as a group of products, the smallest first.
  template <int chosen>
  __device__ static void multiply_blocks(Sums<C>& d, const Blocks& at) {
    const auto for_chosen = [](const auto& body) {
      unroll<C::own_blocks>([&](int m) {
        if ((chosen >> m & 1) != 0) body(m);
      });
    };
    for_chosen([&](int m) { ptx::pin(d[m]); });
    ptx::wgmma_fence();
    unroll<batch_rows / 16>([&](int k) {
#pragma unroll
      for (int sum = C::terms - 1; sum >= 0; --sum) {
#pragma unroll
        for (int i = 0; i <= sum; ++i) {  // term i of dy, term sum - i of x
          const uint64_t columns =
              ptx::swizzled_operand(at.dy + i * 8192 + k * 2048, C::terms * 8192, 1024);
          for_chosen([&](int m) {
            const uint32_t rows = at.x + (m * C::terms + sum - i) * 8192 + k * 2048;
            ptx::wgmma<typename C::T, C::columns, true, true>(
                d[m], ptx::swizzled_operand(rows, 8192, 1024), columns);
          });
        }
      }
    });
    ptx::wgmma_commit();
  }

  // Blocks m, m + 1, .. of those wanted, and those in `chosen`. Code for each set of blocks: a
  // condition inside a group of products would put them one behind the other.
  template <int m = 0, int chosen = 0>
  __device__ static void multiply(Sums<C>& d, const Blocks& at) {
    if constexpr (m == C::own_blocks) {
      if constexpr (chosen != 0) multiply_blocks<chosen>(d, at);
    } else if ((at.wanted >> m & 1) != 0) {
      multiply<m + 1, chosen | 1 << m>(d, at);
    } else {
      multiply<m + 1, chosen>(d, at);
    }
  }
  __device__ static void multiply_batch(Sums<C>& d, const Blocks& at) {
    ptx::proxy_fence();
    pin(d);
    if constexpr (C::scheduled) {
      multiply(d, at);
    } else {
      multiply_blocks<(1 << C::own_blocks) - 1>(d, at);
    }
  }

  __device__ void release(int batch) const {
    __syncwarp();  // all lanes have read the note
    if (threadIdx.x % 32 == 0) ptx::barrier_arrive(shared.free + 8 * batch);
  }
  // The next batch's note.
  __device__ int wait() const {
    ptx::barrier_wait(shared.full + 8 * ring.at, ring.parity);
    if constexpr (C::terms == 1) return shared.notes[ring.at];
    const int note = threadIdx.x % 32 == 0 ? shared.notes[ring.at] : 0;
    return __shfl_sync(0xffffffff, note, 0);
  }

  __device__ void release_multiplied(Sums<C>& d) {
    pin(d);
    if (multiplying >= 0) release(multiplying);
    multiplying = -1;
  }
  __device__ void drain(Sums<C>& d) {
    ptx::wgmma_wait<0>();
    release_multiplied(d);
  }

  __device__ void run_piece(const Piece& piece) {
    Sums<C> d;
    clear(d);
    for (;; ring.next()) {
      const int note = wait();
      if (note == 0) break;
      const Blocks at = blocks(note);
      if (at.wanted == 0) {
        drain(d);
        release(ring.at);
      } else if constexpr (C::terms == 1) {
        multiply_batch(d, at);
        ptx::wgmma_wait<1>();
        release_multiplied(d);
        multiplying = ring.at;
      } else {
        // The matrix instructions cut their sums off rather than round them, which thousands of
        // batches would show: those of a batch are added to the others outside.
        Sums<C> part;
        clear(part);
        multiply_batch(part, at);
        drain(part);
        unroll<C::own_blocks>(
            [&](int m) { unroll<C::columns / 2>([&](int i) { d[m][i] += part[m][i]; }); });
        release(ring.at);
      }
    }
    drain(d);
    release(ring.at);
    ring.next();
    finish_piece<C>(p, piece, d);
  }
};

template <class C>
__global__ void __launch_bounds__(C::threads, 1) grad_weight(const __grid_constant__ Params p) {
  extern __shared__ unsigned char memory[];
  Shared shared;
  const uint32_t skipped = -ptx::shared_address(memory) & 1023;
  unsigned char* behind = memory + skipped + C::batches * C::batch_bytes;
  shared.batches = ptx::shared_address(memory) + skipped;
  shared.slots = ptx::shared_address(behind);
  behind += C::slots_bytes;
  shared.full = ptx::shared_address(behind);
  shared.free = shared.full + 8 * C::batches;
  shared.slot_full = shared.free + 8 * C::batches;
  shared.slot_free = shared.slot_full + 8 * C::slots;
  behind += 16 * (C::batches + C::slots);
  const Axis axis = {p, reinterpret_cast<AxisPlace*>(behind)};
  behind += 8 * (p.entries + 1);
  shared.slot_notes = reinterpret_cast<int*>(behind);
  shared.notes = shared.slot_notes + C::slots;
  shared.counts = shared.notes + C::batches;
  if (threadIdx.x < 32) {
    if constexpr (!C::scheduled) axis.place();
  } else if (threadIdx.x == 32) {
    ptx::barriers_init(shared.full, C::batches, 128 + 1);  // producer threads, the note
    ptx::barriers_init(shared.free, C::batches, 8);        // consumer warps
    // A warp's copies and its note, or all indexers.
    ptx::barriers_init(shared.slot_full, C::slots, C::scheduled ? 32 + 1 : 128);
    ptx::barriers_init(shared.slot_free, C::slots, 4);  // producer warps
    ptx::barrier_init_fence();
  }
  __syncthreads();
  ptx::let_next_launch_start();
  if (threadIdx.x < 128) {
    ptx::registers_down<C::producer_registers>();
    Producer<C> producer{p, shared};
    for_pieces<C>(axis, [&](const Piece& piece) { producer.run_piece(piece); });
  } else if (threadIdx.x < 256) {
    ptx::registers_down<C::producer_registers>();
    using Indexer = std::conditional_t<C::scheduled, BatchIndexer<C>, RowIndexer<C>>;
    Indexer indexer{p, shared};
    for_pieces<C>(axis, [&](const Piece& piece) { indexer.run_piece(piece); });
  } else {
    ptx::registers_up<C::consumer_registers>();
    const int first_block = (static_cast<int>(threadIdx.x) / 128 - 2) * C::own_blocks;
    Consumer<C> consumer{p, shared, first_block};
    for_pieces<C>(axis, [&](const Piece& piece) { consumer.run_piece(piece); });
  }
}

}  // namespace voxgemm::cuda::grad_weight_sm90
