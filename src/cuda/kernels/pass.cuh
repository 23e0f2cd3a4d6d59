// SPDX-License-Identifier: Apache-2.0
#pragma once

// What kernels know of a pass, and results over present rows one by one. Where a zero stands for an
// absent neighbour, an infinite factor makes NaN of it, which the neighbour must not: sums that
// come out NaN are computed once more here. Finite operands never get there.

#include "cuda/float.cuh"
#include "cuda/kernels/families.h"
#include "cuda/launch.cuh"
#include "cuda/ptx/barrier.cuh"
#include "cuda/unroll.cuh"

namespace voxgemm::cuda {

struct WeightPlace {
  int tap;
  int in;
  int out;
};

// ConvArgs for kernels.
struct PassArgs : ConvArgs, Sizes {
  const int32_t* neighbours;  // [taps, rows]
  // Of a schedule by masks, else null; see ScheduleParts.
  const int4* tiles = nullptr;
  const uint32_t* masks = nullptr;  // [.., rows of a tile / 64]
  const int32_t* order = nullptr;
  const int32_t* indices = nullptr;  // [.., rows of a tile]

  explicit PassArgs(const ConvArgs& args)
      : ConvArgs(args), Sizes(args), neighbours(map->neighbours.as<int32_t>()) {
    if (schedule == nullptr) return;
    const ScheduleParts& parts = schedule->parts();
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
    return at.tap * w.tap_stride + at.in * w.in_stride + at.out * w.out_stride;
  }
  // Of an element of [c_out, taps, c_in].
  __device__ WeightPlace weight_place(int64_t element) const {
    const auto line = static_cast<int>(element / c_in);
    return {line % taps, static_cast<int>(element % c_in), line / taps};
  }

  // NaN stays NaN.
  template <class S>
  __device__ S rectified(S sum) const {
    return relu && sum < 0 ? S(0) : sum;
  }
  // Computes column n of y in `count` rows from `row` on and writes it; a weight is read once.
  template <class T, int count = 1>
  __device__ void compute(int64_t row, int n) const {
    Sum<T> sums[count] = {};
    for (int tap = 0; tap < taps; ++tap) {
      const T* from[count];
      bool any = false;
      for (int i = 0; i < count; ++i) {
        const int32_t in = row + i < rows ? neighbours[tap * rows + row + i] : -1;
        from[i] = in >= 0 ? static_cast<const T*>(x.data) + in * x.stride : nullptr;
        any = any || in >= 0;
      }
      if (!any) continue;
      const T* weights = static_cast<const T*>(w.data) + place_of({weight_tap(tap), 0, n});
      for (int k = 0; k < c_in; ++k) {
        const Sum<T> weight = widen(weights[k * w.in_stride]);
        for (int i = 0; i < count; ++i) {
          if (from[i] != nullptr) sums[i] = fma(Sum<T>(widen(from[i][k])), weight, sums[i]);
        }
      }
      if (count == 1 && isnan(sums[0])) break;
    }
    for (int i = 0; i < count && row + i < rows; ++i) {
      Sum<T> sum = sums[i];
      if (bias != nullptr) sum += Sum<T>(widen(static_cast<const T*>(bias)[n]));
      if (residual.data != nullptr) {
        const auto* added = static_cast<const T*>(residual.data) + (row + i) * residual.stride + n;
        sum += Sum<T>(widen(*added));
      }
      store(rectified(sum), static_cast<T*>(y.data) + (row + i) * y.stride + n);
    }
  }

