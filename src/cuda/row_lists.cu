// SPDX-License-Identifier: Apache-2.0
#include "cuda/row_lists.cuh"

#include <bit>

#include "cuda/each.cuh"
#include "cuda/sorting.h"

namespace voxgemm::cuda {

RowLists make_row_lists(const Context& ctx, const int32_t* rows, int64_t places, int64_t count) {
  Layout layout;
  const size_t keys_at = layout.add<uint32_t>(places);
  const size_t sorted_keys_at = layout.add<uint32_t>(places);
  const size_t numbers_at = layout.add<uint32_t>(places);
  const size_t sorted_numbers_at = layout.add<uint32_t>(places);
  const size_t starts_at = layout.add<uint32_t>(count + 1);
  const std::shared_ptr<void> memory = ctx.allocate(layout.bytes());
  auto* keys = Layout::at<uint32_t>(memory, keys_at);
  auto* sorted_keys = Layout::at<uint32_t>(memory, sorted_keys_at);
  auto* numbers = Layout::at<uint32_t>(memory, numbers_at);
  auto* sorted_numbers = Layout::at<uint32_t>(memory, sorted_numbers_at);
  auto* starts = Layout::at<uint32_t>(memory, starts_at);
  for_each(ctx, places, [=] __device__(int64_t p) {
    keys[p] = min(static_cast<uint32_t>(rows[p]), static_cast<uint32_t>(count));
    numbers[p] = static_cast<uint32_t>(p);
  });
  const SortArrays<uint32_t> arrays = {keys, sorted_keys, numbers, sorted_numbers};
  sort_by_key(ctx, arrays, places, std::bit_width(static_cast<uint64_t>(count)));
  for_each(ctx, count + 1, [=] __device__(int64_t r) {
    starts[r] = static_cast<uint32_t>(hash_slot(sorted_keys, places, static_cast<uint32_t>(r)));
  });
  return {{sorted_keys, sorted_numbers, starts, count, places}, memory};
}

}  // namespace voxgemm::cuda
