// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <utility>
#include <vector>

#include "conv/kernel.h"

namespace voxgemm::cuda {

namespace sm80 {

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

}  // namespace sm80

// Of a pass as families see it: a gradient of the input is a forward.
struct Sizes {
  int64_t rows;  // of y
  int taps;
  int c_in;
  int c_out;

  Sizes(const ConvArgs& args)
      : rows(args.y.rows), taps(args.w.taps), c_in(args.w.c_in), c_out(args.w.c_out) {}
  Sizes(const Problem& problem)
      : rows(problem.n_out),
        taps(problem.geometry.taps()),
        c_in(problem.c_in),
        c_out(problem.c_out) {
    if (problem.pass == Pass::grad_input) std::swap(c_in, c_out);
  }
};

// The rows that the families have in the registry. The first is the judge of the others, and what
// runs where none of them can: any channels, any strides of the weights, any device.
std::vector<Kernel> naive_kernels();
std::vector<Kernel> sm80_kernels();
// A row's name ends in the rows and columns of its tiles and its groups of taps.
std::vector<Kernel> implicit_gemm_sm90_kernels();
std::vector<Kernel> grad_weight_sm90_kernels();

void load_grad_weight_sm90();

}  // namespace voxgemm::cuda
