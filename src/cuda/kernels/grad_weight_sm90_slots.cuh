// SPDX-License-Identifier: Apache-2.0
#pragma once

// How the copying warps of a weight gradient on Hopper come by their rows: indexers fill slots with
// batches; see grad_weight_sm90.cuh.

#include "cuda/kernels/grad_weight_sm90_pieces.cuh"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/copy.cuh"

namespace voxgemm::cuda::grad_weight_sm90 {

struct Shared {
  uint32_t stages;  // addresses in shared memory
  uint32_t full;    // barriers of the stages
  uint32_t free;
  uint32_t slots;
  uint32_t slot_full;  // barriers of the slots
  uint32_t slot_free;
  int* slot_notes;    // [slots]
  int* notes;         // [stages]
  int* counts;        // [4 warps]
  AxisPlace* starts;  // [groups + 1], without a schedule
  int* taps;          // [groups, taps of a group], with one
};

// A note has the taps of a batch as bits. A piece ends with a batch of none.
constexpr int note_end = 0;

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

// Whether a batch needs a block of x.
template <class C>
__device__ __forceinline__ bool has_block(int note, int block) {
  constexpr uint32_t taps = C::block_taps == 32 ? ~0u : (1u << C::block_taps) - 1;
  return (static_cast<uint32_t>(note) >> (block / C::in_blocks * C::block_taps) & taps) != 0;
}

// Fills slots with the batches of a schedule that have a tap of the group. All four warps look at
// all batches; each serves the slots of its number.
template <class C>
class BatchIndexer {
 public:
  __device__ __forceinline__ BatchIndexer(const Params& p, const Shared& shared)
      : p_(p), shared_(shared) {}

  __device__ __forceinline__ void run_piece(const Piece& piece) {
    const int count = p_.batches();
    int taps[C::taps];  // 31 behind the last, where no batch has one
#pragma unroll
    for (int j = 0; j < C::taps; ++j) taps[j] = piece.taps[j] < 0 ? 31 : piece.taps[j];
    const int step = 32 * piece.step;
    int batch = static_cast<int>(piece.low) + lane() * piece.step;
    Look next = look(batch, count);
    for (int base = static_cast<int>(piece.low); base < count; base += step, batch += step) {
      Look now = next;
      next = look(batch + step, count);
#pragma unroll
      for (int j = 0; j < C::taps; ++j) now.note |= (now.mask >> taps[j] & 1) << j;
      for (uint32_t found = __ballot_sync(0xffffffff, now.note != 0); found != 0;
           found &= found - 1) {
        if (ring_.stage % 4 == warp()) fill(piece, now, batch, __ffs(found) - 1);
        ring_.next();
      }
    }
    if (ring_.stage % 4 == warp()) finish(note_end);
    ring_.next();
  }

 private:
  // A batch as this lane sees it.
  struct Look {
    uint32_t mask = 0;
    uint32_t tile_mask = 0;
    int4 tile = {};
    int note = 0;
  };

  __device__ __forceinline__ static int lane() { return threadIdx.x % 32; }
  __device__ __forceinline__ static int warp() { return threadIdx.x % 128 / 32; }

  __device__ __forceinline__ Look look(int batch, int count) const {
    Look found;
    if (batch >= count) return found;
    const int number = batch / (tile_rows / batch_rows);
    const uint4 masks = __ldg(reinterpret_cast<const uint4*>(p_.masks) + number);
    found.tile = __ldg(p_.tiles + number);
    found.mask = __ldg(p_.masks + batch);
    found.tile_mask = masks.x | masks.y | masks.z | masks.w;
    return found;
  }

  // The batch that lane `from` holds.
  __device__ __forceinline__ void fill(const Piece& piece, const Look& looks, int batch, int from) {
    const auto of = [&](auto value) { return __shfl_sync(0xffffffff, value, from); };
    const int note = of(looks.note);
    const uint32_t mask = of(looks.tile_mask);
    const int quarter = of(batch) % (tile_rows / batch_rows);
    const int left = of(looks.tile.z) - quarter * batch_rows;
    const int32_t* order = p_.order + of(looks.tile.x) + quarter * batch_rows;
    const int32_t* indices =
        p_.indices + static_cast<int64_t>(of(looks.tile.y)) * tile_rows + quarter * batch_rows;
    ptx::barrier_wait(shared_.slot_free + 8 * ring_.stage, ring_.parity ^ 1);
    const uint32_t slot = shared_.slots + ring_.stage * C::slot_bytes;
    const int at = lane() % 16 * 4;  // four rows of a list
#pragma unroll
    for (int j = lane() / 16; j < C::taps + 1; j += 2) {
      const uint32_t to = slot + (j * batch_rows + at) * 4;
      if (j == C::taps) {
        if (left >= batch_rows) {
          ptx::copy_16(to, order + at, true);
        } else {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            ptx::store_shared(to + 4 * i, at + i < left ? __ldg(order + at + i) : -1);
          }
        }
      } else if ((note >> j & 1) != 0) {
        const int block = __popc(mask & ((1u << piece.taps[j]) - 1));
        ptx::copy_16(to, indices + block * tile_rows + at, true);
      } else if (C::block_taps > 1) {
#pragma unroll
        for (int i = 0; i < 4; ++i) ptx::store_shared(to + 4 * i, -1);
      }
    }
    finish(note);
  }

