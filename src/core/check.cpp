// SPDX-License-Identifier: Apache-2.0
#include "voxgemm/error.h"
#include "voxgemm/types.h"

namespace voxgemm {

void fail(ErrorCode code, const Condition& place, const std::string& message) {
  throw Error(code, message, join(place.file, ":", place.line));
}

std::string_view name(Dtype dtype) {
  switch (dtype) {
    case Dtype::f16:
      return "f16";
    case Dtype::bf16:
      return "bf16";
    case Dtype::f32:
      return "f32";
    case Dtype::f64:
      return "f64";
    case Dtype::i32:
      return "i32";
    case Dtype::i64:
      return "i64";
  }
  return "?";
}

std::string_view name(Precision precision) {
  switch (precision) {
    case Precision::ieee:
      return "ieee";
    case Precision::tf32:
      return "tf32";
    case Precision::bf16x3:
      return "bf16x3";
    case Precision::bf16x6:
      return "bf16x6";
  }
  return "?";
}

std::string_view name(Pass pass) {
  switch (pass) {
    case Pass::forward:
      return "forward";
    case Pass::grad_input:
      return "grad_input";
    case Pass::grad_weight:
      return "grad_weight";
  }
  return "?";
}

std::string_view name(Algorithm algorithm) {
  switch (algorithm) {
    case Algorithm::explicit_gemm:
      return "explicit_gemm";
    case Algorithm::implicit_gemm:
      return "implicit_gemm";
    case Algorithm::implicit_gemm_splitk:
      return "implicit_gemm_splitk";
    case Algorithm::masked_implicit_gemm:
      return "masked_implicit_gemm";
    case Algorithm::masked_implicit_gemm_splitk:
      return "masked_implicit_gemm_splitk";
  }
  return "?";
}

}  // namespace voxgemm
