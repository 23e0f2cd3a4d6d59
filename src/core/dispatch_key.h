// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "core/dispatch.h"

namespace voxgemm {

// Calls body(Type<K>{}) with the unsigned type of i32 or i64.
template <class Body>
void dispatch_key(Dtype dtype, const Body& body) {
  if (dtype == Dtype::i32) return body(Type<uint32_t>{});
  check(dtype == Dtype::i64, "dtype is ", name(dtype), ", expected i32 or i64");
  body(Type<uint64_t>{});
}

}  // namespace voxgemm
