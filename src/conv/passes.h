// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <functional>
#include <string>
#include <utility>

#include "voxgemm/kernel_map.h"

// What the passes need beside a kernel, once per backend: results are the same bits on both.
namespace voxgemm {

inline WeightsRef seen_transposed(WeightsRef w) {
  std::swap(w.c_in, w.c_out);
  std::swap(w.in_stride, w.out_stride);
  return w;
}

namespace cpu {

// dy with the rows of every voxel added to the voxel's lowest row, in double and in row order
// (CUDA: as segment_reduce() adds), and rounded once to dy's dtype: the adjoint of giving every
// repeated row a copy of the output. first, i32 [n, 1], is the lowest row with the same
// coordinates. What the other rows hold is nobody's.
Matrix merge_repeated(const Context& ctx, const MatrixRef& dy, const MatrixRef& first);
// Sets the rows that are not their voxel's lowest to zero.
void zero_repeated(const Context& ctx, const MatrixRef& dx, const MatrixRef& first);
void fill_zero(const Context& ctx, const WeightsRef& w);
// db [1, channels] = sum of the rows of dy, in double: blocks of 2048 rows, then the blocks in
// order.
void grad_bias(const Context& ctx, const MatrixRef& dy, const MatrixRef& db);
// What the processor calls itself.
std::string model();

}  // namespace cpu
namespace cuda {

Matrix merge_repeated(const Context& ctx, const MatrixRef& dy, const MatrixRef& first);
void zero_repeated(const Context& ctx, const MatrixRef& dx, const MatrixRef& first);
void fill_zero(const Context& ctx, const WeightsRef& w);
void grad_bias(const Context& ctx, const MatrixRef& dy, const MatrixRef& db);
// Ten times the compute capability of a device, e.g. 90.
int architecture(const Device& device);
std::string model(const Device& device);
// Loads the code of the convolutions' kernels, which the first call of a layer would wait for.
void load_kernels(const Device& device);
// Whether the context's stream is being captured into a graph.
bool is_capturing(const Context& ctx);
// Seconds of `calls` calls of work, which queues on the context's stream; the host waits for them.
// Throws during a capture.
double time_calls(const Context& ctx, int calls, const std::function<void()>& work);

}  // namespace cuda
}  // namespace voxgemm
