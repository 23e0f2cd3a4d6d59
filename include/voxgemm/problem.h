// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>
#include <string_view>

#include "voxgemm/context.h"
#include "voxgemm/geometry.h"

namespace voxgemm {

// What a layer does with its coordinates.
enum class Operation {
  submanifold,  // "subm3": out = in
  strided,      // "conv3s2p1": out by an output rule
  inverse,      // "inv2s2": the strided map of the same geometry, transposed
};

// Everything the choice of a kernel depends on. Its text parses back and is the test parameter, the
// bench argument, the log line and the cache key:
//   "PASS DTYPE OPERATION C_IN->C_OUT CLOUD",  e.g. "forward f16 subm3 64->128 shell:256"
// DTYPE is f16, bf16, f32, f64, or for f32 operands in another precision tf32, bf16x3 or bf16x6.
// OPERATION is subm, conv or inv, then size ("3" or "3x1x3"), then s, p, d with a number or three
// joined by x where they differ from 1, 0, 1. CLOUD is whatever names the coordinates, a word or
// nothing; it is kept, not read, here. c_in and c_out are always the layer's, also in the backward
// passes.
struct VOXGEMM_EXPORT Problem {
  Pass pass = Pass::forward;
  Dtype dtype = Dtype::f32;
  Precision precision = Precision::ieee;  // of f32
  Operation operation = Operation::submanifold;
  Geometry geometry;
  int c_in = 0;
  int c_out = 0;
  std::string cloud;

  // Known once the map is: rows of the pass's result side and of its operand side, pairs.
  int64_t n_in = 0;
  int64_t n_out = 0;
  int64_t pairs = -1;  // -1: not known, as on a CUDA device, which nobody waits for
  Device device = {};
  int architecture = 0;  // CUDA: ten times the compute capability, e.g. 90
  int threads = 1;

  // Fills in device, architecture and threads.
  void place(const Context& ctx);
  // `pairs`; where it is not known, as if every output row had half of its taps (about the mean of
  // a surface).
  double expected_pairs() const {
    return pairs >= 0 ? static_cast<double>(pairs)
                      : 0.5 * static_cast<double>(n_out) * geometry.taps();
  }
  // 2 * pairs * c_in * c_out, of any pass.
  double useful_flops() const { return 2.0 * expected_pairs() * c_in * c_out; }
  std::string text() const;
  // Throws with the grammar and the offending word.
  static Problem parse(std::string_view text);
};

}  // namespace voxgemm
