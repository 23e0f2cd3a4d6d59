// SPDX-License-Identifier: Apache-2.0
#include "conv/passes.h"

#include "cuda/row_lists.cuh"
#include "cuda/voxel_index.cuh"
#include "voxgemm/cuda.h"

namespace voxgemm::cuda {
namespace {

// `unit` is two bytes: every element has an even size.
__global__ void clear_rows(
    const int32_t* first, int64_t rows, uint16_t* units, int64_t row_units, int64_t stride_units) {
  const int lane = threadIdx.x % 32;
  for (int64_t start = thread_index() - lane; start < rows; start += thread_count()) {
    const int64_t row = start + lane;
    unsigned repeated = __ballot_sync(0xffffffff, row < rows && first[row] != row);
    for (; repeated != 0; repeated &= repeated - 1) {
      uint16_t* data = units + (start + __ffs(repeated) - 1) * stride_units;
      for (int64_t i = lane; i < row_units; i += 32) data[i] = 0;
    }
  }
}

// A thread adds one column of one voxel's rows.
template <class T>
__global__ void add_groups(ListView lists, View<T> dy, View<T> merged) {
  for (int64_t i = thread_index(); i < dy.rows * dy.cols; i += thread_count()) {
    const int64_t row = i / dy.cols;
    const int64_t col = i % dy.cols;
    const uint32_t last = lists.starts[row + 1];
    uint32_t place = lists.starts[row];
    if (last - place < 2) continue;
    double sum = 0;
    for (; place < last; ++place) sum += widen(*dy.at(lists.places[place], col));
    store(sum, merged.at(row, col));
  }
}

}  // namespace

Matrix merge_repeated(const Context& ctx, const MatrixRef& dy, const MatrixRef& first) {
  const DeviceGuard guard(ctx.device);
  Matrix merged = make_matrix(ctx, dy.rows, dy.cols, dy.dtype);
  if (merged.empty()) return merged;
  copy(ctx, dy, merged);
  const RowLists lists = make_row_lists(ctx, first.as<int32_t>(), dy.rows, dy.rows);
  dispatch_device_float(dy.dtype, [&]<class T>(Type<T>) {
    launch(ctx, over(ctx, dy.rows * dy.cols), add_groups<T>, lists, View<T>(dy), View<T>(merged));
  });
  return merged;
}

void zero_repeated(const Context& ctx, const MatrixRef& dx, const MatrixRef& first) {
  const DeviceGuard guard(ctx.device);
  const auto units = static_cast<int64_t>(size_of(dx.dtype) / sizeof(uint16_t));
  launch(ctx, over(ctx, dx.rows), clear_rows, first.as<int32_t>(), dx.rows, dx.as<uint16_t>(),
         dx.cols * units, dx.stride * units);
}

}  // namespace voxgemm::cuda
