// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <utility>
#include <vector>

#include "conv/kernel.h"

namespace voxgemm::cuda {

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

namespace sm80 {

// How products are made.
enum class Math { f16, bf16, tf32, bf16x3, bf16x6, ieee };
constexpr Math all_math[] = {Math::f16,    Math::bf16,   Math::tf32,
                             Math::bf16x3, Math::bf16x6, Math::ieee};
constexpr bool is_16bit(Math math) { return math == Math::f16 || math == Math::bf16; }

std::string_view name(Math math);
Dtype dtype_of(Math math);
Precision precision_of(Math math);

// Calls body.operator()<math>() with the arithmetic as a constant.
template <Math known = Math::f16, class Body>
void dispatch(Math math, const Body& body) {
  if (math == known) return body.template operator()<known>();
  if constexpr (known != Math::ieee) dispatch<all_math[int(known) + 1]>(math, body);
}

// Why the device has no such arithmetic; empty if it has.
std::string limits(Math math, const Problem& problem);

// A row of implicit_gemm_sm80.cu or, with `gradient`, of grad_weight_sm80.cu.
struct Variant {
  bool gradient = false;
  Math math = Math::f16;
  int rows = 0;  // of a tile of y; of dW: taps * c_in
  int cols = 0;
  Algorithm algorithm = Algorithm::implicit_gemm;
  int slices = 1;  // of the reduction; a gradient has as many as suit it

  // Whether its schedule is by mask, with rows sorted by the taps that they have.
  bool masked() const {
    return algorithm != Algorithm::implicit_gemm && algorithm != Algorithm::implicit_gemm_splitk;
  }
  // Of taps. One for each tap makes lists of its pairs.
  int groups(int taps) const {
    if (algorithm == Algorithm::explicit_gemm) return taps;
    return masked() ? (taps + 31) / 32 : 1;
  }
};

// Launches the variant on operands that are aligned (aligned.h). One object for each arithmetic.
template <Math math>
void convolve(const Context& ctx, const Variant& variant, const ConvArgs& args);
template <Math math>
void grad_weight(const Context& ctx, const Variant& variant, const ConvArgs& args);
// See load() of launch.cuh.
template <Math math>
void load_convolve();

// How the weight gradient is cut.
struct GradCut {
  int groups = 1;      // of taps
  int row_blocks = 0;  // of a group
  int column_blocks = 0;
  int slices = 1;
  int64_t ctas() const { return int64_t{groups} * row_blocks * column_blocks * slices; }
};
GradCut cut_gradient(const Variant& variant, const Sizes& size);

}  // namespace sm80

// The rows that the families have in the registry. The first is the judge of the others, and what
// runs where none of them can: any channels, any strides of the weights, any device.
std::vector<Kernel> naive_kernels();
std::vector<Kernel> sm80_kernels();
// A row's name ends in the rows and columns of its tiles and its groups of taps.
std::vector<Kernel> implicit_gemm_sm90_kernels();
std::vector<Kernel> grad_weight_sm90_kernels();

void load_grad_weight_sm90();

}  // namespace voxgemm::cuda