  __device__ __forceinline__ void finish(int note) const {
    if (note == note_end) ptx::barrier_wait(shared_.slot_free + 8 * ring_.stage, ring_.parity ^ 1);
    const uint32_t full = shared_.slot_full + 8 * ring_.stage;
    ptx::copies_arrive(full);
    __syncwarp();
    if (lane() == 0) {
      shared_.slot_notes[ring_.stage] = note;
      ptx::barrier_arrive(full);
    }
  }

  const Params& p_;
  const Shared& shared_;
  Ring<C::slots> ring_;
};

// Fills slots with the rows that have the group's only tap.
template <class C>
class RowIndexer {
 public:
  __device__ __forceinline__ RowIndexer(const Params& p, const Shared& shared)
      : p_(p), shared_(shared) {}

  __device__ __forceinline__ void run_piece(const Piece& piece) {
    Batches batches(p_, piece);
    Neighbours rounds[rounds_ahead];
    bool more[rounds_ahead];
#pragma unroll
    for (int i = 0; i < rounds_ahead; ++i) more[i] = read(piece, &batches, &rounds[i]);
    for (bool last = false; !last;) {
      // Unrolled, so that no neighbours on their way are waited for to change registers.
#pragma unroll
      for (int i = 0; i < rounds_ahead; ++i) {
        if (last) break;
        last = !more[(i + 1) % rounds_ahead];
        append(rounds[i], last);
        more[i] = read(piece, &batches, &rounds[i]);
      }
    }
  }

 private:
  // Of row i % 2 * 32 + lane of the warp's batch i / 2.
  struct Neighbours {
    int in[C::reads];
    int out[C::chunks];  // first output row of a batch, this lane's
  };
  static constexpr int rounds_ahead = 2;

  // Whether there was a batch left; else all are absent.
  __device__ __forceinline__ bool read(const Piece& piece, Batches* batches, Neighbours* to) const {
    const int warp = threadIdx.x % 128 / 32;
    const int lane = threadIdx.x % 32;
    bool any = false;
#pragma unroll
    for (int chunk = 0; chunk < C::chunks; ++chunk) {
      int mine = -1;
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const int batch = batches->next();
        any = any || batch >= 0;
        if (w == warp) mine = batch;
      }
      to->out[chunk] = mine * batch_rows + lane;
#pragma unroll
      for (int i = 0; i < batch_rows / 32; ++i) {
        const int64_t row = static_cast<int64_t>(mine) * batch_rows + i * 32 + lane;
        const bool there = mine >= 0 && row < p_.rows;
        to->in[chunk * (batch_rows / 32) + i] =
            there ? __ldg(p_.neighbours + piece.group * p_.rows + row) : -1;
      }
    }
    return any;
  }

  __device__ __forceinline__ void append(const Neighbours& rows, bool last) {
    const int thread = threadIdx.x % 128;
    const int warp = thread / 32;
    int own = 0;          // rows of this warp
    int place[C::reads];  // of this lane's, among them
#pragma unroll
    for (int i = 0; i < C::reads; ++i) {
      const uint32_t votes = __ballot_sync(0xffffffff, rows.in[i] >= 0);
      place[i] = own + __popc(votes & ((1u << thread % 32) - 1));
      own += __popc(votes);
    }
    if (thread % 32 == 0) shared_.counts[warp] = own;
    ptx::named_barrier(1, 128);
    int begin = filled_;  // of the warp's rows, in the slot at hand and those behind it
    int end = filled_;
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const int count = shared_.counts[w];
      if (w < warp) begin += count;
      end += count;
    }
    if (last) end = (end + batch_rows - 1) / batch_rows * batch_rows;
    Ring<C::slots> ring = ring_;
    for (int at = 0; at < end; at += batch_rows) {
      ptx::barrier_wait(shared_.slot_free + 8 * ring.stage, ring.parity ^ 1);
      ring.next();
    }
#pragma unroll
    for (int i = 0; i < C::reads; ++i) {
      if (rows.in[i] < 0) continue;
      store(begin + place[i], rows.in[i], rows.out[i / 2] + i % 2 * 32);
    }
    if (last) {
      // Absent rows behind the last ones; the last warp's end is that of all.
      int all = filled_;
#pragma unroll
      for (int w = 0; w < 4; ++w) all += shared_.counts[w];
      if (all + thread < end) store(all + thread, -1, -1);
    }
    ptx::named_barrier(1, 128);
    for (; end >= batch_rows; end -= batch_rows) complete(1);
    filled_ = end;
    if (last) {
      ptx::barrier_wait(shared_.slot_free + 8 * ring_.stage, ring_.parity ^ 1);
      complete(note_end);
    }
  }

  __device__ __forceinline__ void store(int at, int in, int out) const {
    int slot = ring_.stage + at / batch_rows;
    if (slot >= C::slots) slot -= C::slots;
    const uint32_t to = shared_.slots + slot * C::slot_bytes + at % batch_rows * 4;
    ptx::store_shared(to, in);
    ptx::store_shared(to + batch_rows * 4, out);
  }

  __device__ __forceinline__ void complete(int note) {
    if (threadIdx.x % 128 == 0) {
      shared_.slot_notes[ring_.stage] = note;
      ptx::barrier_arrive(shared_.slot_full + 8 * ring_.stage);
    }
    ring_.next();
  }

  const Params& p_;
  const Shared& shared_;
  Ring<C::slots> ring_;  // the slot at hand
  int filled_ = 0;       // rows in it
};

}  // namespace voxgemm::cuda::grad_weight_sm90
