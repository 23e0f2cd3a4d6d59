// SPDX-License-Identifier: Apache-2.0
#pragma once

// Weight gradient on Hopper: dw[t] [c_in, c_out] = sum over pairs (i, o, t) of x[i]^T dy[o], 16-bit
// operands, f32 sums.
//
// Work. A CTA computes a tile of dw: `taps` taps (a group) x `ins` input channels x `columns`
// output channels, over some batches of 64 output rows. It is limited by the reading of rows, so
// where channels are few, several taps of a group share the rows of dy. There are two ways to
// divide the work; nothing of either depends on timing, and what a CTA does not do alone is left as
// f32 partial sums, which add_pieces() adds in the order of teams.
//   Several taps a group: batches are quarters of the tiles of a masked schedule, so that few of
//     their rows lack a tap that others have. A team has a member for every group and channel
//     block; team t takes batches t, t + teams, ..., and all CTAs walk over the rows together: rows
//     of x and dy are read from the second-level cache. Taps are dealt to groups by their pairs.
//   One tap a group (many channels: arithmetic is the limit): rows that have the tap are gathered
//     from the map's table, 64 make a batch, and no absent row is read. All taps stand on one axis,
//     each as long as its work; a team takes an equal piece of the axis, its members, which read
//     the same rows, different channel blocks. A tap that is cut is divided by chunks of 64 rows,
//     spread evenly: chunk c lies at the fraction of c * 0.618... within it.
//
// Roles. Warpgroup 1 indexes: it fills a ring of slots, each the input rows of every tap and the
// output rows of a batch (BatchIndexer, RowIndexer). Warpgroup 0 copies: slots into a ring of
// stages. Consumer w, warpgroup 2 + w, multiplies half w of the X blocks with all of dY.
//
// A stage is a batch: blocks of 64 rows x 64 channels (128 bytes a row, 128-byte swizzle: 16-byte
// piece p of row r lies at piece p ^ (r & 7)):
//   X  [taps, ins / 64] blocks: rows of x, gathered by cp.async, eight lanes a row, for the taps
//      that the batch has; with 32 or 16 input channels 2 or 4 taps side by side in a block
//   dY [columns / 64] blocks
// Both operands have their channels contiguous ("MN-major") and the rows are the sum's index, so
// nothing is transposed.
//
// Synchronisation: `full` of a stage gets one arrival from every producer thread when its copies
// have landed and one after the stage's note is written; `free` one from every consumer warp. A
// note has the taps of the batch, none ends a piece. Slots have such a pair of barriers as well.
// cp.async writes through the generic proxy and wgmma reads through the asynchronous one, hence the
// consumers' fence. A consumer that skips a batch first drains what it multiplies, or the ring
// would stop in a run of skips.
//
// Rows past the end of a batch are zeros on both sides. A row that lacks a tap of its batch is zero
// on the side of x alone, and zero times an infinite dy is NaN, which an absent pair must not make:
// a warp with NaN among its sums computes those once more, over present pairs only (repair()).
//
// A copy instruction of a warp (512 bytes) takes 13 clocks on an H200, and zeros count like rows.
// Lost (H200, bf16): indexing by the copying warps, 2600 clocks a round of 512 rows; fewer
// instructions around the copies by immediate offsets, nothing gained; several taps on the axis,
// rows with any of them compacted: indexing alone took 1.35 of 1.93 ms at 4.1 million rows of 64
// channels; a schedule's batches on the axis: teams drift apart, an eighth of the reads hit the
// second-level cache, 2.7 ms.

#include <type_traits>

