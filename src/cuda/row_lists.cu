// SPDX-License-Identifier: Apache-2.0
#include "cuda/row_lists.cuh"

#include <bit>

#include "conv/hash_key.h"
#include "cuda/sorting.h"

namespace voxgemm::cuda {

RowLists make_row_lists(const Context& ctx, const MatrixRef& rows, int64_t count) {
  const int64_t places = rows.rows * rows.cols;
  const auto* numbers = rows.as<uint32_t>();
  const auto absent = static_cast<uint32_t>(count);
  SortArrays<uint32_t> sort;
  uint32_t* starts = nullptr;
  std::shared_ptr<void> memory = make_room(
      ctx, Room{&sort.keys, places}, Room{&sort.sorted_keys, places}, Room{&sort.values, places},
      Room{&sort.sorted_values, places}, Room{&starts, count + 1});
  for_each(ctx, places, [=] __device__(int64_t p) {
    sort.keys[p] = min(numbers[p], absent);
    sort.values[p] = static_cast<uint32_t>(p);
  });
  sort_by_key(ctx, sort, places, std::bit_width(absent));
  for_each(ctx, count + 1, [=] __device__(int64_t r) {
    starts[r] =
        static_cast<uint32_t>(hash_slot(sort.sorted_keys, places, static_cast<uint32_t>(r)));
  });
  return {{sort.sorted_keys, sort.sorted_values, starts, absent, places}, std::move(memory)};
}

}  // namespace voxgemm::cuda
