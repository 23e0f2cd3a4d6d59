// SPDX-License-Identifier: Apache-2.0
#pragma once

// What kernels know of a pass, and results over present rows one by one. Where a zero stands for an
// absent neighbour, an infinite factor makes NaN of it, which the neighbour must not: sums that
// come out NaN are computed once more here. Finite operands never get there.

#include "conv/kernel.h"
#include "cuda/float.cuh"
#include "cuda/launch.cuh"
#include "cuda/ptx/barrier.cuh"

namespace voxgemm::cuda {

struct WeightPlace {
  int tap;
  int in;
  int out;
};

// ConvArgs for kernels; strides in elements.
struct PassArgs {
  const int32_t* neighbours;  // [taps, rows]
  int64_t rows;
  int taps;
  bool mirror_taps;
  int c_in;
  int c_out;
  const void* x;  // [n_in, c_in]
  int64_t x_stride;
  void* w;  // [taps, c_in, c_out], the result of grad_weight
  int64_t tap_stride;
  int64_t in_stride;
  int64_t out_stride;
  bool w_is_f32;         // else of the operands' type
  const void* bias;      // [c_out] or null
  const void* residual;  // [rows, c_out] or null
  int64_t residual_stride;
  bool relu;
  void* y;  // [rows, c_out]; grad_weight: dy
  int64_t y_stride;
  // Of a schedule by masks, else null; see ScheduleParts.
  const int4* tiles = nullptr;
  const uint32_t* masks = nullptr;  // [.., rows of a tile / 64]
  const int32_t* order = nullptr;
  const int32_t* indices = nullptr;  // [.., rows of a tile]

  explicit PassArgs(const ConvArgs& args)
      : neighbours(args.map->neighbours.as<int32_t>()),
        rows(args.y.rows),
        taps(args.w.taps),
        mirror_taps(args.mirror_taps),
        c_in(args.w.c_in),
        c_out(args.w.c_out),
        x(args.x.data),
        x_stride(args.x.stride),
        w(args.w.data),
        tap_stride(args.w.tap_stride),
        in_stride(args.w.in_stride),
        out_stride(args.w.out_stride),
        w_is_f32(args.w.dtype == Dtype::f32),
        bias(args.bias),
        residual(args.residual.data),
        residual_stride(args.residual.stride),
        relu(args.relu),
        y(args.y.data),
        y_stride(args.y.stride) {
    if (args.schedule == nullptr) return;
    const ScheduleParts& parts = args.schedule->parts();
    tiles = parts.tiles.as<int4>();
    masks = parts.masks.as<uint32_t>();
    order = parts.order.as<int32_t>();
    indices = parts.indices.as<int32_t>();
  }

  __host__ __device__ int64_t w_size() const { return int64_t{taps} * c_in * c_out; }
  __device__ int weight_tap(int tap) const { return mirror_taps ? taps - 1 - tap : tap; }
  // At a position of the schedule's order.
  __device__ int64_t row_at(int64_t position) const {
    return order != nullptr ? __ldg(order + position) : position;
  }
  __device__ int64_t place_of(const WeightPlace& at) const {
    return at.tap * tap_stride + at.in * in_stride + at.out * out_stride;
  }

  // y[row, n] without the bias.
  template <class T>
  __device__ Sum<T> result_again(int64_t row, int n) const {
    Sum<T> sum = 0;
    for (int tap = 0; tap < taps; ++tap) {
      const int32_t in = neighbours[tap * rows + row];
      if (in < 0) continue;
      const T* from = static_cast<const T*>(x) + in * x_stride;
      const T* weights = static_cast<const T*>(w) + place_of({weight_tap(tap), 0, n});
      for (int k = 0; k < c_in; ++k) {
        sum += Sum<T>(widen(from[k])) * Sum<T>(widen(weights[k * in_stride]));
      }
      if (isnan(sum)) break;
    }
    return sum;
  }
  // Writes y[row, n].
  template <class T>
  __device__ void finish(int64_t row, int n, Sum<T> sum) const {
    if (bias != nullptr) sum += Sum<T>(widen(static_cast<const T*>(bias)[n]));
    if (residual != nullptr) {
      sum += Sum<T>(widen(static_cast<const T*>(residual)[row * residual_stride + n]));
    }
    store(rectified(sum), static_cast<T*>(y) + row * y_stride + n);
  }
  // NaN stays NaN.
  template <class S>
  __device__ S rectified(S sum) const {
    return relu && sum < 0 ? S(0) : sum;
  }
  // Writes it where it came out NaN.
  template <class T>
  __device__ void repair(int64_t row, int n) const {
    finish<T>(row, n, result_again<T>(row, n));
  }

