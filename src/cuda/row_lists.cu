// SPDX-License-Identifier: Apache-2.0
#include "cuda/row_lists.cuh"

#include <bit>

#include "cuda/sorting.h"
#include "cuda/voxel_index.cuh"

namespace voxgemm::cuda {
namespace {

__global__ void write_list_keys(
    const int32_t* rows, int64_t places, uint32_t count, uint32_t* keys, uint32_t* numbers) {
  for (int64_t p = thread_index(); p < places; p += thread_count()) {
    keys[p] = min(static_cast<uint32_t>(rows[p]), count);
    numbers[p] = static_cast<uint32_t>(p);
  }
}

__global__ void write_starts(const uint32_t* keys, int64_t places, int64_t rows, uint32_t* starts) {
  for (int64_t r = thread_index(); r < rows; r += thread_count()) {
    starts[r] = static_cast<uint32_t>(hash_slot(keys, places, static_cast<uint32_t>(r)));
  }
}

}  // namespace

RowLists make_row_lists(const Context& ctx, const int32_t* rows, int64_t places, int64_t count) {
  Layout layout;
  const size_t keys = layout.add<uint32_t>(places);
  const size_t sorted_keys = layout.add<uint32_t>(places);
  const size_t numbers = layout.add<uint32_t>(places);
  const size_t sorted_numbers = layout.add<uint32_t>(places);
  const size_t starts = layout.add<uint32_t>(count + 1);
  const std::shared_ptr<void> memory = ctx.allocate(layout.bytes());
  const SortArrays<uint32_t> arrays = {
      Layout::at<uint32_t>(memory, keys), Layout::at<uint32_t>(memory, sorted_keys),
      Layout::at<uint32_t>(memory, numbers), Layout::at<uint32_t>(memory, sorted_numbers)};
  launch(ctx, over(ctx, places), write_list_keys, rows, places, static_cast<uint32_t>(count),
         Layout::at<uint32_t>(memory, keys), Layout::at<uint32_t>(memory, numbers));
  sort_by_key(ctx, arrays, places, std::bit_width(static_cast<uint64_t>(count)));
  launch(ctx, over(ctx, count + 1), write_starts, arrays.sorted_keys, places, count + 1,
         Layout::at<uint32_t>(memory, starts));
  return {{arrays.sorted_keys, arrays.sorted_values, Layout::at<uint32_t>(memory, starts), count,
           places},
          memory};
}

}  // namespace voxgemm::cuda
