// SPDX-License-Identifier: Apache-2.0
//
// Results that are combinations of a few rows of a matrix: y[r] = op over taps t of x[rows(t, r)].
//
// A thread owns `Op::width` columns (16 bytes where everything is aligned to that, else one) of
// `Op::rows` result rows and keeps their state in registers; what an op has per tap, such as
// weights, is loaded once for all of them. Neighbouring lanes own neighbouring columns, then rows:
// a warp reads whole lines of x, and what the rows of a block share of x is in L1.
//
// The row numbers of a block's rows come to shared memory first, all taps of a chunk at once
// ([rows of the block][pitch], tap by tap from the table, so both sides move whole lines): a thread
// that loaded them tap by tap would wait for memory twice in every tap. Then two taps of all rows
// are read before the first is added. Absent rows are not read. Taps are added in their order.
// What limits it is the instructions that find out which rows are there, not the memory.
#pragma once

#include <bit>
#include <type_traits>

#include "cuda/aligned.h"
#include "cuda/float.cuh"
#include "cuda/launch.cuh"
#include "cuda/unroll.cuh"
#include "voxgemm/kernel_map.h"

namespace voxgemm::cuda {

// n elements that are moved at once. Pairs of 16 bits stay together in a register.
template <class T, int n>
struct alignas(sizeof(T) * n < 16 ? sizeof(T) * n : 16) Pack {
  static constexpr bool paired = sizeof(T) == 2 && n % 2 == 0;
  using Word = std::conditional_t<paired, uint32_t, T>;
  Word v[paired ? n / 2 : n];

  __device__ Sum<T> get(int i) const {
    if constexpr (!paired) {
      return widen(v[i]);
    } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
      return __uint_as_float(i % 2 == 0 ? v[i / 2] << 16 : v[i / 2] & 0xffff0000);
    } else {
      const __half2 pair = reinterpret_cast<const __half2&>(v[i / 2]);
      return i % 2 == 0 ? __low2float(pair) : __high2float(pair);
    }
  }
  // Even elements first.
  __device__ void set(int i, Sum<T> value) {
    T element;
    store(value, &element);
    if constexpr (!paired) {
      v[i] = element;
    } else {
      const uint32_t bits = reinterpret_cast<const uint16_t&>(element);
      v[i / 2] = i % 2 == 0 ? bits : v[i / 2] | bits << 16;
    }
  }
};

template <class T, int n>
__device__ inline Pack<T, n> load_pack(const T* from) {
  return *reinterpret_cast<const Pack<T, n>*>(from);
}
template <class T, int n>
__device__ inline void store_pack(const Pack<T, n>& pack, T* to) {
  *reinterpret_cast<Pack<T, n>*>(to) = pack;
}

// Of a thread's columns.
template <class T, int n>
struct Sums {
  Sum<T> v[n] = {};

  __device__ void add(const Pack<T, n>& x, Sum<T> weight) {
    for (int i = 0; i < n; ++i) v[i] += weight * x.get(i);
  }
  __device__ void add(const Pack<T, n>& x, const Pack<T, n>& weights) {
    for (int i = 0; i < n; ++i) v[i] += weights.get(i) * x.get(i);
  }
  __device__ void join(const Sums& later) {
    for (int i = 0; i < n; ++i) v[i] += later.v[i];
  }
  __device__ void write(T* to, Sum<T> divisor = 1) const {
    Pack<T, n> pack;
    for (int i = 0; i < n; ++i) pack.set(i, v[i] / divisor);
    store_pack(pack, to);
  }
  template <class Arguments>
  __device__ void write(const Arguments& a, int64_t row, int64_t col) const {
    write(a.y.at(row, col));
  }
};

// Row `in` of x comes to result row `out`; its row number is at `place` of all.
struct Step {
  int64_t out;
  uint32_t in;
  int64_t place;
};

// What the ops of states have in common that know what to do with a row: state.add(arguments, x,
// step, column) and state.write(arguments, row, column).
template <class T, int n, class A, class S>
struct StateOp {
  using Element = T;
  using Arguments = A;
  using State = S;
  static constexpr int width = n;
  static constexpr int rows = 2;
  static constexpr int blocks = 6;