#include "cuda/kernels/grad_weight_sm90_slots.cuh"
#include "cuda/kernels/grad_weight_sm90_sums.cuh"
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
  Ring<C::slots> slots;

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

  // What a thread needs of a slot.
  struct Lists {
    int note = note_end;
    int4 in[C::taps / C::block_taps] = {};  // of its tap of each set of taps that share blocks
    int4 out = {};
  };
  __device__ __forceinline__ Lists read_slot() {
    Lists lists;
    ptx::barrier_wait(shared.slot_full + 8 * slots.stage, slots.parity);
    lists.note = shared.slot_notes[slots.stage];
    const uint32_t from =
        shared.slots + slots.stage * C::slot_bytes + static_cast<int>(threadIdx.x) / 8 * 16;
    const int tap = threadIdx.x % 8 * 8 / C::width;
#pragma unroll
    for (int k = 0; k < C::taps / C::block_taps; ++k) {
      lists.in[k] = ptx::load_shared_16(from + (k * C::block_taps + tap) * batch_rows * 4);
    }
    lists.out = ptx::load_shared_16(from + C::taps * batch_rows * 4);
    __syncwarp();
    if (threadIdx.x % 32 == 0) ptx::barrier_arrive(shared.slot_free + 8 * slots.stage);
    slots.next();
    return lists;
  }

  __device__ __forceinline__ void run_piece(const Piece& piece) {
    const int first_in = piece.block / p.out_blocks * C::ins;
    const int first_out = piece.block % p.out_blocks * C::columns;
    const Operand x = operand(p.x, p.x_row_bytes, first_in, p.c_in, C::width);
    const Operand dy =
        operand(p.dy, p.dy_row_bytes, first_out, min(p.c_out, first_out + C::columns), 64);
    Lists lists = read_slot();
    for (bool more = true; more;) {
      const uint32_t full = shared.full + 8 * ring.stage;
      ptx::barrier_wait(shared.free + 8 * ring.stage, ring.parity ^ 1);
      const Lists now = lists;
      more = now.note != note_end;
      if (more) {
        // Loads wait behind the copies before them. With few registers to spare they come later.
        if (!C::scheduled) lists = read_slot();
        const uint32_t stage =
            shared.stages + ring.stage * C::stage_bytes + static_cast<int>(threadIdx.x) / 8 * 512;
#pragma unroll
        for (int k = 0; k < C::taps / C::block_taps; ++k) {
          const int block = k * C::in_blocks;
          if (has_block<C>(now.note, block)) {
            copy_rows<C::in_blocks>(stage + block * 8192, x, now.in[k]);
          }
        }
        if (C::scheduled) lists = read_slot();
        copy_rows<C::dy_blocks>(stage + C::x_bytes, dy, now.out);
      }
      ptx::copies_arrive(full);
      if (threadIdx.x == 0) {
        shared.notes[ring.stage] = now.note;
        ptx::barrier_arrive(full);
      }
      ring.next();
    }
  }
};

// Adds the blocks of x that `chosen` names, transposed, times dy, as one group of products.
template <class C, int chosen>
__device__ __forceinline__ void multiply_blocks(Sums<C>& d, uint32_t x, uint32_t dy) {
  using Multiply = ptx::Wgmma<typename C::T, C::columns, true, true>;
  const auto for_chosen = [](const auto& body) {
#pragma unroll
    for (int m = 0; m < C::own_blocks; ++m) {
      if ((chosen >> m & 1) != 0) body(m);
    }
  };
  for_chosen([&](int m) { ptx::pin(d[m]); });
  ptx::wgmma_fence();
#pragma unroll
  for (int k = 0; k < batch_rows / 16; ++k) {
    const uint64_t columns = ptx::swizzled_operand(dy + k * 2048, 8192, 1024);
    for_chosen([&](int m) {
      Multiply::add(d[m], ptx::swizzled_operand(x + m * 8192 + k * 2048, 8192, 1024), columns);
    });
  }
  ptx::wgmma_commit();
}

// The same of the blocks m, m + 1, .. in bits m, m + 1, .. of `wanted`, and of those in `chosen`.
// Code for each set of blocks: a condition inside a group of products would put them one behind
// the other.
template <class C, int m = 0, int chosen = 0>
__device__ __forceinline__ void multiply(Sums<C>& d, int wanted, uint32_t x, uint32_t dy) {
  if constexpr (m == C::own_blocks) {
    if constexpr (chosen != 0) multiply_blocks<C, chosen>(d, x, dy);
  } else if ((wanted >> m & 1) != 0) {
    multiply<C, m + 1, chosen | 1 << m>(d, wanted, x, dy);
  } else {
    multiply<C, m + 1, chosen>(d, wanted, x, dy);
  }
}

// The consumer's blocks that a batch has, as bits.
template <class C>
__device__ __forceinline__ int wanted_blocks(int note, int first_block) {
  int wanted = 0;
#pragma unroll
  for (int m = 0; m < C::own_blocks; ++m) {
    wanted |= static_cast<int>(has_block<C>(note, first_block + m)) << m;
  }
  return wanted;
}

// Calls body(piece) for what this CTA does.
template <class C, class Body>
__device__ __forceinline__ void for_pieces(const Params& p,
                                           const Shared& shared,
                                           const Body& body) {
  if constexpr (C::scheduled) {
    body(piece_of_member<C>(p, shared.taps));
  } else {
    Pieces pieces(p, shared.starts);
    Piece piece;
    while (pieces.next(&piece)) {
      if (piece.block < p.blocks) body(piece);
    }
  }
}

