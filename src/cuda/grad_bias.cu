// SPDX-License-Identifier: Apache-2.0
#include "conv/passes.h"

#include "cuda/float.cuh"
#include "cuda/launch.cuh"

namespace voxgemm::cuda {
namespace {

// Rows are summed in blocks of this size, then the blocks in order, as on the CPU.
constexpr int64_t block_rows = 2048;
constexpr int columns_per_block = 32;

template <class T>
__global__ void sum_rows(const T* dy, int64_t rows, int64_t stride, int64_t cols, double* sums) {
  const int64_t col = static_cast<int64_t>(blockIdx.y) * columns_per_block + threadIdx.x;
  if (col >= cols) return;
  const int64_t first = blockIdx.x * block_rows;
  const int64_t last = min(rows, first + block_rows);
  double sum = 0;
#pragma unroll 8
  for (int64_t row = first; row < last; ++row) sum += widen(dy[row * stride + col]);
  sums[blockIdx.x * cols + col] = sum;
}

template <class T>
__global__ void sum_blocks(const double* sums, int64_t blocks, int64_t cols, T* db) {
  const int64_t col = thread_index();
  if (col >= cols) return;
  double sum = 0;
#pragma unroll 8
  for (int64_t block = 0; block < blocks; ++block) sum += sums[block * cols + col];
  store(sum, &db[col]);
}

}  // namespace

void grad_bias(const Context& ctx, const MatrixRef& dy, const MatrixRef& db) {
  const DeviceGuard guard(ctx.device);
  const int64_t blocks = ceil_div(dy.rows, block_rows);
  const std::shared_ptr<void> memory = ctx.allocate(sizeof(double) * blocks * dy.cols);
  auto* sums = static_cast<double*>(memory.get());
  dispatch_device_float(dy.dtype, [&]<class T>(Type<T>) {
    const Grid grid = {.blocks = blocks,
                       .columns = ceil_div(dy.cols, columns_per_block),
                       .threads = columns_per_block};
    launch(ctx, grid, sum_rows<T>, dy.as<T>(), dy.rows, dy.stride, dy.cols, sums);
  });
  dispatch_device_float(db.dtype, [&]<class T>(Type<T>) {
    launch(ctx, {.blocks = ceil_div(dy.cols, columns_per_block), .threads = columns_per_block},
           sum_blocks<T>, sums, blocks, dy.cols, db.as<T>());
  });
}

}  // namespace voxgemm::cuda