  A a;
  int64_t col;
  __device__ int tap(int) const { return 0; }
  __device__ void add(S* state, const Pack<T, n>& x, int, const Step& step) const {
    state->add(a, x, step, col);
  }
  __device__ void finish(const S& state, int64_t row) const { state.write(a, row, col); }
};

// Where the row numbers are, and the shapes. Numbers outside [0, rows_in) are absent.
struct Gather {
  const int32_t* rows;  // of (tap, r) at tap * tap_stride + r * row_stride
  int64_t tap_stride;
  int64_t row_stride;
  int taps;
  uint32_t rows_in;
  int64_t rows_out;
  int64_t cols;
  uint32_t x_bytes;    // between rows of x
  int lane_bits = 0;   // 2^lane_bits lanes share a row
  int row_bits = 0;    // a block has 2^row_bits rows in hand
  int chunk_taps = 0;  // whose row numbers are in shared memory at a time; even
  int pitch = 0;       // of row numbers in shared memory

  int block_rows() const { return 1 << row_bits; }
};

// The distance of two rows.
inline uint32_t row_bytes(const MatrixRef& m) {
  const uint64_t bytes = static_cast<uint64_t>(m.stride) * size_of(m.dtype);
  check(m.rows <= 1 || bytes <= UINT32_MAX, ErrorCode::unsupported, "rows are ", bytes,
        " bytes apart, expected less than 2^32");
  return static_cast<uint32_t>(bytes);
}

// Of a kernel map's table and the matrix that is read.
inline Gather gather_of(const KernelMap& map, const MatrixRef& x) {
  return {.rows = map.neighbours.as<int32_t>(),
          .tap_stride = map.n_out,
          .row_stride = 1,
          .taps = map.taps(),
          .rows_in = static_cast<uint32_t>(map.n_in),
          .rows_out = map.n_out,
          .cols = x.cols,
          .x_bytes = row_bytes(x)};
}

constexpr int gather_threads = 128;
// Row numbers in shared memory at a time: 16 KiB leave L1 most of its memory with 5 blocks.
constexpr int gather_numbers = 4096;

// Brings the row numbers of `taps` taps from `first_tap` on and of a block's rows to `numbers`;
// past the last tap and the last row they are absent.
__device__ inline void fetch_numbers(
    const Gather& g, int first_tap, int taps, int64_t first_row, int32_t* numbers) {
  const int rows_left = static_cast<int>(min(int64_t{1} << g.row_bits, g.rows_out - first_row));
  const int32_t* from = g.rows + first_tap * g.tap_stride + first_row * g.row_stride;
  const int taps_left = g.taps - first_tap;
#pragma unroll 4
  for (int i = static_cast<int>(threadIdx.x); i < taps << g.row_bits; i += gather_threads) {
    const int tap = i >> g.row_bits;
    const int row = i & ((1 << g.row_bits) - 1);
    const bool exists = tap < taps_left && row < rows_left;
    const int32_t number = exists ? from[tap * g.tap_stride + row * g.row_stride] : -1;
    numbers[row * g.pitch + tap] = static_cast<uint32_t>(number) < g.rows_in ? number : -1;
  }
}

// Hides how an address came about, so that it stays in its registers: left alone, the compiler
// computes it again at every use, a third of the loop.
template <class P>
__device__ inline const P* kept(const P* pointer) {
  asm("" : "+l"(pointer));
  __builtin_assume(__isGlobal(pointer));
  return pointer;
}

// A row of a matrix from some column on.
template <class X>
__device__ inline const X* row_of(const void* column, int32_t row, uint32_t bytes) {
  return reinterpret_cast<const X*>(static_cast<const char*>(column) +
                                    static_cast<uint64_t>(static_cast<uint32_t>(row)) * bytes);
}

