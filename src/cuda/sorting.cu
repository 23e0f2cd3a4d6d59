// SPDX-License-Identifier: Apache-2.0
#include "cuda/sorting.h"

#include <bit>
#include <cub/device/device_radix_sort.cuh>
#include <cub/device/device_scan.cuh>
#include <cub/device/device_select.cuh>

#include "conv/hash_key.h"
#include "conv/operators.h"
#include "core/dispatch_key.h"
#include "cuda/row_lists.cuh"

namespace voxgemm::cuda {
namespace {

// Calls call(memory, bytes) once for the size of its memory and once with it.
template <class Call>
void with_memory(const Context& ctx, const char* name, const Call& call) {
  size_t bytes = 0;
  check_cuda(call(nullptr, bytes), name);
  const std::shared_ptr<void> memory = ctx.allocate(bytes);
  check_cuda(call(memory.get(), bytes), name);
}

}  // namespace

template <class Key>
void sort_by_key(const Context& ctx, const SortArrays<Key>& arrays, int64_t count, int bits) {
  if (count == 0) return;
  with_memory(ctx, "the radix sort", [&](void* memory, size_t& bytes) {
    return cub::DeviceRadixSort::SortPairs(memory, bytes, arrays.keys, arrays.sorted_keys,
                                           arrays.numbers, arrays.sorted_numbers, count, 0, bits,
                                           stream_of(ctx));
  });
}
template void sort_by_key(const Context&, const SortArrays<uint32_t>&, int64_t, int);
template void sort_by_key(const Context&, const SortArrays<uint64_t>&, int64_t, int);

template <class Key>
void sort_keys(const Context& ctx, const Key* keys, Key* sorted, int64_t count, int bits) {
  with_memory(ctx, "the radix sort", [&](void* memory, size_t& bytes) {
    return cub::DeviceRadixSort::SortKeys(memory, bytes, keys, sorted, count, 0, bits,
                                          stream_of(ctx));
  });
}
template void sort_keys(const Context&, const uint64_t*, uint64_t*, int64_t, int);
template void sort_keys(const Context&, const unsigned __int128*, unsigned __int128*, int64_t, int);

template <class Key>
void first_by_key(const Context& ctx, const SortArrays<Key>& arrays, int64_t n, int64_t* count) {
  with_memory(ctx, "the selection", [&](void* memory, size_t& bytes) {
    return cub::DeviceSelect::UniqueByKey(memory, bytes, arrays.keys, arrays.numbers,
                                          arrays.sorted_keys, arrays.sorted_numbers, count, n,
                                          stream_of(ctx));
  });
}
template void first_by_key(const Context&, const SortArrays<uint32_t>&, int64_t, int64_t*);
template void first_by_key(const Context&, const SortArrays<uint64_t>&, int64_t, int64_t*);

void exclusive_sums(const Context& ctx, uint32_t* sums, int64_t count) {
  if (count == 0) return;
  with_memory(ctx, "the prefix sum", [&](void* memory, size_t& bytes) {
    return cub::DeviceScan::ExclusiveSum(memory, bytes, sums, sums, count, stream_of(ctx));
  });
}

void sort_codes(const Context& ctx, const MatrixRef& codes, const SortedCodes& sorted) {
  const int64_t n = codes.rows;
  uint32_t* rows = nullptr;
  uint32_t* sorted_rows = nullptr;
  const std::shared_ptr<void> memory = make_room(ctx, Room{&rows, n}, Room{&sorted_rows, n});
  for_each(ctx, n, [=] __device__(int64_t r) { rows[r] = static_cast<uint32_t>(r); });
  dispatch_key(codes.dtype, [&]<class Key>(Type<Key>) {
    const std::shared_ptr<void> spare = ctx.allocate(sizeof(Key) * n);
    sort_by_key<Key>(ctx, {codes.as<Key>(), static_cast<Key*>(spare.get()), rows, sorted_rows}, n,
                     8 * sizeof(Key));
  });
  auto* permutation = sorted.permutation.as<int64_t>();
  auto* inverse = sorted.inverse.as<int64_t>();
  for_each(ctx, n, [=] __device__(int64_t i) {
    permutation[i] = sorted_rows[i];
    inverse[sorted_rows[i]] = i;
  });
}

RowLists make_row_lists(const Context& ctx, const MatrixRef& rows, int64_t count) {
  const int64_t places = rows.rows * rows.cols;
  const auto* numbers = rows.as<uint32_t>();
  const auto absent = static_cast<uint32_t>(count);
  SortArrays<uint32_t> sort;
  uint32_t* starts = nullptr;
  std::shared_ptr<void> memory = make_room(
      ctx, Room{&sort.keys, places}, Room{&sort.sorted_keys, places}, Room{&sort.numbers, places},
      Room{&sort.sorted_numbers, places}, Room{&starts, count + 1});
  for_each(ctx, places, [=] __device__(int64_t p) {
    sort.keys[p] = min(numbers[p], absent);
    sort.numbers[p] = static_cast<uint32_t>(p);
  });
  sort_by_key(ctx, sort, places, std::bit_width(absent));
  for_each(ctx, count + 1, [=] __device__(int64_t r) {
    starts[r] =
        static_cast<uint32_t>(hash_slot(sort.sorted_keys, places, static_cast<uint32_t>(r)));
  });
  return {{sort.sorted_keys, sort.sorted_numbers, starts, absent, places}, std::move(memory)};
}

}  // namespace voxgemm::cuda
