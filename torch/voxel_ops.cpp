// SPDX-License-Identifier: Apache-2.0
//
// The operators beside convolution, for tensors of either kind of device.
#include "ops.h"

#include <tuple>

#include "voxgemm/hash_table.h"
#include "voxgemm/serialize.h"

namespace voxgemm {
namespace {

// A tensor [n] as a matrix [n, 1].
HeldMatrix held_column(const Tensor& argument, std::string_view what) {
  check(argument.dim() == 1, what, " has ", argument.dim(), " dimensions, expected 1: [rows]");
  const Tensor held = contiguous_tensor(argument);
  return {held, matrix_ref(held, held.size(0), 1, dtype_of(held, what))};
}

// One that is written: the caller's own memory.
MatrixRef column_in_place(const Tensor& argument, std::string_view what) {
  check(argument.dim() == 1 && argument.is_contiguous(), what,
        " is not a contiguous tensor of one dimension, expected one: it is changed in place");
  return matrix_ref(argument, argument.size(0), 1, dtype_of(argument, what));
}

CurveOptions curve_of(const Ints& numbers) {
  check(numbers.size() == 8, "a curve has ", numbers.size(), " numbers, expected 8");
  check(numbers[0] >= 0 && numbers[0] < curve_count, "there is no curve ", numbers[0],
        ", expected 0 to ", curve_count - 1);
  return {.curve = static_cast<Curve>(numbers[0]),
          .bits = static_cast<int>(numbers[1]),
          .axes = int3(numbers, 2),
          .origin = int3(numbers, 5)};
}

Tensor new_column(const Device& device, int64_t rows, bool wide) {
  return empty_tensor(device, {rows}, wide ? ScalarType::Long : ScalarType::Int);
}

Tensor encoded(const Tensor& coords, const Ints& curve, bool wide) {
  const Context ctx = context_of(coords);
  const HeldMatrix held = held_matrix(coords, "coords");
  Tensor codes = new_column(ctx.device, held.matrix.rows, wide);
  curve_encode(ctx, held.matrix, curve_of(curve), column_in_place(codes, "codes"));
  return codes;
}

Tensor decoded(const Tensor& codes, const Ints& curve) {
  const Context ctx = context_of(codes);
  const HeldMatrix held = held_column(codes, "codes");
  Tensor coords = empty_tensor(ctx.device, {held.matrix.rows, 4}, ScalarType::Int);
  curve_decode(ctx, held.matrix, curve_of(curve),
               matrix_ref(coords, held.matrix.rows, 4, Dtype::i32));
  return coords;
}

std::tuple<Tensor, Tensor> sorted_codes(const Tensor& codes) {
  const SortedCodes sorted = sort_codes(context_of(codes), held_column(codes, "codes").matrix);
  const Ints rows = {sorted.permutation.rows};
  return {tensor_of(sorted.permutation, rows), tensor_of(sorted.inverse, rows)};
}

Tensor insert_keys(const Tensor& table_keys,
                   const Tensor& table_values,
                   const Tensor& keys,
                   const std::optional<Tensor>& values,
                   bool skip_empty) {
  const HeldMatrix held = held_column(keys, "keys");
  HashInsert insert{.keys = held.matrix, .values = {}, .skip_empty = skip_empty};
  HeldMatrix held_values;
  if (values) {
    held_values = held_column(*values, "values");
    insert.values = held_values.matrix;
  }
  return tensor_of(hash_insert(context_of(table_keys),
                               {.keys = column_in_place(table_keys, "table_keys"),
                                .values = column_in_place(table_values, "table_values")},
                               insert),
                   {2});
}

HashTableRef table_of(const HeldMatrix& keys, const HeldMatrix& values) {
  return {.keys = keys.matrix, .values = values.matrix};
}

Tensor check_insert(const Tensor& table_keys, const Tensor& table_values, const Tensor& status) {
  const Context ctx = context_of(table_keys);
  const HeldMatrix keys = held_column(table_keys, "table_keys");
  const HeldMatrix values = held_column(table_values, "table_values");
  check(status.numel() == 2 && status.is_contiguous(), "a status has ", status.numel(),
        " numbers, expected 2");
  check_hash_insert(ctx, table_of(keys, values),
                    matrix_ref(status, 1, 2, dtype_of(status, "status")));
  Tensor zero = empty_tensor(ctx.device, {1}, ScalarType::Long);
  return torch::stable::zero_(zero);
}

Tensor look_up(const Tensor& table_keys, const Tensor& table_values, const Tensor& keys) {
  const Context ctx = context_of(table_keys);
  const HeldMatrix slots = held_column(table_keys, "table_keys");
  const HeldMatrix values = held_column(table_values, "table_values");
  const HeldMatrix wanted = held_column(keys, "keys");
  Tensor found = new_column(ctx.device, wanted.matrix.rows, values.matrix.dtype == Dtype::i64);
  hash_lookup(ctx, table_of(slots, values), wanted.matrix, column_in_place(found, "values"));
  return found;
}

Tensor keys_of_voxels(const Tensor& coords, const Ints& shape, bool wide) {
  const Context ctx = context_of(coords);
  const HeldMatrix held = held_matrix(coords, "coords");
  Tensor keys = new_column(ctx.device, held.matrix.rows, wide);
  voxel_keys(ctx, held.matrix, int3(shape), column_in_place(keys, "keys"));
  return keys;
}

}  // namespace

void add_voxel_operators(StableLibrary& m) {
  m.impl("_curve_encode", TORCH_BOX(&Guarded<&encoded>::call));
  m.impl("_curve_decode", TORCH_BOX(&Guarded<&decoded>::call));
  m.impl("_sort_codes", TORCH_BOX(&Guarded<&sorted_codes>::call));
  m.impl("_hash_insert", TORCH_BOX(&Guarded<&insert_keys>::call));
  m.impl("_check_hash_insert", TORCH_BOX(&Guarded<&check_insert>::call));
  m.impl("_hash_lookup", TORCH_BOX(&Guarded<&look_up>::call));
  m.impl("_voxel_keys", TORCH_BOX(&Guarded<&keys_of_voxels>::call));
}

}  // namespace voxgemm
