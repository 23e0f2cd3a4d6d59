// SPDX-License-Identifier: Apache-2.0
#include "voxgemm/hash_table.h"

#include <algorithm>

#include "conv/coords.h"
#include "conv/items.h"
#include "conv/operators.h"
#include "conv/validate.h"
#include "core/dispatch_key.h"
#include "voxgemm/coords.h"
#include "voxgemm/error.h"

namespace voxgemm {
namespace {

void validate_table(const Context& ctx, const HashTableRef& table) {
  const int64_t slots = table.keys.rows;
  validate_column(ctx, table.keys,
                  {"table_keys", slots, 1, integer_dtype(table.keys, "table_keys")});
  validate_column(ctx, table.values,
                  {"table_values", slots, 1, integer_dtype(table.values, "table_values")});
}

}  // namespace

Matrix hash_insert(const Context& ctx, const HashTableRef& table, const HashInsert& insert) {
  validate_table(ctx, table);
  const MatrixRef& keys = insert.keys;
  validate_column(ctx, keys, {"keys", keys.rows, 1, table.keys.dtype});
  validate_sortable(keys.rows + table.keys.rows);
  const Memory written[] = {memory_of(table.keys, "table_keys"),
                            memory_of(table.values, "table_values")};
  validate_apart(written[0], written[1]);
  for (const Memory& memory : written) validate_apart(memory, memory_of(keys, "keys"));
  if (insert.values) {
    validate_column(ctx, *insert.values, {"values", keys.rows, 1, table.values.dtype});
    for (const Memory& memory : written)
      validate_apart(memory, memory_of(*insert.values, "values"));
  }
  return run(ctx, cuda::hash_insert, cpu::hash_insert, table, insert);
}

void check_hash_insert(const Context& ctx, const HashTableRef& table, const MatrixRef& status) {
  validate_column(ctx, status, {"the status of an insert", 1, 2, Dtype::i64});
  std::array<int64_t, 2> numbers{};
  if (on_device(ctx)) {
    cuda::read_back(ctx, status.data, numbers.data(), sizeof(numbers));
  } else {
    std::copy_n(status.as<int64_t>(), 2, numbers.begin());
  }
  check(numbers[1] < 0, "the key in row ", numbers[1],
        " is all ones, which marks an empty slot; expected any other key");
  check(numbers[0] <= table.keys.rows, "the table has ", table.keys.rows, " slots for ", numbers[0],
        " distinct keys, expected at least as many slots as keys");
}

void hash_lookup(const Context& ctx,
                 const HashTableRef& table,
                 const MatrixRef& keys,
                 const MatrixRef& values) {
  validate_table(ctx, table);
  validate_column(ctx, keys, {"keys", keys.rows, 1, table.keys.dtype});
  validate_column(ctx, values, {"values", keys.rows, 1, table.values.dtype});
  const Memory result = memory_of(values, "values");
  validate_apart(result, memory_of(keys, "keys"));
  validate_apart(result, memory_of(table.keys, "table_keys"));
  validate_apart(result, memory_of(table.values, "table_values"));
  dispatch_key(keys.dtype, [&]<class K>(Type<K>) {
    dispatch_key(values.dtype, [&]<class V>(Type<V>) {
      for_items(ctx, keys.rows,
                HashLookup<K, V>{HashSlots<K, V>(table), keys.as<K>(), values.as<V>()});
    });
  });
}

void voxel_keys(const Context& ctx,
                const MatrixRef& coords,
                const Int3& shape,
                const MatrixRef& keys) {
  validate_coords(ctx, coords, std::nullopt, std::nullopt);
  validate_column(ctx, keys, {"keys", coords.rows, 1, integer_dtype(keys, "keys")});
  validate_apart(memory_of(keys, "keys"), memory_of(coords, "coords"));
  validate_shape(shape);
  dispatch_key(keys.dtype, [&]<class K>(Type<K>) {
    for_items(ctx, coords.rows, VoxelNumbers<K>(coords, shape, keys));
  });
}

}  // namespace voxgemm
