// SPDX-License-Identifier: Apache-2.0
#include "conv/passes.h"

#include "conv/operators.h"
#include "cuda/float.cuh"
#include "cuda/launch.cuh"

namespace voxgemm::cuda {
namespace {

// Rows are summed in blocks of this size, then the blocks in order, as on the CPU.
constexpr int64_t block_rows = 2048;

// sums: of every block of rows, or one of all rows.
template <class T, class S>
void sum(const Context& ctx, const MatrixRef& matrix, const MatrixRef& result) {
  const View<T> from(matrix);
  const View<S> sums(result);
  const int64_t rows_at_once = sums.rows == 1 ? from.rows : block_rows;
  for_each(ctx, sums.rows * sums.cols, [=] __device__(int64_t i) {
    const int64_t block = i / sums.cols;
    const int64_t col = i - block * sums.cols;
    const int64_t last = min(from.rows, (block + 1) * rows_at_once);
    double sum = 0;
#pragma unroll 16
    for (int64_t row = block * rows_at_once; row < last; ++row) sum += widen(*from.at(row, col));
    store(sum, sums.at(block, col));
  });
}

}  // namespace

Matrix merge_repeated(const Context& ctx, const MatrixRef& dy, const MatrixRef& first) {
  Matrix merged = make_matrix(ctx, dy.rows, dy.cols, dy.dtype);
  if (!merged.empty()) cuda::segment_reduce(ctx, dy, first, Reduction::sum, {merged, {}});
  return merged;
}

void zero_repeated(const Context& ctx, const MatrixRef& dx, const MatrixRef& first) {
  // In units of two bytes: every element has an even size.
  const auto units = static_cast<int64_t>(size_of(dx.dtype) / sizeof(uint16_t));
  const View<uint16_t> data({dx.data, dx.rows, units * dx.cols, units * dx.stride});
  const auto* lowest = first.as<int32_t>();
  for_each(ctx, data.rows, [=] __device__(int64_t row) {
    for (int64_t i = 0; i < data.cols && lowest[row] != row; ++i) *data.at(row, i) = 0;
  });
}

void grad_bias(const Context& ctx, const MatrixRef& dy, const MatrixRef& db) {
  const Matrix sums = make_matrix(ctx, ceil_div(dy.rows, block_rows), dy.cols, Dtype::f64);
  dispatch_device_float(dy.dtype, [&]<class T>(Type<T>) { sum<T, double>(ctx, dy, sums); });
  dispatch_device_float(db.dtype, [&]<class T>(Type<T>) { sum<double, T>(ctx, sums, db); });
}

}  // namespace voxgemm::cuda