template <class C>
__device__ __forceinline__ void consume(const Params& p, const Shared& shared) {
  const int first_block = (threadIdx.x / 128 - 2) * C::own_blocks;
  const auto release = [&](int stage) {
    if (threadIdx.x % 32 == 0) ptx::barrier_arrive(shared.free + 8 * stage);
  };
  Ring<C::stages> ring;
  for_pieces<C>(p, shared, [&](const Piece& piece) {
    Sums<C> d;
#pragma unroll
    for (int m = 0; m < C::own_blocks; ++m) {
#pragma unroll
      for (int i = 0; i < C::columns / 2; ++i) d[m][i] = 0;
    }
    const auto pin_all = [&] {
#pragma unroll
      for (int m = 0; m < C::own_blocks; ++m) ptx::pin(d[m]);
    };
    pin_all();
    int multiplying = -1;  // the stage whose products may be unfinished
    const auto drain = [&] {
      ptx::wgmma_wait<0>();
      pin_all();
      if (multiplying >= 0) release(multiplying);
      multiplying = -1;
      release(ring.stage);
    };
    for (;;) {
      ptx::barrier_wait(shared.full + 8 * ring.stage, ring.parity);
      const int note = shared.notes[ring.stage];
      if (note == note_end) break;
      const int wanted =
          C::scheduled ? wanted_blocks<C>(note, first_block) : (1 << C::own_blocks) - 1;
      if (wanted != 0) {
        const uint32_t dy = shared.stages + ring.stage * C::stage_bytes + C::x_bytes;
        ptx::proxy_fence();
        pin_all();
        const uint32_t x = dy - C::x_bytes + first_block * 8192;
        if constexpr (C::scheduled) {
          multiply<C>(d, wanted, x, dy);
        } else {
          multiply_blocks<C, (1 << C::own_blocks) - 1>(d, x, dy);
        }
        ptx::wgmma_wait<1>();
        pin_all();
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
  });
}

template <class C>
__global__ void __launch_bounds__(C::threads, 1) grad_weight(const __grid_constant__ Params p) {
  extern __shared__ unsigned char memory[];
  Shared shared;
  const uint32_t skipped = -ptx::shared_address(memory) & 1023;
  unsigned char* behind = memory + skipped + C::stages * C::stage_bytes;
  shared.stages = ptx::shared_address(memory) + skipped;
  shared.slots = ptx::shared_address(behind);
  behind += C::slots_bytes;
  shared.full = ptx::shared_address(behind);
  shared.free = shared.full + 8 * C::stages;
  shared.slot_full = shared.free + 8 * C::stages;
  shared.slot_free = shared.slot_full + 8 * C::slots;
  behind += 16 * (C::stages + C::slots);
  shared.starts = reinterpret_cast<AxisPlace*>(behind);
  shared.taps = reinterpret_cast<int*>(behind);
  behind += C::scheduled ? 4 * p.groups * C::taps : 8 * (p.groups + 1);
  shared.slot_notes = reinterpret_cast<int*>(behind);
  shared.notes = shared.slot_notes + C::slots;
  shared.counts = shared.notes + C::stages;
  if (threadIdx.x < 32) {
    if constexpr (C::scheduled) {
      deal_taps<C>(p, shared.taps);
    } else {
      place_groups(p, shared.starts);
    }
  } else if (threadIdx.x == 32) {
    for (int stage = 0; stage < C::stages; ++stage) {
      ptx::barrier_init(shared.full + 8 * stage, 128 + 1);  // producer threads, the note
      ptx::barrier_init(shared.free + 8 * stage, 8);        // consumer warps
    }
    for (int slot = 0; slot < C::slots; ++slot) {
      // A warp's copies and its note, or one thread for all.
      ptx::barrier_init(shared.slot_full + 8 * slot, C::scheduled ? 32 + 1 : 1);
      ptx::barrier_init(shared.slot_free + 8 * slot, 4);  // producer warps
    }
    ptx::barrier_init_fence();
  }
  __syncthreads();
  ptx::let_next_launch_start();
  if (threadIdx.x < 128) {
    ptx::registers_down<C::producer_registers>();
    Producer<C> producer{p, shared, {}, {}};
    for_pieces<C>(p, shared, [&](const Piece& piece) { producer.run_piece(piece); });
  } else if (threadIdx.x < 256) {
    ptx::registers_down<C::producer_registers>();
    if (!C::scheduled && blockIdx.x == 0) {
      for (int g = threadIdx.x - 128; g <= p.groups; g += 128) p.starts[g] = shared.starts[g];
    }
    using Indexer = std::conditional_t<C::scheduled, BatchIndexer<C>, RowIndexer<C>>;
    Indexer indexer(p, shared);
    for_pieces<C>(p, shared, [&](const Piece& piece) { indexer.run_piece(piece); });
  } else {
    ptx::registers_up<C::consumer_registers>();
    consume<C>(p, shared);
  }
}

}  // namespace voxgemm::cuda::grad_weight_sm90
