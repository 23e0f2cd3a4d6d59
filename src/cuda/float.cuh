// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "core/dispatch.h"
#include "voxgemm/types.h"

namespace voxgemm::cuda {

// What sums of a type are kept in.
template <class T>
using Sum = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class T>
__device__ inline Sum<T> widen(T value) {
  return static_cast<Sum<T>>(value);
}
// One rounding to nearest even.
template <class From, class To>
__device__ inline void store(From value, To* out) {
  *out = static_cast<To>(value);
}

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
