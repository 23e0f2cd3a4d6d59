// SPDX-License-Identifier: Apache-2.0
#include "conv/passes.h"

#include "cuda/float.cuh"
#include "cuda/launch.cuh"

namespace voxgemm::cuda {
namespace {

// Rows are summed in blocks of this size, then the blocks in order, as on the CPU.
constexpr int64_t block_rows = 2048;
constexpr int columns_per_block = 32;

// sums[b]: of the b-th `rows_at_once` rows.
template <class T, class S>
__global__ void sum_rows(View<T> from, int64_t rows_at_once, View<S> sums) {
  const int64_t col = static_cast<int64_t>(blockIdx.y) * columns_per_block + threadIdx.x;
  if (col >= from.cols) return;
  const int64_t first = blockIdx.x * rows_at_once;
  const int64_t last = min(from.rows, first + rows_at_once);
  double sum = 0;
#pragma unroll 8
  for (int64_t row = first; row < last; ++row) sum += widen(*from.at(row, col));
  store(sum, sums.at(blockIdx.x, col));
}

template <class T, class S>
void sum(const Context& ctx, const MatrixRef& from, const MatrixRef& sums) {
  launch(ctx,
         {.blocks = sums.rows,
          .columns = ceil_div(from.cols, columns_per_block),
          .threads = columns_per_block},
         sum_rows<T, S>, View<T>(from), sums.rows == 1 ? from.rows : block_rows, View<S>(sums));
}

}  // namespace

void grad_bias(const Context& ctx, const MatrixRef& dy, const MatrixRef& db) {
  const Matrix sums = make_matrix(ctx, ceil_div(dy.rows, block_rows), dy.cols, Dtype::f64);
  dispatch_device_float(dy.dtype, [&]<class T>(Type<T>) { sum<T, double>(ctx, dy, sums); });
  dispatch_device_float(db.dtype, [&]<class T>(Type<T>) { sum<double, T>(ctx, sums, db); });
}

}  // namespace voxgemm::cuda
