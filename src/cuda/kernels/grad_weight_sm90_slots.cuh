// SPDX-License-Identifier: Apache-2.0
#pragma once

// How the copying warps of grad_weight_sm90.cuh come by their rows: indexers fill slots or a queue.

#include "cuda/kernels/grad_weight_sm90_pieces.cuh"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/copy.cuh"

namespace voxgemm::cuda::grad_weight_sm90 {

struct Shared {
  uint32_t batches;  // addresses in shared memory
  uint32_t full;     // their barriers
  uint32_t free;
  uint32_t slots;      // with a schedule; else the queue: [queue_rows] pairs of rows, input first
  uint32_t slot_full;  // barriers of the slots, or of the two rounds in the queue
  uint32_t slot_free;
  int* slot_notes;  // [slots], or the rows of a round
  int* notes;       // [batches]
  int* counts;      // [2, 4 warps], of one tap a group
};

// A batch's note: the sets of taps that share blocks of which it has any, as bits; 1 without a
// schedule. A piece ends with a batch of none.
// In the note of a round without a schedule, beside the number of its rows: a piece ends.
constexpr int round_last = 1 << 30;

// A block in a batch's place: those of dy are behind those of x.
template <class C>
__device__ inline uint32_t block_at(const Shared& shared, int place, int block) {
  return shared.batches + place * C::batch_bytes + block * C::terms * 8192;
}

// Of the warpgroup that fills slots.
__device__ inline int lane() { return threadIdx.x % 32; }
__device__ inline int warp() { return threadIdx.x % 128 / 32; }

// Fills slots with the batches of a schedule that have a tap of the group. All four warps look at
// all batches; each serves the slots of its number.
template <class C>
struct BatchIndexer {
  const Params& p;
  const Shared& shared;
  ptx::Ring<C::slots> ring = {};

  __device__ void run_piece(const Piece& piece) {
    const int count = static_cast<int>((p.rows + tile_rows - 1) / tile_rows) * quarters;
    const int team = static_cast<int>(blockIdx.x) / p.members;
    // In masks, of this lane's tap of the group; of none one that no mask has.
    const int tap = lane() < C::taps ? p.tap_of<C>(piece.group, lane()) : -1;
    const int bit = tap < 0 ? 31 : tap;
    int bits[C::taps];
    unroll<C::taps>([&](int j) { bits[j] = __shfl_sync(0xffffffff, bit, j); });
    const int step = 32 * p.teams;
    Look next = look(team + lane() * p.teams, count);
    for (int base = team; base < count; base += step) {
      Look now = next;
      next = look(now.batch + step, count);
      int sets = 0;
      unroll<C::taps>([&](int j) {
        now.taps |= (now.mask >> bits[j] & 1) << j;
        sets |= (now.mask >> bits[j] & 1) << j / C::block_taps;
      });
      for (uint32_t found = __ballot_sync(0xffffffff, sets != 0); found != 0; found &= found - 1) {
        const int from = __ffs(found) - 1;
        const int note = __shfl_sync(0xffffffff, sets, from);
        if (ring.at % 4 == warp()) fill(now, bit, from, note);
        ring.next();
      }
    }
    if (ring.at % 4 == warp()) {
      claim();
      finish(0);
    }
    ring.next();
  }

  // A batch as this lane sees it.
  struct Look {
    int batch = 0;
    uint32_t mask = 0;
    uint32_t tile_mask = 0;
    int4 tile = {};
    int taps = 0;
  };

  __device__ Look look(int batch, int count) const {
    Look found = {batch};
    if (batch >= count) return found;
    const int number = batch / quarters;
    const uint4 masks = __ldg(reinterpret_cast<const uint4*>(p.masks) + number);
    found.tile = __ldg(p.tiles + number);
    found.mask = __ldg(p.masks + batch);
    found.tile_mask = masks.x | masks.y | masks.z | masks.w;
    return found;
  }

  // With the batch that lane `from` looks at; bit: of this lane's tap.
  __device__ void fill(const Look& looks, int bit, int from, int note) {
    const auto of = [&](auto value) { return __shfl_sync(0xffffffff, value, from); };
    const int taps = of(looks.taps);
    const uint32_t mask = of(looks.tile_mask);
    const int first = of(looks.batch) % quarters * batch_rows;  // in the tile
    const int left = of(looks.tile.z) - first;
    const int32_t* order = p.order + of(looks.tile.x) + first;
    const int32_t* indices = p.indices + static_cast<int64_t>(of(looks.tile.y)) * tile_rows + first;
    // List number `lane`, null where it has no row or not all.
    const int32_t* own = nullptr;
    if (lane() < C::taps && (taps >> lane() & 1) != 0) {
      own = indices + __popc(mask & ((1u << bit) - 1)) * tile_rows;
    } else if (lane() == C::taps && left >= batch_rows) {
      own = order;
    }
    claim();
    const uint32_t slot = shared.slots + ring.at * C::slot_bytes;
    const int at = lane() % 16 * 4;  // four rows of a list
#pragma unroll
    for (int first_list = 0; first_list < C::taps + 1; first_list += 2) {
      const int j = first_list + lane() / 16;
      const auto* list = reinterpret_cast<const int32_t*>(
          __shfl_sync(0xffffffff, reinterpret_cast<unsigned long long>(own), j));
      const uint32_t to = slot + (j * batch_rows + at) * 4;
      if (list != nullptr) {
        ptx::copy_16(to, list + at, true);
      } else if (C::block_taps > 1 && j < C::taps) {
        ptx::shared<int4>(to) = make_int4(-1, -1, -1, -1);
      }
    }
    if (left < batch_rows) {
      for (int i = lane(); i < batch_rows; i += 32) {
        ptx::shared<int>(slot + (C::taps * batch_rows + i) * 4) = i < left ? __ldg(order + i) : -1;
      }
    }
    finish(note);
  }

