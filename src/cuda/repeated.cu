// SPDX-License-Identifier: Apache-2.0
#include "conv/passes.h"

#include <algorithm>
#include <bit>

#include "cuda/float.cuh"
#include "cuda/launch.cuh"
#include "cuda/sorting.h"
#include "cuda/voxel_index.cuh"

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

__global__ void write_sort_keys(const int32_t* first,
                                int64_t rows,
                                uint32_t* keys,
                                uint32_t* values) {
  for (int64_t row = thread_index(); row < rows; row += thread_count()) {
    keys[row] = static_cast<uint32_t>(first[row]);
    values[row] = static_cast<uint32_t>(row);
  }
}

struct Groups {
  const uint32_t* keys;    // [rows], ascending: the lowest row of the voxel
  const uint32_t* values;  // [rows]: rows, ascending where keys are equal
  int64_t rows;
};

// A thread adds one column of one voxel's rows.
template <class T>
__global__ void add_groups(Groups groups, const T* dy, int64_t dy_stride, int64_t cols, T* merged) {
  for (int64_t i = thread_index(); i < groups.rows * cols; i += thread_count()) {
    const int64_t start = i / cols;
    const int64_t col = i - start * cols;
    const uint32_t key = groups.keys[start];
    if (start > 0 && groups.keys[start - 1] == key) continue;
    int64_t place = start + 1;
    if (place == groups.rows || groups.keys[place] != key) continue;
    double sum = 0;
    for (place = start; place < groups.rows && groups.keys[place] == key; ++place) {
      sum += widen(dy[groups.values[place] * dy_stride + col]);
    }
    store(sum, &merged[static_cast<int64_t>(key) * cols + col]);
  }
}

}  // namespace

Matrix merge_repeated(const Context& ctx, const MatrixRef& dy, const MatrixRef& first) {
  const DeviceGuard guard(ctx.device);
  Matrix merged = make_matrix(ctx, dy.rows, dy.cols, dy.dtype);
  if (merged.empty()) return merged;
  const size_t row_bytes = dy.cols * size_of(dy.dtype);
  check_cuda(cudaMemcpy2DAsync(merged.data, row_bytes, dy.data, dy.stride * size_of(dy.dtype),
                               row_bytes, dy.rows, cudaMemcpyDeviceToDevice, stream_of(ctx)),
             "cudaMemcpy2DAsync");
  Layout layout;
  const size_t keys = layout.add<uint32_t>(dy.rows);
  const size_t sorted_keys = layout.add<uint32_t>(dy.rows);
  const size_t values = layout.add<uint32_t>(dy.rows);
  const size_t sorted_values = layout.add<uint32_t>(dy.rows);
  const std::shared_ptr<void> memory = ctx.allocate(layout.bytes());
  const SortArrays<uint32_t> arrays = {
      Layout::at<uint32_t>(memory, keys), Layout::at<uint32_t>(memory, sorted_keys),
      Layout::at<uint32_t>(memory, values), Layout::at<uint32_t>(memory, sorted_values)};
  launch(ctx, over(ctx, dy.rows), write_sort_keys, first.as<int32_t>(), dy.rows,
         Layout::at<uint32_t>(memory, keys), Layout::at<uint32_t>(memory, values));
  const int bits =
      std::max(1, static_cast<int>(std::bit_width(static_cast<uint64_t>(dy.rows - 1))));
  sort_by_key(ctx, arrays, dy.rows, bits);
  const Groups groups = {arrays.sorted_keys, arrays.sorted_values, dy.rows};
  dispatch_device_float(dy.dtype, [&]<class T>(Type<T>) {
    launch(ctx, over(ctx, dy.rows * dy.cols), add_groups<T>, groups, dy.as<T>(), dy.stride, dy.cols,
           merged.as<T>());
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