  // dw there.
  template <class T>
  __device__ Sum<T> gradient_again(const WeightPlace& at) const {
    constexpr int batch = 8;  // of rows whose loads are under way at a time
    const T* from = static_cast<const T*>(x) + at.in;
    const T* dy = static_cast<const T*>(y) + at.out;
    Sum<T> sum = 0;
    for (int64_t first = 0; first < rows && !isnan(sum); first += batch) {
#pragma unroll
      for (int i = 0; i < batch; ++i) {
        const int64_t row = first + i;
        const int32_t in = row < rows ? neighbours[at.tap * rows + row] : -1;
        if (in >= 0) sum += Sum<T>(widen(from[in * x_stride])) * Sum<T>(widen(dy[row * y_stride]));
      }
    }
    return sum;
  }
  // Writes it, rounded.
  template <class T>
  __device__ void store_gradient(const WeightPlace& at, Sum<T> sum) const {
    if (w_is_f32) {
      store(sum, static_cast<float*>(w) + place_of(at));
    } else {
      store(sum, static_cast<T*>(w) + place_of(at));
    }
  }
  template <class T>
  __device__ void finish_gradient(const WeightPlace& at, Sum<T> sum) const {
    store_gradient<T>(at, isnan(sum) ? gradient_again<T>(at) : sum);
  }
};

// dw from the sums of slices, in order: each [taps, c_in, c_out] or, along_in, [c_out, taps, c_in].
template <class T>
__global__ void add_slices(const __grid_constant__ PassArgs p,
                           const Sum<T>* sums,
                           int slices,
                           bool along_in) {
  const int64_t size = p.w_size();
  for (int64_t i = thread_index(); i < size; i += thread_count()) {
    Sum<T> sum = sums[i];
    for (int slice = 1; slice < slices; ++slice) sum += sums[slice * size + i];
    WeightPlace at;
    if (along_in) {
      at.in = static_cast<int>(i % p.c_in);
      at.tap = static_cast<int>(i / p.c_in % p.taps);
      at.out = static_cast<int>(i / p.c_in / p.taps);
    } else {
      at.out = static_cast<int>(i % p.c_out);
      at.in = static_cast<int>(i / p.c_out % p.c_in);
      at.tap = static_cast<int>(i / p.c_out / p.c_in);
    }
    p.finish_gradient<T>(at, sum);
  }
}

// The bias of `count` columns, 0 where there is none.
template <class T, int count>
__device__ __forceinline__ void load_bias(const PassArgs& p, int n, float (&bias)[count]) {
#pragma unroll
  for (int i = 0; i < count; ++i) {
    bias[i] = 0;
    if (p.bias != nullptr && n + i < p.c_out) bias[i] = widen(static_cast<const T*>(p.bias)[n + i]);
  }
}

// The epilogue, one rounding, and 16 bytes of y, from column `first` of a row on.
template <class T, int count>
__device__ __forceinline__ void finish_piece(const PassArgs& p,
                                             int64_t row,
                                             int first,
                                             const float (&sums)[count],
                                             const float (&bias)[count]) {
  alignas(16) T out[count];
  alignas(16) T added[count] = {};
  if (p.residual != nullptr) {
    const T* from = static_cast<const T*>(p.residual) + row * p.residual_stride + first;
    *reinterpret_cast<uint4*>(added) = *reinterpret_cast<const uint4*>(from);
  }
  uint32_t broken = 0;
#pragma unroll
  for (int i = 0; i < count; ++i) {
    broken |= static_cast<uint32_t>(isnan(sums[i])) << i;
    store(p.rectified(sums[i] + bias[i] + widen(added[i])), &out[i]);
  }
  T* const y = static_cast<T*>(p.y) + row * p.y_stride + first;
  *reinterpret_cast<uint4*>(y) = *reinterpret_cast<const uint4*>(out);
  for (; broken != 0; broken &= broken - 1) {
    const int n = first + __ffs(broken) - 1;
    if (n < p.c_out) p.repair<T>(row, n);
  }
}

// Past L1, as the launch before may still be writing when this one starts.
template <int count>
__device__ __forceinline__ void add_sums(const float* from, float (&v)[count]) {
#pragma unroll
  for (int i = 0; i < count; i += 4) {
    const float4 four = __ldcg(reinterpret_cast<const float4*>(from + i));
    v[i] += four.x;
    v[i + 1] += four.y;
    v[i + 2] += four.z;
    v[i + 3] += four.w;
  }
}

// y from the sums of slices, [slices, rows, stride], in order. A launch that overlaps the one
// before waits for it.
template <class T>
__global__ void finish(PassArgs p, const float* sums, int64_t stride, int slices) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  ptx::wait_for_last_launch();
#endif
  constexpr int count = 16 / sizeof(T);
  const int pieces = (p.c_out + count - 1) / count;
  for (int64_t i = thread_index(); i < p.rows * pieces; i += thread_count()) {
    const int64_t row = i / pieces;
    const int n = static_cast<int>(i % pieces) * count;
    float v[count] = {};
#pragma unroll 8
    for (int slice = 0; slice < slices; ++slice) {
      add_sums(sums + (slice * p.rows + row) * stride + n, v);
    }
    float bias[count];
    load_bias<T>(p, n, bias);
    finish_piece<T>(p, row, n, v, bias);
  }
}

}  // namespace voxgemm::cuda
