// SPDX-License-Identifier: Apache-2.0
//
// A table is its keys in ascending order. An insert sorts the new rows and then the slots by key,
// stable: of equal keys the lowest new row comes first and the table's own slot last. The first of
// every key is kept. Everything is written beside the table, and moved into it once the number of
// keys is known to the device: a table that would overflow stays as it was.
#include "conv/hash_key.h"
#include "conv/operators.h"
#include "core/dispatch_key.h"
#include "cuda/sorting.h"
#include "cuda/voxel_index.cuh"

namespace voxgemm::cuda {
namespace {

template <class K, class V>
struct Table {
  K* keys;    // [slots]
  V* values;  // [slots]
  int64_t slots;

  explicit Table(const HashTableRef& table)
      : keys(table.keys.as<K>()), values(table.values.as<V>()), slots(table.keys.rows) {}
};

// status: keys that there would be, and the lowest row whose key is `empty`, or -1.
template <class K, class V>
void insert_into(const Context& ctx,
                 const Table<K, V>& table,
                 const HashInsert& insert,
                 int64_t* status) {
  constexpr K empty = static_cast<K>(-1);
  const int64_t rows = insert.keys.rows;
  const int64_t count = rows + table.slots;
  if (count == 0) return;
  Layout layout;
  const size_t keys_at = layout.add<K>(count);
  const size_t sorted_keys_at = layout.add<K>(count);
  const size_t numbers_at = layout.add<uint32_t>(count);
  const size_t sorted_numbers_at = layout.add<uint32_t>(count);
  const size_t values_at = layout.add<V>(count);
  const size_t distinct_at = layout.add<int64_t>(1);
  const std::shared_ptr<void> memory = ctx.allocate(layout.bytes());
  auto* keys = Layout::at<K>(memory, keys_at);
  auto* sorted_keys = Layout::at<K>(memory, sorted_keys_at);
  auto* numbers = Layout::at<uint32_t>(memory, numbers_at);
  auto* sorted_numbers = Layout::at<uint32_t>(memory, sorted_numbers_at);
  auto* values = Layout::at<V>(memory, values_at);
  auto* distinct = Layout::at<int64_t>(memory, distinct_at);  // keys, `empty` too
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
  sort_by_key<K>(ctx, {keys, sorted_keys, numbers, sorted_numbers}, count, 8 * sizeof(K));
  first_by_key<K>(ctx, {sorted_keys, keys, sorted_numbers, numbers}, count, distinct);
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
  for_each(ctx, table.slots, [=] __device__(int64_t i) {
    if (status[0] > table.slots || status[1] >= 0) return;
    table.keys[i] = i < status[0] ? keys[i] : empty;
    table.values[i] = i < status[0] ? values[i] : static_cast<V>(-1);
  });
}

template <class K, class V>
void look_up(const Context& ctx,
             const Table<K, V>& table,
             const MatrixRef& keys,
             const MatrixRef& values) {
  const auto* wanted = keys.as<K>();
  auto* found = values.as<V>();
  for_each(ctx, keys.rows, [=] __device__(int64_t i) {
    found[i] = hash_value(table.keys, table.values, table.slots, wanted[i]);
  });
}

template <class K>
void write_keys(const Context& ctx, const Coords& coords, const KeyRule& rule, K* keys) {
  for_each(ctx, coords.rows, [=] __device__(int64_t row) {
    const int4 c = coords[row];
    const int32_t voxel[4] = {c.x, c.y, c.z, c.w};
    keys[row] = static_cast<K>(rule.key(voxel, static_cast<K>(-1)));
  });
}

}  // namespace

Matrix hash_insert(const Context& ctx, const HashTableRef& table, const HashInsert& insert) {
  const DeviceGuard guard(ctx.device);
  Matrix status = make_matrix(ctx, 1, 2, Dtype::i64);
  fill_bytes(ctx, status.data, 0, sizeof(int64_t));
  fill_bytes(ctx, status.as<int64_t>() + 1, 0xff, sizeof(int64_t));
  dispatch_key(table.keys.dtype, [&]<class K>(Type<K>) {
    dispatch_key(table.values.dtype, [&]<class V>(Type<V>) {
      insert_into(ctx, Table<K, V>(table), insert, status.as<int64_t>());
    });
  });
  return status;
}

void hash_lookup(const Context& ctx,
                 const HashTableRef& table,
                 const MatrixRef& keys,
                 const MatrixRef& values) {
  const DeviceGuard guard(ctx.device);
  dispatch_key(table.keys.dtype, [&]<class K>(Type<K>) {
    dispatch_key(table.values.dtype,
                 [&]<class V>(Type<V>) { look_up(ctx, Table<K, V>(table), keys, values); });
  });
}

void voxel_keys(const Context& ctx,
                const MatrixRef& coords,
                const Int3& shape,
                const MatrixRef& keys) {
  const DeviceGuard guard(ctx.device);
  dispatch_key(keys.dtype, [&]<class K>(Type<K>) {
    write_keys(ctx, Coords(coords), KeyRule(shape, static_cast<K>(-1)), keys.as<K>());
  });
}

}  // namespace voxgemm::cuda
