// SPDX-License-Identifier: Apache-2.0
#include "cuda/kernels/arithmetic_sm80.h"

#include "voxgemm/error.h"

namespace voxgemm::cuda::sm80 {
namespace {

// Multiprocessors of the usual product, TFLOP/s of its 16-bit matrix instructions of a warp and of
// f32 arithmetic, and GB/s of its memory.
struct Architecture {
  int number;
  int multiprocessors;
  double matrix;
  double f32;
  double bandwidth;
};
constexpr Architecture architectures[] = {
    {75, 40, 65, 8, 320},      // T4
    {80, 108, 312, 19, 1900},  // A100
    {86, 84, 140, 35, 900},    // RTX 3090, A40
    {87, 16, 40, 5, 200},      // Orin
    {89, 128, 330, 80, 900},   // RTX 4090, L40
    {90, 132, 620, 60, 4400},  // H200: two thirds of what warpgroups reach
    {100, 148, 620, 70, 7000}, {120, 170, 420, 100, 1700},  // RTX 5090
};

struct Facts {
  std::string_view name;
  Dtype dtype;
  Precision precision;  // of f32
  int architecture;     // the first that has it
  double products;      // see products_of()
};
constexpr Facts all_facts[] = {
    // By Math.
    {"f16", Dtype::f16, Precision::ieee, 75, 1},
    {"bf16", Dtype::bf16, Precision::ieee, 80, 1},
    {"tf32", Dtype::f32, Precision::tf32, 80, 2},
    {"bf16x3", Dtype::f32, Precision::bf16x3, 80, 3},
    {"bf16x6", Dtype::f32, Precision::bf16x6, 80, 6},
    {"f32", Dtype::f32, Precision::ieee, 75, 12},
};
const Facts& facts_of(Math math) { return all_facts[static_cast<int>(math)]; }

}  // namespace

std::string_view name(Math math) { return facts_of(math).name; }
double products_of(Math math) { return facts_of(math).products; }

// Called for every row of the registry in every call of an operator: the usual reasons are short.
std::string why_not(Math math, const Problem& problem) {
  const Facts& facts = facts_of(math);
  if (problem.dtype != facts.dtype ||
      (problem.dtype == Dtype::f32 && problem.precision != facts.precision)) {
    return std::string("takes ").append(facts.name);
  }
  const int needed = facts.architecture;
  if (problem.architecture < needed) {
    return join("needs compute capability ", needed / 10, ".", needed % 10, ", the device has ",
                problem.architecture / 10, ".", problem.architecture % 10);
  }
  return "";
}

Rates rates_of(Math math, int architecture) {
  const Architecture* device = architectures;
  for (const Architecture& known : architectures) {
    if (known.number <= architecture) device = &known;
  }
  const double flops = math == Math::ieee ? device->f32 : device->matrix / products_of(math);
  const double each = 1.0 / device->multiprocessors;
  return {device->multiprocessors, flops * 1e12 / 2 * each, device->bandwidth * 1e9 * each};
}

}  // namespace voxgemm::cuda::sm80
