// SPDX-License-Identifier: Apache-2.0
//
// The operators beside convolution, for tensors of either kind of device.
#include "ops.h"

#include <tuple>

#include "voxgemm/depthwise.h"
#include "voxgemm/hash_table.h"
#include "voxgemm/pooling.h"
#include "voxgemm/sampling.h"
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
          .bits = narrow(numbers[1]),
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

// A matrix whose rows stand one behind the other.
HeldMatrix held_block(const Tensor& argument, std::string_view what) {
  return held_matrix(contiguous_tensor(argument), what);
}

SampleOptions sample_options_of(const Ints& numbers) {
  check(numbers.size() == 2 || numbers.size() == 5, "sampling has ", numbers.size(),
        " numbers, expected 2 or 5");
  SampleOptions options{.mode = static_cast<SampleMode>(numbers[0]),
                        .rounding = static_cast<Rounding>(numbers[1])};
  if (numbers.size() == 5) options.spatial_shape = int3(numbers, 2);
  return options;
}

std::tuple<Tensor, Tensor> map_of_points(const Tensor& coords,
                                         const Tensor& points,
                                         const std::optional<Tensor>& batch,
                                         int64_t points_per_batch,
                                         const Ints& options) {
  const Context ctx = context_of(coords);
  const HeldMatrix voxels = held_matrix(coords, "coords");
  const HeldMatrix places = held_block(points, "points");
  PointsRef all{.points = places.matrix, .batch = {}, .points_per_batch = points_per_batch};
  HeldMatrix batches;
  if (batch) {
    batches = held_column(*batch, "batch");
    all.batch = batches.matrix;
  }
  const SampleMap map =
      sample_map(ctx, VoxelIndex(ctx, voxels.matrix), all, sample_options_of(options));
  return {tensor_of(map.rows), tensor_of(map.weights)};
}

Tensor grad_of_points(const Tensor& points, const Tensor& rows, const Tensor& dweights) {
  const Context ctx = context_of(points);
  const HeldMatrix places = held_block(points, "points");
  const HeldMatrix found = held_block(rows, "rows");
  const HeldMatrix gradients = held_block(dweights, "dweights");
  Tensor dpoints = empty_tensor(ctx.device, {places.matrix.rows, 3}, points.scalar_type());
  SampleMap map;
  static_cast<MatrixRef&>(map.rows) = found.matrix;
  sample_map_grad(ctx, places.matrix, map, gradients.matrix,
                  matrix_ref(dpoints, places.matrix.rows, 3, places.matrix.dtype));
  return dpoints;
}

Tensor empty_like(const MatrixRef& like, int64_t rows) {
  return empty_tensor(like.device, {rows, like.cols}, scalar_type(like.dtype));
}
MatrixRef whole(const Tensor& result, Dtype dtype) {
  return matrix_ref(result, result.size(0), result.size(1), dtype);
}

Tensor sum_of_rows(const Tensor& x, const Tensor& rows, const Tensor& weights) {
  const HeldMatrix in = held_matrix(x, "features");
  const HeldMatrix numbers = held_block(rows, "rows");
  const HeldMatrix factors = held_block(weights, "weights");
  Tensor y = empty_like(in.matrix, numbers.matrix.rows);
  weighted_sum(context_of(x), in.matrix, {numbers.matrix, factors.matrix},
               whole(y, in.matrix.dtype));
  return y;
}

Tensor sum_grad_input(const Tensor& dy, const Tensor& rows, const Tensor& weights, int64_t n) {
  check(n >= 0, "n is ", n, ", expected 0 or more rows");
  const HeldMatrix out = held_matrix(dy, "dy");
  const HeldMatrix numbers = held_block(rows, "rows");
  const HeldMatrix factors = held_block(weights, "weights");
  Tensor dx = empty_like(out.matrix, n);
  weighted_sum_grad_input(context_of(dy), out.matrix, {numbers.matrix, factors.matrix},
                          whole(dx, out.matrix.dtype));
  return dx;
}

Tensor sum_grad_weights(const Tensor& x, const Tensor& dy, const Tensor& rows) {
  const HeldMatrix in = held_matrix(x, "features");
  const HeldMatrix out = held_matrix(dy, "dy");
  const HeldMatrix numbers = held_block(rows, "rows");
  const Dtype dtype = in.matrix.dtype == Dtype::f64 ? Dtype::f64 : Dtype::f32;
  Tensor dweights = empty_tensor(in.matrix.device, {numbers.matrix.rows, numbers.matrix.cols},
                                 scalar_type(dtype));
  weighted_sum_grad_weights(context_of(x), in.matrix, out.matrix,
                            {numbers.matrix, whole(dweights, dtype)});
  return dweights;
}

Reduction reduction_of(int64_t number) {
  check(number >= 0 && number < reduction_count, "there is no reduction ", number,
        ", expected 0 to ", reduction_count - 1);
  return static_cast<Reduction>(number);
}

// A reduction's result with its tensors.
struct ReducedTensors {
  Tensor y;
  Tensor winners;
  Reduced reduced;

  ReducedTensors(const MatrixRef& x, int64_t rows, Reduction reduction)
      : y(empty_like(x, rows)), winners(empty_tensor(x.device, {0}, ScalarType::Int)) {
    reduced.y = whole(y, x.dtype);
    if (reduction == Reduction::sum || reduction == Reduction::mean) return;
    winners = empty_tensor(x.device, {rows, x.cols}, ScalarType::Int);
    reduced.winners = whole(winners, Dtype::i32);
  }
};

