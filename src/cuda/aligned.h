// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "voxgemm/context.h"

// Operands for kernels that move 16 bytes at once: rows start at multiples of 16 bytes and, up to
// the next such multiple, have nothing but zeros behind their last column. What is not so is
// copied.
namespace voxgemm::cuda {

// A view, and the memory it lies in where that is a copy. The view keeps the caller's number of
// columns.
struct AlignedMatrix {
  MatrixRef matrix;
  std::shared_ptr<void> memory;
  bool is_copy() const { return memory != nullptr; }
};
struct AlignedWeights {
  WeightsRef weights;
  std::shared_ptr<void> memory;
};

// Whether all rows can be moved 16 bytes at a time.
bool is_wide(const MatrixRef& m);
// x for reading: itself where its rows are aligned and its columns fill their last 16 bytes.
AlignedMatrix aligned_input(const Context& ctx, const MatrixRef& x);
// y for writing in pieces of 16 bytes: itself under the same condition, else memory of that shape,
// which write_back() copies to y.
AlignedMatrix aligned_output(const Context& ctx, const MatrixRef& y);
void write_back(const Context& ctx, const AlignedMatrix& from, const MatrixRef& y);
// w for reading: itself where one channel axis is contiguous and full to 16 bytes, and the other
// strides are multiples of 16 bytes; else a copy with that axis contiguous that already was, input
// channels if none.
AlignedWeights aligned_weights(const Context& ctx, const WeightsRef& w);
// Weights of one tap with the matrix's rows as output channels.
WeightsRef one_tap(const MatrixRef& m);
// Copies weights of one dtype, whatever the strides; channels that `from` has not get zeros.
void copy_weights(const Context& ctx, const WeightsRef& from, const WeightsRef& to);

// body(an unsigned integer as large as an element), for what only moves them.
template <class Body>
void dispatch_size(Dtype dtype, const Body& body) {
  if (size_of(dtype) == 2) return body(uint16_t{});
  if (size_of(dtype) == 4) return body(uint32_t{});
  body(uint64_t{});
}

}  // namespace voxgemm::cuda
