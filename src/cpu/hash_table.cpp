// SPDX-License-Identifier: Apache-2.0
#include <atomic>

#include "conv/hash_key.h"
#include "conv/operators.h"
#include "core/dispatch_key.h"
#include "cpu/brick_set.h"
#include "cpu/sorting.h"
#include "cpu/voxel_index.h"

namespace voxgemm::cpu {
namespace {

// Keys and values of the rows to add, by ascending key, one row a key: the lowest.
template <class K, class V>
struct Entries {
  Buffer<K> keys;
  Buffer<V> values;
  int64_t count = 0;
  int64_t first_empty = -1;
};

template <class K, class V>
Entries<K, V> sorted_entries(const Context& ctx, const HashInsert& insert) {
  const int64_t n = insert.keys.rows;
  const auto* keys = insert.keys.as<K>();
  std::shared_ptr<KeyedRow[]> rows = make_keyed_rows(ctx, n);
  for (int64_t r = 0; r < n; ++r) rows[r] = {keys[r], static_cast<uint32_t>(r)};
  sort_rows(ctx, &rows, n);
  Entries<K, V> entries{Buffer<K>(ctx, n), Buffer<V>(ctx, n)};
  for (int64_t i = 0; i < n; ++i) {
    const auto key = static_cast<K>(rows[i].key);
    if (key == static_cast<K>(-1)) {
      if (!insert.skip_empty) entries.first_empty = rows[i].row;
      break;
    }
    if (entries.count > 0 && entries.keys[entries.count - 1] == key) continue;
    entries.keys[entries.count] = key;
    entries.values[entries.count++] =
        insert.values ? insert.values->as<V>()[rows[i].row] : static_cast<V>(rows[i].row);
  }
  return entries;
}

// Merges entries into the table's first `filled` slots; new ones count where keys are equal.
template <class K, class V>
void merge(const HashTableRef& table, int64_t filled, const Entries<K, V>& entries, int64_t total) {
  auto* keys = table.keys.as<K>();
  auto* values = table.values.as<V>();
  // From the end, so that nothing is overwritten before it was read.
  int64_t old = filled - 1;
  int64_t added = entries.count - 1;
  for (int64_t slot = total - 1; added >= 0; --slot) {
    const bool take_new = old < 0 || entries.keys[added] >= keys[old];
    if (take_new && old >= 0 && keys[old] == entries.keys[added]) --old;
    keys[slot] = take_new ? entries.keys[added] : keys[old];
    values[slot] = take_new ? entries.values[added] : values[old];
    take_new ? --added : --old;
  }
}

template <class K, class V>
void insert_into(const Context& ctx,
                 const HashTableRef& table,
                 const HashInsert& insert,
                 int64_t* status) {
  const auto* keys = table.keys.as<K>();
  const Entries<K, V> entries = sorted_entries<K, V>(ctx, insert);
  const int64_t filled = hash_slot(keys, table.keys.rows, static_cast<K>(-1));
  int64_t total = filled + entries.count;
  for (int64_t i = 0; i < entries.count; ++i) {
    const int64_t slot = hash_slot(keys, filled, entries.keys[i]);
    if (slot < filled && keys[slot] == entries.keys[i]) --total;
  }
  status[0] = total;
  status[1] = entries.first_empty;
  if (total <= table.keys.rows && entries.first_empty < 0) merge(table, filled, entries, total);
}

}  // namespace

Matrix hash_insert(const Context& ctx, const HashTableRef& table, const HashInsert& insert) {
  Matrix status = make_matrix(ctx, 1, 2, Dtype::i64);
  dispatch_key(table.keys.dtype, [&]<class K>(Type<K>) {
    dispatch_key(table.values.dtype, [&]<class V>(Type<V>) {
      insert_into<K, V>(ctx, table, insert, status.as<int64_t>());
    });
  });
  return status;
}

}  // namespace voxgemm::cpu
