// SPDX-License-Identifier: Apache-2.0
//
// What is made with the toolkit's sort, prefix sum and selection: they compile slowly.
#include <bit>
#include <cub/device/device_radix_sort.cuh>
#include <cub/device/device_scan.cuh>
#include <cub/device/device_select.cuh>

#include "conv/coords.h"
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

// Keys and the numbers that go with them.
template <class Key>
struct SortArrays {
  Key* keys;
  Key* sorted_keys;
  uint32_t* numbers;
  uint32_t* sorted_numbers;
};

// Sorts by the low `bits` bits of the keys, stable; all four arrays are apart.
template <class Key>
void sort_by_key(const Context& ctx, const SortArrays<Key>& arrays, int64_t count, int bits) {
  if (count == 0) return;
  with_memory(ctx, "the radix sort", [&](void* memory, size_t& bytes) {
    return cub::DeviceRadixSort::SortPairs(memory, bytes, arrays.keys, arrays.sorted_keys,
                                           arrays.numbers, arrays.sorted_numbers, count, 0, bits,
                                           stream_of(ctx));
  });
}

// A table is its keys in ascending order. An insert sorts the new rows and then the slots by key,
// stable: of equal keys the lowest new row comes first and the table's own slot last. The first of
// every key is kept. Everything is written beside the table, and moved into it once the number of
// keys is known to the device: a table that would overflow stays as it was.
//
// status: keys that there would be, and the lowest row whose key is `empty`, or -1.
template <class K, class V>
void insert_into(const Context& ctx,
                 const HashSlots<K, V>& table,
                 const HashInsert& insert,
                 int64_t* status) {
  constexpr K empty = static_cast<K>(-1);
  const int64_t rows = insert.keys.rows;
  const int64_t count = rows + table.count;
  if (count == 0) return;
  SortArrays<K> sort;
  V* values = nullptr;
  int64_t* distinct = nullptr;  // keys, `empty` too
  const std::shared_ptr<void> memory = make_room(
      ctx, Room{&sort.keys, count}, Room{&sort.sorted_keys, count}, Room{&sort.numbers, count},
      Room{&sort.sorted_numbers, count}, Room{&values, count}, Room{&distinct, 1});
  K* const keys = sort.keys;
  uint32_t* const numbers = sort.numbers;
  const auto* new_keys = insert.keys.as<K>();
  const auto* new_values = insert.values ? insert.values->as<V>() : nullptr;
  const bool skip_empty = insert.skip_empty;
  for_each(ctx, count, [=] __device__(int64_t i) {
    keys[i] = i < rows ? new_keys[i] : table.keys[i - rows];
    numbers[i] = static_cast<uint32_t>(i);
    if (i >= rows || keys[i] != empty || skip_empty) return;
    // -1, no such row yet, is the largest unsigned number.
    atomicMin(reinterpret_cast<unsigned long long*>(status + 1),
              static_cast<unsigned long long>(i));
  });
  sort_by_key(ctx, sort, count, 8 * sizeof(K));
  with_memory(ctx, "the selection", [&](void* memory, size_t& bytes) {
    return cub::DeviceSelect::UniqueByKey(memory, bytes, sort.sorted_keys, sort.sorted_numbers,
                                          sort.keys, sort.numbers, distinct, count, stream_of(ctx));
  });
  for_each(ctx, count, [=] __device__(int64_t i) {
    if (i >= *distinct) return;
    // Empty slots are one key, the last.
    if (i == *distinct - 1) status[0] = *distinct - (keys[i] == empty ? 1 : 0);
    const int64_t entry = numbers[i];
    if (entry >= rows) {
      values[i] = table.values[entry - rows];
    } else {
      values[i] = new_values == nullptr ? static_cast<V>(entry) : new_values[entry];
    }
  });
  for_each(ctx, table.count, [=] __device__(int64_t i) {
    if (status[0] > table.count || status[1] >= 0) return;
    table.keys[i] = i < status[0] ? keys[i] : empty;
    table.values[i] = i < status[0] ? values[i] : static_cast<V>(-1);
  });
}

}  // namespace

template <class Key>
void sort_keys(const Context& ctx, const Key* keys, Key* sorted, int64_t count, int bits) {
  with_memory(ctx, "the radix sort", [&](void* memory, size_t& bytes) {
    return cub::DeviceRadixSort::SortKeys(memory, bytes, keys, sorted, count, 0, bits,
                                          stream_of(ctx));
  });
}
template void sort_keys(const Context&, const uint64_t*, uint64_t*, int64_t, int);
template void sort_keys(const Context&, const unsigned __int128*, unsigned __int128*, int64_t, int);

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

Matrix hash_insert(const Context& ctx, const HashTableRef& table, const HashInsert& insert) {
  Matrix status = make_matrix(ctx, 1, 2, Dtype::i64);
  fill_bytes(ctx, status.data, 0, sizeof(int64_t));
  fill_bytes(ctx, status.as<int64_t>() + 1, 0xff, sizeof(int64_t));
  dispatch_key(table.keys.dtype, [&]<class K>(Type<K>) {
    dispatch_key(table.values.dtype, [&]<class V>(Type<V>) {
      insert_into(ctx, HashSlots<K, V>(table), insert, status.as<int64_t>());
    });
  });
  return status;
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
