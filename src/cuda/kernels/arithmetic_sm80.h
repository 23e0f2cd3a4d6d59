// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>
#include <string_view>

#include "voxgemm/problem.h"

namespace voxgemm::cuda::sm80 {

// How products are made.
enum class Math { f16, bf16, tf32, bf16x3, bf16x6, ieee };
constexpr Math all_math[] = {Math::f16,    Math::bf16,   Math::tf32,
                             Math::bf16x3, Math::bf16x6, Math::ieee};

std::string_view name(Math math);

// Calls body.operator()<math>() with the arithmetic as a constant.
template <class Body>
void dispatch(Math math, Body&& body) {
  switch (math) {
    case Math::f16:
      return body.template operator()<Math::f16>();
    case Math::bf16:
      return body.template operator()<Math::bf16>();
    case Math::tf32:
      return body.template operator()<Math::tf32>();
    case Math::bf16x3:
      return body.template operator()<Math::bf16x3>();
    case Math::bf16x6:
      return body.template operator()<Math::bf16x6>();
    case Math::ieee:
      return body.template operator()<Math::ieee>();
  }
}

// Of rows whose schedule is by mask or natural, and whose reduction is cut in slices or whole.
constexpr Algorithm algorithm_of(bool masked, bool split) {
  if (masked)
    return split ? Algorithm::masked_implicit_gemm_splitk : Algorithm::masked_implicit_gemm;
  return split ? Algorithm::implicit_gemm_splitk : Algorithm::implicit_gemm;
}

// Why kernels of this arithmetic that take so much shared memory cannot run the problem; empty if
// they can.
std::string why_not(Math math, size_t shared_bytes, const Problem& problem);

// The time of a product, in products of 16 bits.
double products_of(Math math);

// What the cost models know of a device.
struct Rates {
  int multiprocessors;
  double products;  // multiply-adds a second in this arithmetic, at best
  double bytes;     // of memory a second
};
Rates rates_of(Math math, int architecture);

}  // namespace voxgemm::cuda::sm80
