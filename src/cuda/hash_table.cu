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

template <class K, class V>
struct Insert : Table<K, V> {
  const K* new_keys = nullptr;    // [rows]
  const V* new_values = nullptr;  // [rows], or null: row numbers
  int64_t rows = 0;
  K* merged_keys = nullptr;    // [slots], all ones before
  V* merged_values = nullptr;  // [slots], likewise
  long long* status = nullptr;

  static constexpr K empty = static_cast<K>(-1);
  __host__ __device__ int64_t entries() const { return rows + this->slots; }
};

template <class K, class V>
__global__ void write_entries(Insert<K, V> insert, bool skip_empty, K* keys, uint32_t* numbers) {
  for (int64_t i = thread_index(); i < insert.entries(); i += thread_count()) {
    const K key = i < insert.rows ? insert.new_keys[i] : insert.keys[i - insert.rows];
    keys[i] = key;
    numbers[i] = static_cast<uint32_t>(i);
    if (i < insert.rows && key == insert.empty && !skip_empty) {
      // -1, no such row yet, is the largest unsigned number.
      atomicMin(reinterpret_cast<unsigned long long*>(insert.status + 1),
                static_cast<unsigned long long>(i));
    }
  }
}

template <class K>
__device__ bool is_first(const K* keys, int64_t i) {
  return keys[i] != static_cast<K>(-1) && (i == 0 || keys[i - 1] != keys[i]);
}

template <class K>
__global__ void mark_first(const K* keys, int64_t count, uint32_t* marks) {
  for (int64_t i = thread_index(); i < count; i += thread_count()) marks[i] = is_first(keys, i);
}

template <class K, class V>
__global__ void merge_entries(Insert<K, V> insert,
                              const K* keys,
                              const uint32_t* numbers,
                              const uint32_t* places) {
  const int64_t count = insert.entries();
  for (int64_t i = thread_index(); i < count; i += thread_count()) {
    const bool first = is_first(keys, i);
    if (i == count - 1) insert.status[0] = int64_t{places[i]} + (first ? 1 : 0);
    if (!first || places[i] >= insert.slots) continue;
    const int64_t entry = numbers[i];
    V value;
    if (entry >= insert.rows) {
      value = insert.values[entry - insert.rows];
    } else {
      value = insert.new_values == nullptr ? static_cast<V>(entry) : insert.new_values[entry];
    }
    insert.merged_keys[places[i]] = keys[i];
    insert.merged_values[places[i]] = value;
  }
}

template <class K, class V>
__global__ void write_table(Insert<K, V> insert) {
  if (insert.status[0] > insert.slots || insert.status[1] >= 0) return;
  for (int64_t i = thread_index(); i < insert.slots; i += thread_count()) {
    insert.keys[i] = insert.merged_keys[i];
    insert.values[i] = insert.merged_values[i];
  }
}

template <class K, class V>
void insert_into(const Context& ctx,
                 const HashTableRef& table,
                 const HashInsert& given,
                 const Matrix& status) {
  Insert<K, V> insert = {Table<K, V>(table)};
  insert.new_keys = given.keys.as<K>();
  insert.new_values = given.values ? given.values->as<V>() : nullptr;
  insert.rows = given.keys.rows;
  insert.status = status.as<long long>();
  const int64_t count = insert.entries();
  Layout layout;
  const size_t merged_keys = layout.add<K>(insert.slots);
  const size_t merged_values = layout.add<V>(insert.slots);
  const size_t keys = layout.add<K>(count);
  const size_t sorted_keys = layout.add<K>(count);
  const size_t numbers = layout.add<uint32_t>(count);
  const size_t sorted_numbers = layout.add<uint32_t>(count);
  const std::shared_ptr<void> memory = ctx.allocate(layout.bytes());
  insert.merged_keys = Layout::at<K>(memory, merged_keys);
  insert.merged_values = Layout::at<V>(memory, merged_values);
  const SortArrays<K> arrays = {Layout::at<K>(memory, keys), Layout::at<K>(memory, sorted_keys),
                                Layout::at<uint32_t>(memory, numbers),
                                Layout::at<uint32_t>(memory, sorted_numbers)};
  fill_bytes(ctx, insert.merged_keys, 0xff, keys - merged_keys);
  launch(ctx, over(ctx, count), write_entries<K, V>, insert, given.skip_empty,
         Layout::at<K>(memory, keys), Layout::at<uint32_t>(memory, numbers));
  sort_by_key(ctx, arrays, count, 8 * sizeof(K));
  auto* places = Layout::at<uint32_t>(memory, numbers);
  launch(ctx, over(ctx, count), mark_first<K>, arrays.sorted_keys, count, places);
  exclusive_sums(ctx, places, places, count);
  launch(ctx, over(ctx, count), merge_entries<K, V>, insert, arrays.sorted_keys,
         arrays.sorted_values, places);
  launch(ctx, over(ctx, insert.slots), write_table<K, V>, insert);
}

template <class K, class V>
__global__ void look_up(Table<K, V> table, const K* wanted, V* found, int64_t count) {
  for (int64_t i = thread_index(); i < count; i += thread_count()) {
    found[i] = hash_value(table.keys, table.values, table.slots, wanted[i]);
  }
}

template <class K>
__global__ void write_keys(Coords coords, KeyRule rule, K* keys) {
  constexpr K empty = static_cast<K>(-1);
  for (int64_t r = thread_index(); r < coords.rows; r += thread_count()) {
    const int4 c = coords[r];
    const int32_t voxel[4] = {c.x, c.y, c.z, c.w};
    keys[r] = static_cast<K>(rule.key(voxel, empty));
  }
}

}  // namespace

Matrix hash_insert(const Context& ctx, const HashTableRef& table, const HashInsert& insert) {
  const DeviceGuard guard(ctx.device);
  Matrix status = make_matrix(ctx, 1, 2, Dtype::i64);
  fill_bytes(ctx, status.data, 0, sizeof(int64_t));
  fill_bytes(ctx, status.as<int64_t>() + 1, 0xff, sizeof(int64_t));
  dispatch_key(table.keys.dtype, [&]<class K>(Type<K>) {
    dispatch_key(table.values.dtype,
                 [&]<class V>(Type<V>) { insert_into<K, V>(ctx, table, insert, status); });
  });
  return status;
}

std::array<int64_t, 2> read_hash_status(const Context& ctx, const MatrixRef& status) {
  const DeviceGuard guard(ctx.device);
  return read_back(ctx, status.as<const std::array<int64_t, 2>>());
}

void hash_lookup(const Context& ctx,
                 const HashTableRef& table,
                 const MatrixRef& keys,
                 const MatrixRef& values) {
  const DeviceGuard guard(ctx.device);
  dispatch_key(table.keys.dtype, [&]<class K>(Type<K>) {
    dispatch_key(table.values.dtype, [&]<class V>(Type<V>) {
      launch(ctx, over(ctx, keys.rows), look_up<K, V>, Table<K, V>(table), keys.as<K>(),
             values.as<V>(), keys.rows);
    });
  });
}

void voxel_keys(const Context& ctx,
                const MatrixRef& coords,
                const Int3& shape,
                const MatrixRef& keys) {
  const DeviceGuard guard(ctx.device);
  dispatch_key(keys.dtype, [&]<class K>(Type<K>) {
    launch(ctx, over(ctx, coords.rows), write_keys<K>, Coords(coords),
           KeyRule(shape, static_cast<K>(-1)), keys.as<K>());
  });
}

}  // namespace voxgemm::cuda
