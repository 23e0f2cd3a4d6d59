// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "core/dispatch.h"
#include "voxgemm/types.h"

namespace voxgemm::cuda {

// What sums of a type are kept in.
template <class T>
struct SumOf {
  using type = float;
};
template <>
struct SumOf<double> {
  using type = double;
};
template <class T>
using Sum = typename SumOf<T>::type;

__device__ inline float widen(__half value) { return __half2float(value); }
__device__ inline float widen(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ inline float widen(float value) { return value; }
__device__ inline double widen(double value) { return value; }

// One rounding to nearest even.
__device__ inline void store(float value, __half* out) { *out = __float2half_rn(value); }
__device__ inline void store(double value, __half* out) { *out = __double2half(value); }
__device__ inline void store(float value, __nv_bfloat16* out) { *out = __float2bfloat16_rn(value); }
__device__ inline void store(double value, __nv_bfloat16* out) { *out = __double2bfloat16(value); }
__device__ inline void store(float value, float* out) { *out = value; }
__device__ inline void store(double value, float* out) { *out = static_cast<float>(value); }
__device__ inline void store(double value, double* out) { *out = value; }
__device__ inline void store(float value, double* out) { *out = value; }

// As voxgemm::dispatch_float, with the types of device code.
template <class Body>
void dispatch_device_float(Dtype dtype, const Body& body) {
  if (dtype == Dtype::f16) return body(Type<__half>{});
  if (dtype == Dtype::bf16) return body(Type<__nv_bfloat16>{});
  if (dtype == Dtype::f64) return body(Type<double>{});
  check(dtype == Dtype::f32, "dtype is ", name(dtype), ", expected f16, bf16, f32 or f64");
  body(Type<float>{});
}

}  // namespace voxgemm::cuda