  __device__ void claim() const {
    ptx::barrier_wait(shared.slot_free + 8 * ring.at, ring.parity ^ 1);
  }

  __device__ void finish(int note) const {
    const uint32_t full = shared.slot_full + 8 * ring.at;
    ptx::copies_arrive(full);
    __syncwarp();
    if (lane() == 0) {
      shared.slot_notes[ring.at] = note;
      ptx::barrier_arrive(full);
    }
  }
};

// Appends the rows that have the group's only tap to the queue, in rounds of which two stand in it.
template <class C>
struct RowIndexer {
  const Params& p;
  const Shared& shared;
  ptx::Ring<2> ring = {};
  int end = 0;   // of the rows in the queue
  int base = 0;  // of the batches: found are of the 32 before
  uint32_t found = 0;

  __device__ void run_piece(const Piece& piece) {
    base = 0;
    found = 0;
    Neighbours rounds[rounds_ahead];
    bool more[rounds_ahead];
    unroll<rounds_ahead>([&](int i) { more[i] = read(piece, &rounds[i]); });
    for (bool last = false; !last;) {
      // Unrolled, so that no neighbours on their way are waited for to change registers.
#pragma unroll
      for (int i = 0; i < rounds_ahead; ++i) {
        if (last) break;
        last = !more[(i + 1) % rounds_ahead];
        append(rounds[i], last);
        more[i] = read(piece, &rounds[i]);
      }
    }
  }

  // Of row i % 2 * 32 + lane of the warp's batch i / 2.
  struct Neighbours {
    int in[C::reads];
    int out[C::chunks];  // first output row of a batch, this lane's
  };
  // Loads behind copies of 200 kB take 4000 clocks, in which a round or two are copied.
  static constexpr int rounds_ahead = 4;

  // The piece's next batch, -1 after the last: the same in all warps.
  __device__ int next_batch(const Piece& piece) {
    const auto count = static_cast<int>((p.rows + batch_rows - 1) / batch_rows);
    while (found == 0) {
      if (base >= count) return -1;
      const int batch = base + lane();
      found = __ballot_sync(0xffffffff, batch < count && piece.has(batch));
      base += 32;
    }
    const int bit = __ffs(found) - 1;
    found &= found - 1;
    return base - 32 + bit;
  }

  // Whether there was a batch left; else all are absent.
  __device__ bool read(const Piece& piece, Neighbours* to) {
    bool any = false;
    unroll<C::chunks>([&](int chunk) {
      int mine = -1;
      unroll<4>([&](int w) {
        const int batch = next_batch(piece);
        any = any || batch >= 0;
        if (w == warp()) mine = batch;
      });
      to->out[chunk] = mine * batch_rows + lane();
      unroll<batch_rows / 32>([&](int i) {
        const int64_t row = static_cast<int64_t>(mine) * batch_rows + i * 32 + lane();
        const bool there = mine >= 0 && row < p.rows;
        to->in[chunk * (batch_rows / 32) + i] =
            there ? __ldg(p.neighbours + piece.group * p.rows + row) : -1;
      });
    });
    return any;
  }

  __device__ void append(const Neighbours& rows, bool last) {
    const int thread = threadIdx.x % 128;
    int own = 0;          // rows of this warp
    int place[C::reads];  // of this lane's, among them
    unroll<C::reads>([&](int i) {
      const uint32_t votes = __ballot_sync(0xffffffff, rows.in[i] >= 0);
      place[i] = own + __popc(votes & ((1u << lane()) - 1));
      own += __popc(votes);
    });
    int* counts = shared.counts + 4 * ring.at;
    if (lane() == 0) counts[warp()] = own;
    ptx::named_barrier(1, 128);
    int begin = end;
    int all = 0;
    unroll<4>([&](int w) {
      const int count = counts[w];
      if (w < warp()) begin += count;
      all += count;
    });
    ptx::barrier_wait(shared.slot_free + 8 * ring.at, ring.parity ^ 1);
    unroll<C::reads>([&](int i) {
      if (rows.in[i] >= 0) store(begin + place[i], rows.in[i], rows.out[i / 2] + i % 2 * 32);
    });
    end += all;
    if (end >= C::queue_rows) end -= C::queue_rows;
    if (last) {
      // Absent rows behind the last ones.
      const int missing = -end & (batch_rows - 1);
      if (thread < missing) store(end + thread, -1, -1);
      end = end + missing == C::queue_rows ? 0 : end + missing;
    }
    if (thread == 0) shared.slot_notes[ring.at] = last ? all | round_last : all;
    ptx::barrier_arrive(shared.slot_full + 8 * ring.at);
    ring.next();
  }

  __device__ void store(int at, int in, int out) const {
    if (at >= C::queue_rows) at -= C::queue_rows;
    ptx::shared<int2>(shared.slots + at * 8) = make_int2(in, out);
  }
};

}  // namespace voxgemm::cuda::grad_weight_sm90
