// SPDX-License-Identifier: Apache-2.0
// Compiled once per instruction set; isa.h has the flags.

#include "cpu/simd/row_sums.h"

#include "cpu/simd/isa.h"

namespace voxgemm::cpu::VOXGEMM_ISA {
namespace {

template <class T>
constexpr RowEngine row_engine(Dtype dtype) {
  return {.isa = isa,
          .dtype = dtype,
          .supported = supported,
          .lanes = lanes_of<SumsOf<T>>,
          .list = list_taps,
          .sum = sum<T>,
          .sum_in_double = sum_in_double<T>,
          .sum_to_double = sum_to_double<T>,
          .convolve = convolve<T>,
          .pick = pick<T>,
          .sum_won = sum_won<T>,
          .outer = outer_rows<T>,
          .dot = dot<T>};
}

}  // namespace

constinit const RowEngine rows_f64 = row_engine<double>(Dtype::f64);
constinit const RowEngine rows_f32 = row_engine<float>(Dtype::f32);
constinit const RowEngine rows_bf16 = row_engine<Bf16>(Dtype::bf16);
constinit const RowEngine rows_f16 = row_engine<F16>(Dtype::f16);

}  // namespace voxgemm::cpu::VOXGEMM_ISA
