// SPDX-License-Identifier: Apache-2.0
#include "cuda/kernels/arithmetic_sm80.h"

#include "voxgemm/error.h"

namespace voxgemm::cuda::sm80 {
namespace {

// Shared memory that a CTA can have, multiprocessors of the usual product, and TFLOP/s of its
// 16-bit matrix instructions of a warp and of f32 arithmetic, and GB/s of its memory.
struct Architecture {
  int number;
  size_t shared_bytes;
  int multiprocessors;
  double matrix;
  double f32;
  double bandwidth;
};
constexpr Architecture architectures[] = {
    {75, 64 << 10, 40, 65, 8, 320},       // T4
    {80, 163 << 10, 108, 312, 19, 1900},  // A100
    {86, 99 << 10, 84, 140, 35, 900},     // RTX 3090, A40
    {87, 163 << 10, 16, 40, 5, 200},      // Orin
    {89, 99 << 10, 128, 330, 80, 900},    // RTX 4090, L40
    {90, 227 << 10, 132, 620, 60, 4400},  // H200: two thirds of what warpgroups reach
    {100, 227 << 10, 148, 620, 70, 7000}, {120, 99 << 10, 170, 420, 100, 1700},  // RTX 5090
};

const Architecture& architecture_of(int number) {
  const Architecture* found = architectures;
  for (const Architecture& known : architectures) {
    if (known.number <= number) found = &known;
  }
  return *found;
}

bool takes(Math math, const Problem& problem) {
  if (problem.dtype != Dtype::f32) {
    return (problem.dtype == Dtype::f16 && math == Math::f16) ||
           (problem.dtype == Dtype::bf16 && math == Math::bf16);
  }
  switch (problem.precision) {
    case Precision::ieee:
      return math == Math::ieee;
    case Precision::tf32:
      return math == Math::tf32;
    case Precision::bf16x3:
      return math == Math::bf16x3;
    case Precision::bf16x6:
      return math == Math::bf16x6;
  }
  return false;
}

}  // namespace

std::string_view name(Math math) {
  switch (math) {
    case Math::f16:
      return "f16";
    case Math::bf16:
      return "bf16";
    case Math::tf32:
      return "tf32";
    case Math::bf16x3:
      return "bf16x3";
    case Math::bf16x6:
      return "bf16x6";
    case Math::ieee:
      return "f32";
  }
  return "";
}

// Called for every row of the registry in every call of an operator: the usual reasons are short.
std::string why_not(Math math, size_t shared_bytes, const Problem& problem) {
  if (problem.device.kind != DeviceKind::cuda) return "runs on CUDA only";
  if (!takes(math, problem)) return std::string("takes ").append(name(math));
  const int needed = math == Math::f16 || math == Math::ieee ? 75 : 80;
  if (problem.architecture < needed) {
    return join("needs compute capability ", needed / 10, ".", needed % 10, ", the device has ",
                problem.architecture / 10, ".", problem.architecture % 10);
  }
  const size_t most = architecture_of(problem.architecture).shared_bytes;
  if (shared_bytes > most) {
    return join("needs ", shared_bytes, " bytes of shared memory, the device has ", most);
  }
  return "";
}

double products_of(Math math) {
  switch (math) {
    case Math::f16:
    case Math::bf16:
      return 1;
    case Math::tf32:
      return 2;
    case Math::bf16x3:
      return 3;
    case Math::bf16x6:
      return 6;
    case Math::ieee:
      return 12;
  }
  return 1;
}

Rates rates_of(Math math, int architecture) {
  const Architecture& device = architecture_of(architecture);
  const double flops = math == Math::ieee ? device.f32 : device.matrix / products_of(math);
  return {device.multiprocessors, flops * 1e12 / 2, device.bandwidth * 1e9};
}

}  // namespace voxgemm::cuda::sm80