template <class Op>
__global__ __launch_bounds__(gather_threads, blocks_here(Op::blocks)) void gather_rows(
    Gather g, const typename Op::Element* x, typename Op::Arguments arguments) {
  using X = Pack<typename Op::Element, Op::width>;
  extern __shared__ __align__(16) int32_t numbers[];  // [block_rows, pitch]
  const int slots = gather_threads >> g.lane_bits;
  const int slot = static_cast<int>(threadIdx.x) >> g.lane_bits;
  const int64_t lane = threadIdx.x & ((1 << g.lane_bits) - 1);
  const int64_t col = (static_cast<int64_t>(blockIdx.y) << g.lane_bits | lane) * Op::width;
  const int64_t first = static_cast<int64_t>(blockIdx.x) << g.row_bits;
  const typename Op::Element* column = kept(x + (col < g.cols ? col : 0));
  __shared__ uint32_t shared_bytes;
  shared_bytes = g.x_bytes;
  __syncthreads();
  const uint32_t x_bytes = *const_cast<volatile uint32_t*>(&shared_bytes);
  const int32_t* mine = numbers + slot * g.pitch;
  const int step = slots * g.pitch;
  const Op op{arguments, col < g.cols ? col : 0};
  typename Op::State states[Op::rows] = {};
  for (int chunk = 0; chunk < g.taps; chunk += g.chunk_taps) {
    const int taps = min(g.chunk_taps, g.taps - chunk);
    __syncthreads();
    fetch_numbers(g, chunk, (taps + 1) / 2 * 2, first, numbers);
    __syncthreads();
    for (int tap = 0; tap < taps && col < g.cols; tap += 2) {
      int2 in[Op::rows];
      X values[2][Op::rows];
      const decltype(op.tap(0)) data[2] = {op.tap(chunk + tap),
                                           op.tap(min(chunk + tap + 1, g.taps - 1))};
      unroll<Op::rows>([&](int i) {
        in[i] = *reinterpret_cast<const int2*>(mine + i * step + tap);
        if (in[i].x >= 0) values[0][i] = *row_of<X>(column, in[i].x, x_bytes);
        if (in[i].y >= 0) values[1][i] = *row_of<X>(column, in[i].y, x_bytes);
      });
      unroll<Op::rows>([&](int i) {
        const int64_t row = first + slot + i * slots;
        const auto add = [&](int t, int in) {
          const Step step = {row, static_cast<uint32_t>(in), row * g.taps + chunk + tap + t};
          if (in >= 0) op.add(&states[i], values[t][i], data[t], step);
        };
        add(0, in[i].x);
        add(1, in[i].y);
      });
    }
  }
  unroll<Op::rows>([&](int i) {
    const int64_t row = first + slot + i * slots;
    if (row < g.rows_out && col < g.cols) op.finish(states[i], row);
  });
}

// Fills in how a block is cut; 2^row_steps rows a slot.
inline void cut(Gather* g, int64_t packs, int row_steps) {
  while (g->lane_bits < 5 && (int64_t{1} << g->lane_bits) < packs) ++g->lane_bits;
  g->row_bits = std::bit_width(unsigned{gather_threads}) - 1 - g->lane_bits + row_steps;
  const int even_taps = (g->taps + 1) / 2 * 2;
  g->chunk_taps = std::min(even_taps, gather_numbers / g->block_rows() / 2 * 2);
  // Pairs of row numbers of neighbouring rows in different banks.
  g->pitch = g->chunk_taps % 4 == 0 ? g->chunk_taps + 2 : g->chunk_taps;
}

// Launches an op for all rows and columns.
template <class Op>
void gather(const Context& ctx,
            Gather g,
            const MatrixRef& x,
            const typename Op::Arguments& arguments) {
  const int64_t packs = ceil_div(g.cols, Op::width);
  cut(&g, packs, std::bit_width(unsigned{Op::rows}) - 1);
  launch(ctx,
         {.blocks = ceil_div(g.rows_out, g.block_rows()),
          .columns = ceil_div(packs, int64_t{1} << g.lane_bits),
          .threads = gather_threads,
          .shared_bytes = sizeof(int32_t) * g.block_rows() * g.pitch},
         gather_rows<Op>, g, x.as<const typename Op::Element>(), arguments);
}

template <int value>
struct Width {
  static constexpr int n = value;
};

// body(Type<T>, Width<n>): packs of 16 bytes, or single elements.
template <class Body>
void dispatch_packs(Dtype dtype, bool wide, const Body& body) {
  dispatch_device_float(dtype, [&]<class T>(Type<T> type) {
    if (wide) return body(type, Width<16 / static_cast<int>(sizeof(T))>{});
    body(type, Width<1>{});
  });
}

}  // namespace voxgemm::cuda
