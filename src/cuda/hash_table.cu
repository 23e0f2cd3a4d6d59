// SPDX-License-Identifier: Apache-2.0
//
// A table is its keys in ascending order. An insert sorts the new rows and then the slots by key,
// stable: of equal keys the lowest new row comes first and the table's own slot last. The first of
// every key is kept. Everything is written beside the table, and moved into it once the number of
// keys is known to the device: a table that would overflow stays as it was.
#include "conv/hash_key.h"
#include "conv/operators.h"
#include "core/dispatch_key.h"
#include "cuda/launch.cuh"
#include "cuda/sorting.h"

namespace voxgemm::cuda {
namespace {

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
  first_by_key<K>(ctx, {sort.sorted_keys, keys, sort.sorted_numbers, numbers}, count, distinct);
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

}  // namespace voxgemm::cuda