std::tuple<Tensor, Tensor> pooled(const Tensor& x,
                                  const Tensors& map,
                                  const Ints& layer,
                                  int64_t number) {
  const Maps maps(map, {}, layer);
  const Reduction reduction = reduction_of(number);
  const HeldMatrix in = held_matrix(x, "features");
  const ReducedTensors result(in.matrix, maps.map.n_out, reduction);
  pool(context_of(x), maps.map, in.matrix, reduction, result.reduced);
  return {result.y, result.winners};
}

Tensor pooled_grad(const Tensors& dy_and_winners,
                   const Tensors& map,
                   const Tensors& transposed,
                   const Ints& layer,
                   int64_t number) {
  const Maps maps(map, transposed, layer);
  const Tensor& dy = dy_and_winners.at(0);
  const HeldMatrix out = held_matrix(dy, "dy");
  PoolGrad grad{.dy = out.matrix, .winners = {}, .transposed = maps.back()};
  HeldMatrix rows;
  if (dy_and_winners.size() > 1) {
    rows = held_block(dy_and_winners[1], "winners");
    grad.winners = rows.matrix;
  }
  Tensor dx = empty_like(out.matrix, maps.map.n_in);
  pool_grad(context_of(dy), maps.map, reduction_of(number), grad, whole(dx, out.matrix.dtype));
  return dx;
}

std::tuple<Tensor, Tensor> reduced_segments(const Tensor& x,
                                            const Tensor& segments,
                                            int64_t count,
                                            int64_t number) {
  check(count >= 0 && count <= INT32_MAX, "count is ", count, ", expected 0 to ", INT32_MAX);
  const Reduction reduction = reduction_of(number);
  const HeldMatrix in = held_matrix(x, "features");
  const HeldMatrix numbers = held_column(segments, "segments");
  const ReducedTensors result(in.matrix, count, reduction);
  segment_reduce(context_of(x), in.matrix, numbers.matrix, reduction, result.reduced);
  return {result.y, result.winners};
}

Tensor depthwise(const Tensor& x,
                 const Tensor& weight,
                 const std::optional<Tensor>& bias,
                 const Tensors& map,
                 const Ints& layer) {
  const Maps maps(map, {}, layer);
  const HeldMatrix in = held_matrix(x, "features");
  const HeldMatrix w = held_matrix(weight, "weight");
  DepthwiseForward operands{.x = in.matrix, .w = w.matrix, .bias = {}};
  HeldMatrix row;
  if (bias) {
    row = held_column(*bias, "bias");
    operands.bias = matrix_ref(row.tensor, 1, row.matrix.rows, row.matrix.dtype);
  }
  Tensor y = empty_like(in.matrix, maps.map.n_out);
  depthwise_forward(context_of(x), maps.map, operands, whole(y, in.matrix.dtype));
  return y;
}

Tensor depthwise_dx(const Tensor& dy,
                    const Tensor& weight,
                    const Tensors& map,
                    const Tensors& transposed,
                    const Ints& layer) {
  const Maps maps(map, transposed, layer);
  const HeldMatrix out = held_matrix(dy, "dy");
  const HeldMatrix w = held_matrix(weight, "weight");
  Tensor dx = empty_like(out.matrix, maps.map.n_in);
  depthwise_grad_input(context_of(dy), maps.map,
                       {.dy = out.matrix, .w = w.matrix, .transposed = maps.back()},
                       whole(dx, out.matrix.dtype));
  return dx;
}

Tensor depthwise_dw(const Tensor& x, const Tensor& dy, const Tensors& map, const Ints& layer) {
  const Maps maps(map, {}, layer);
  const HeldMatrix in = held_matrix(x, "features");
  const HeldMatrix out = held_matrix(dy, "dy");
  Tensor dw = empty_like(in.matrix, maps.map.taps());
  depthwise_grad_weight(context_of(x), maps.map, in.matrix, out.matrix, whole(dw, in.matrix.dtype));
  return dw;
}

}  // namespace

void add_voxel_operators(StableLibrary& m) {
  m.impl("_curve_encode", TORCH_BOX(&Guarded<&encoded>::call));
  m.impl("_curve_decode", TORCH_BOX(&Guarded<&decoded>::call));
  m.impl("_sort_codes", TORCH_BOX(&Guarded<&sorted_codes>::call));
  m.impl("_hash_insert", TORCH_BOX(&Guarded<&insert_keys>::call));
  m.impl("_check_hash_insert", TORCH_BOX(&Guarded<&check_insert>::call));
  m.impl("_hash_lookup", TORCH_BOX(&Guarded<&look_up>::call));
  m.impl("_sample_map", TORCH_BOX(&Guarded<&map_of_points>::call));
  m.impl("_sample_map_grad", TORCH_BOX(&Guarded<&grad_of_points>::call));
  m.impl("_weighted_sum", TORCH_BOX(&Guarded<&sum_of_rows>::call));
  m.impl("_weighted_sum_grad_input", TORCH_BOX(&Guarded<&sum_grad_input>::call));
  m.impl("_weighted_sum_grad_weights", TORCH_BOX(&Guarded<&sum_grad_weights>::call));
  m.impl("_pool", TORCH_BOX(&Guarded<&pooled>::call));
  m.impl("_pool_grad", TORCH_BOX(&Guarded<&pooled_grad>::call));
  m.impl("_segment_reduce", TORCH_BOX(&Guarded<&reduced_segments>::call));
  m.impl("_depthwise", TORCH_BOX(&Guarded<&depthwise>::call));
  m.impl("_depthwise_grad_input", TORCH_BOX(&Guarded<&depthwise_dx>::call));
  m.impl("_depthwise_grad_weight", TORCH_BOX(&Guarded<&depthwise_dw>::call));
  m.impl("_voxel_keys", TORCH_BOX(&Guarded<&keys_of_voxels>::call));
}

}  // namespace voxgemm
