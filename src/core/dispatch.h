// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "core/half.h"
#include "voxgemm/error.h"

namespace voxgemm {

template <class T>
struct Type {
  using type = T;
};

// Calls body(Type<T>{}) with the element type of a float dtype:
//   dispatch_float(x.dtype, [&]<class T>(Type<T>) { ... });
template <class Body>
decltype(auto) dispatch_float(Dtype dtype, Body&& body) {
  switch (dtype) {
    case Dtype::f16:
      return body(Type<Half>{});
    case Dtype::bf16:
      return body(Type<Bfloat16>{});
    case Dtype::f64:
      return body(Type<double>{});
    default:
      check(dtype == Dtype::f32, "dtype is ", name(dtype), ", expected f16, bf16, f32 or f64");
      return body(Type<float>{});
  }
}

}  // namespace voxgemm