  // Adds to sums dw there and at the next input channels, of rows [first, end).
  template <class T, int count>
  __device__ void add_gradient(const WeightPlace& at,
                               int64_t first,
                               int64_t end,
                               Sum<T> (&sums)[count]) const {
    constexpr int batch = 8;  // of rows whose loads are under way at a time
    const T* from = static_cast<const T*>(x.data) + at.in;
    const T* dy = static_cast<const T*>(y.data) + at.out;
    for (; first < end && (count > 1 || !isnan(sums[0])); first += batch) {
      int32_t in[batch];
      unroll<batch>(
          [&](int i) { in[i] = first + i < end ? neighbours[at.tap * rows + first + i] : -1; });
      unroll<batch>([&](int i) {
        if (in[i] < 0) return;
        const Sum<T> right = widen(dy[(first + i) * y.stride]);
        unroll<count>([&](int k) {
          if (count > 1 && at.in + k >= c_in) return;
          sums[k] = fma(Sum<T>(widen(from[in[i] * x.stride + k])), right, sums[k]);
        });
      });
    }
  }
  // Writes dw there, rounded; of NaN what present rows alone make of it.
  template <class T>
  __device__ void finish_gradient(const WeightPlace& at, Sum<T> sum) const {
    Sum<T> again[1] = {};
    if (isnan(sum)) add_gradient<T>(at, 0, rows, again);
    if (isnan(sum)) sum = again[0];
    const int64_t place = place_of(at);
    w.dtype == Dtype::f32 ? store(sum, static_cast<float*>(w.data) + place)
                          : store(sum, static_cast<T*>(w.data) + place);
  }
};

// dw from the sums of slices, in order: each [c_out, taps, c_in].
template <class T>
__global__ void add_slices(const __grid_constant__ PassArgs p, const Sum<T>* sums, int slices) {
  const int64_t size = p.w_size();
  for (int64_t i = thread_index(); i < size; i += thread_count()) {
    Sum<T> sum = sums[i];
    for (int slice = 1; slice < slices; ++slice) sum += sums[slice * size + i];
    p.finish_gradient<T>(p.weight_place(i), sum);
  }
}

// The bias of `count` columns, past the last one its; 0 where there is none.
template <class T, int count>
__device__ inline void load_bias(const PassArgs& p, int n, float (&bias)[count]) {
  unroll<count>([&](int i) {
    bias[i] = p.bias != nullptr ? widen(static_cast<const T*>(p.bias)[min(n + i, p.c_out - 1)]) : 0;
  });
}

// The epilogue, one rounding, and 16 bytes of y, from column `first` of a row on.
template <class T, int count>
__device__ inline void finish_piece(const PassArgs& p,
                                    int64_t row,
                                    int first,
                                    const float (&sums)[count],
                                    const float (&bias)[count]) {
  alignas(16) T out[count];
  alignas(16) T added[count] = {};
  if (p.residual.data != nullptr) {
    const T* from = static_cast<const T*>(p.residual.data) + row * p.residual.stride + first;
    *reinterpret_cast<uint4*>(added) = *reinterpret_cast<const uint4*>(from);
  }
  uint32_t broken = 0;
  unroll<count>([&](int i) {
    broken |= static_cast<uint32_t>(isnan(sums[i])) << i;
    store(p.rectified(sums[i] + bias[i] + widen(added[i])), &out[i]);
  });
  T* const y = static_cast<T*>(p.y.data) + row * p.y.stride + first;
  *reinterpret_cast<uint4*>(y) = *reinterpret_cast<const uint4*>(out);
  for (; broken != 0; broken &= broken - 1) {
    const int n = first + __ffs(broken) - 1;
    if (n < p.c_out) p.compute<T>(row, n);
  }
}

// past_l1: the launch before may still be writing when this one starts.
template <bool past_l1, int count>
__device__ inline void add_sums(const float* from, float (&v)[count]) {
  unroll<count / 4>([&](int i) {
    const auto* at = reinterpret_cast<const float4*>(from) + i;
    const float4 four = past_l1 ? __ldcg(at) : *at;
    unroll<4>([&](int e) { v[4 * i + e] += (&four.x)[e]; });
  });
}

// y from the sums of slices, [slices, rows, stride], in order; waits for a launch that it overlaps.
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
      add_sums<true>(sums + (slice * p.rows + row) * stride + n, v);
    }
    float bias[count];
    load_bias<T>(p, n, bias);
    finish_piece<T>(p, row, n, v, bias);
  }
}

}  // namespace voxgemm::cuda
