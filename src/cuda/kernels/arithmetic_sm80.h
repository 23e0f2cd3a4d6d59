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
constexpr bool is_16bit(Math math) { return math == Math::f16 || math == Math::bf16; }

std::string_view name(Math math);

// Calls body.operator()<math>() with the arithmetic as a constant.
template <Math known = Math::f16, class Body>
void dispatch(Math math, const Body& body) {
  if (math == known) return body.template operator()<known>();
  if constexpr (known != Math::ieee) dispatch<all_math[int(known) + 1]>(math, body);
}

// Why no kernel of this arithmetic can run the problem; empty if one can.
std::string why_not(Math math, const Problem& problem);

}  // namespace voxgemm::cuda::sm80
