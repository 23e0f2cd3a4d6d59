// SPDX-License-Identifier: Apache-2.0
//
// y[o] = bias + sum over taps of x[in(o, t)] W[t], and dW[t] = sum over pairs of x[i]^T dy[o], as
// loops.
//
// Forward: a warp owns 4 rows and 32 columns, a lane one column; a weight is read once for the 4
// rows, and a row's operand by all lanes at once. Taps and channels go up, one fused multiply-add
// each, in f32 (f64 for f64); the bias comes last, then one rounding. A tap that a row lacks is
// passed over: an infinite weight of an absent neighbour does not count.
//
// Weight gradient: a warp owns 4 input channels and 32 output channels of one tap and one slice of
// the rows, and adds the pairs of its rows in rising order. With more than one slice the partial
// sums go to memory and are added in order by add_slices. Slices depend on the problem alone, so
// the bits do too.
//
// Nothing is in shared memory and nothing is synchronised.
#pragma once

#include "cuda/float.cuh"
#include "cuda/launch.cuh"

namespace voxgemm::cuda {

constexpr int naive_warps = 8;
constexpr int naive_rows = 4;      // of a warp
constexpr int naive_columns = 32;  // of a warp
constexpr int naive_inputs = 4;    // input channels of a warp in the weight gradient

// Element (tap, in, out) of weights.
template <class T>
struct Weights {
  T* data;
  int64_t tap_stride;
  int64_t in_stride;
  int64_t out_stride;
};

template <class T>
struct NaiveForward {
  const int32_t* neighbours;  // [taps, rows]
  int64_t rows;
  int taps;
  bool mirror_taps;
  int c_in;
  int c_out;
  const T* x;
  int64_t x_stride;
  Weights<const T> w;
  const T* bias;  // [c_out] or null
  T* y;
  int64_t y_stride;
};

template <class T>
__global__ void __launch_bounds__(32 * naive_warps) naive_forward(NaiveForward<T> conv) {
  const int warp = threadIdx.x / 32;
  const int column = blockIdx.y * naive_columns + threadIdx.x % 32;
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * naive_warps + warp) * naive_rows;
  if (column >= conv.c_out) return;
  Sum<T> sums[naive_rows] = {};
  for (int tap = 0; tap < conv.taps; ++tap) {
    const T* x[naive_rows];
    bool any = false;
    for (int r = 0; r < naive_rows; ++r) {
      const int32_t in = first + r < conv.rows ? conv.neighbours[tap * conv.rows + first + r] : -1;
      x[r] = in >= 0 ? conv.x + in * conv.x_stride : nullptr;
      any = any || in >= 0;
    }
    if (!any) continue;
    const int of_tap = conv.mirror_taps ? conv.taps - 1 - tap : tap;
    const T* w = conv.w.data + of_tap * conv.w.tap_stride + column * conv.w.out_stride;
    for (int k = 0; k < conv.c_in; ++k) {
      const Sum<T> weight = widen(w[k * conv.w.in_stride]);
      for (int r = 0; r < naive_rows; ++r) {
        if (x[r] != nullptr) sums[r] = fma(static_cast<Sum<T>>(widen(x[r][k])), weight, sums[r]);
      }
    }
  }
  const Sum<T> bias = conv.bias != nullptr ? widen(conv.bias[column]) : Sum<T>(0);
  for (int r = 0; r < naive_rows; ++r) {
    if (first + r >= conv.rows) return;
    store(conv.bias != nullptr ? sums[r] + bias : sums[r],
          &conv.y[(first + r) * conv.y_stride + column]);
  }
}

template <class T, class Result>
struct NaiveGradWeight {
  const int32_t* neighbours;  // [taps, rows]
  int64_t rows;
  int taps;
  int c_in;
  int c_out;
  const T* x;
  int64_t x_stride;
  const T* dy;
  int64_t dy_stride;
  Weights<Result> dw;
  int slices;
  Sum<T>* partial;  // [slices, taps, c_in, c_out], or null with one slice
};

template <class T, class Result>
__global__ void __launch_bounds__(32 * naive_warps)
    naive_grad_weight(NaiveGradWeight<T, Result> conv) {
  const int lane = threadIdx.x % 32;
  const int inputs = naive_warps * naive_inputs;
  const int blocks_in = (conv.c_in + inputs - 1) / inputs;
  const int64_t block = blockIdx.x / blocks_in;
  const int tap = static_cast<int>(block % conv.taps);
  const int64_t slice = block / conv.taps;
  const int k0 = (blockIdx.x % blocks_in) * inputs + threadIdx.x / 32 * naive_inputs;
  const int column = blockIdx.y * naive_columns + lane;
  if (k0 >= conv.c_in) return;
  const int64_t end = (slice + 1) * conv.rows / conv.slices;
  const int32_t* neighbours = conv.neighbours + tap * conv.rows;
  Sum<T> sums[naive_inputs] = {};
  for (int64_t first = slice * conv.rows / conv.slices; first < end; first += 32) {
    const int32_t mine = first + lane < end ? neighbours[first + lane] : -1;
    unsigned present = __ballot_sync(0xffffffff, mine >= 0);
    for (; present != 0; present &= present - 1) {
      const int r = __ffs(present) - 1;
      const int32_t in = __shfl_sync(0xffffffff, mine, r);
      const T* x = conv.x + in * conv.x_stride + k0;
      const Sum<T> dy =
          column < conv.c_out ? widen(conv.dy[(first + r) * conv.dy_stride + column]) : Sum<T>(0);
      for (int k = 0; k < naive_inputs; ++k) {
        if (k0 + k < conv.c_in) sums[k] = fma(static_cast<Sum<T>>(widen(x[k])), dy, sums[k]);
      }
    }
  }
  if (column >= conv.c_out) return;
  for (int k = 0; k < naive_inputs && k0 + k < conv.c_in; ++k) {
    if (conv.partial != nullptr) {
      const int64_t matrix = (slice * conv.taps + tap) * conv.c_in + k0 + k;
      conv.partial[matrix * conv.c_out + column] = sums[k];
    } else {
      store(sums[k], &conv.dw.data[tap * conv.dw.tap_stride + (k0 + k) * conv.dw.in_stride +
                                   column * conv.dw.out_stride]);
    }
  }
}

template <class T, class Result>
__global__ void add_slices(NaiveGradWeight<T, Result> conv) {
  const int64_t size = static_cast<int64_t>(conv.taps) * conv.c_in * conv.c_out;
  for (int64_t i = thread_index(); i < size; i += thread_count()) {
    Sum<T> sum = conv.partial[i];
    for (int slice = 1; slice < conv.slices; ++slice) sum += conv.partial[slice * size + i];
    const int64_t column = i % conv.c_out;
    const int64_t k = i / conv.c_out % conv.c_in;
    const int64_t tap = i / conv.c_out / conv.c_in;
    store(sum, &conv.dw.data[tap * conv.dw.tap_stride + k * conv.dw.in_stride +
                             column * conv.dw.out_stride]);
  }
}

}  // namespace voxgemm::cuda
