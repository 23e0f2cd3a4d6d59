// SPDX-License-Identifier: Apache-2.0
#include "cuda/sorting.h"

#include <cub/device/device_radix_sort.cuh>
#include <cub/device/device_scan.cuh>
#include <cub/device/device_select.cuh>

#include "cuda/device.h"

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
                                           arrays.values, arrays.sorted_values, count, 0, bits,
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
    return cub::DeviceSelect::UniqueByKey(memory, bytes, arrays.keys, arrays.values,
                                          arrays.sorted_keys, arrays.sorted_values, count, n,
                                          stream_of(ctx));
  });
}
template void first_by_key(const Context&, const SortArrays<uint32_t>&, int64_t, int64_t*);
template void first_by_key(const Context&, const SortArrays<uint64_t>&, int64_t, int64_t*);

void exclusive_sums(const Context& ctx, const uint32_t* counts, uint32_t* sums, int64_t count) {
  if (count == 0) return;
  with_memory(ctx, "the prefix sum", [&](void* memory, size_t& bytes) {
    return cub::DeviceScan::ExclusiveSum(memory, bytes, counts, sums, count, stream_of(ctx));
  });
}

}  // namespace voxgemm::cuda
