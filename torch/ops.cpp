// SPDX-License-Identifier: Apache-2.0
//
// The operators, for tensors of either kind of device.
#include "ops.h"

#include <tuple>

#include "kept.h"

namespace voxgemm {
namespace {

std::optional<Int3> shape_of(const std::optional<Ints>& values) {
  return values ? std::optional(int3(*values)) : std::nullopt;
}

// i32 [rows], of a matrix [rows, 1] that is left empty where it has nothing to say.
Tensor row_numbers(const Matrix& matrix, const Device& device) {
  return matrix.empty() ? empty_tensor(device, {0}, ScalarType::Int)
                        : tensor_of(matrix, {matrix.rows});
}

Tensor check_coords(const Tensor& coords,
                    const std::optional<Ints>& spatial_shape,
                    std::optional<int64_t> batch_size) {
  const Context ctx = context_of(coords);
  validate_coords(ctx, held_matrix(coords, "coords").matrix, shape_of(spatial_shape), batch_size);
  Tensor zero = empty_tensor(ctx.device, {1}, ScalarType::Int);
  return torch::stable::zero_(zero);
}

std::tuple<Tensor, Tensor, Tensor> unique_coords(const Tensor& coords) {
  const HeldMatrix held = held_matrix(coords, "coords");
  const UniqueCoords result = unique(context_of(coords), held.matrix);
  return {tensor_of(result.coords), row_numbers(result.first_row, held.matrix.device),
          row_numbers(result.inverse, held.matrix.device)};
}

Tensor strided_coords(const Tensor& coords,
                      const Ints& geometry,
                      int64_t rule,
                      const std::optional<Ints>& spatial_shape,
                      std::optional<int64_t> max_voxels) {
  const HeldMatrix held = held_matrix(coords, "coords");
  return tensor_of(output_coords(context_of(coords), held.matrix, geometry_of(geometry),
                                 {.rule = static_cast<OutputRule>(rule),
                                  .spatial_shape = shape_of(spatial_shape),
                                  .max_voxels = max_voxels}));
}

Tensor neighbours_of(const Context& ctx, const KernelMap& map, bool owned) {
  const Tensor neighbours = tensor_of(map.neighbours);
  if (owned) kept_schedules().own(ctx, neighbours);
  return neighbours;
}

void forget_map(const Tensor& neighbours) { kept_schedules().forget(neighbours); }

std::tuple<Tensor, Tensor, Tensor, Tensor> submanifold_map(const Tensor& coords,
                                                           const Ints& geometry,
                                                           int64_t answer,
                                                           bool owned) {
  const Context ctx = context_of(coords);
  const HeldMatrix held = held_matrix(coords, "coords");
  const KernelMap map = build_submanifold_map(ctx, held.matrix, geometry_of(geometry),
                                              reinterpret_cast<int64_t*>(answer));
  return {neighbours_of(ctx, map, owned), tensor_of(map.pairs_per_tap, {map.taps()}),
          row_numbers(map.in_first, ctx.device), row_numbers(map.masks, ctx.device)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> kernel_map(const Tensor& in_coords,
                                                              const Tensor& out_coords,
                                                              const Ints& geometry,
                                                              int64_t answer,
                                                              bool owned) {
  const Context ctx = context_of(in_coords);
  const HeldMatrix in = held_matrix(in_coords, "in_coords");
  const HeldMatrix out = held_matrix(out_coords, "out_coords");
  const KernelMap map = build_kernel_map(ctx, in.matrix, out.matrix, geometry_of(geometry),
                                         reinterpret_cast<int64_t*>(answer));
  return {neighbours_of(ctx, map, owned), tensor_of(map.pairs_per_tap, {map.taps()}),
          row_numbers(map.in_first, ctx.device), row_numbers(map.out_first, ctx.device),
          row_numbers(map.masks, ctx.device)};
}

std::tuple<Tensor, Tensor> transposed_map(const Tensors& map, const Ints& layer, bool owned) {
  const Context ctx = context_of(map.at(0));
  const KernelMap transposed = transpose(ctx, Maps(map, {}, layer).map);
  return {neighbours_of(ctx, transposed, owned),
          tensor_of(transposed.pairs_per_tap, {transposed.taps()})};
}

// i64 [1] on the host; throws where the map could not be built.
Tensor pairs_of_map(const Tensors& map, const Ints& layer) {
  const int64_t pairs = Maps(map, {}, layer).map.pairs(context_of(map.at(0)));
  Tensor result = empty_tensor({}, {1}, ScalarType::Long);
  *static_cast<int64_t*>(result.mutable_data_ptr()) = pairs;
  return result;
}

Tensors schedule_parts(const Tensors& map_parts,
                       const Ints& layer_numbers,
                       const Ints& options,
                       const std::optional<Tensor>& masks) {
  KernelMap map = Maps(map_parts, {}, layer_numbers).map;
  set_masks(masks, &map);
  const Context ctx = context_of(map_parts.at(0));
  return parts_of(kept_schedules().get(ctx, map, schedule_options_of(options, 0)));
}

// Of the schedules that are kept of a map.
Tensors kept_parts(const Tensor& neighbours) {
  Tensors tensors;
  for (const Schedule& schedule : kept_schedules().of(neighbours)) {
    for (const Tensor& part : parts_of(schedule)) tensors.push_back(part);
  }
  return tensors;
}

// Of a map's four tensors or a schedule's six.
Tensor views(const Tensors& tensors) {
  if (tensors.size() == std::tuple_size_v<MapViews>) return views_tensor(map_views(tensors));
  return views_tensor(schedule_views(tensors, 0));
}

// The plan of one pass.
Plan plan_of(const Context& ctx, const Maps& maps, Pass pass, const WeightsRef& w) {
  PlanOptions options{.c_in = w.c_in,
                      .c_out = w.c_out,
                      .dtype = w.dtype,
                      .operation = maps.layer.operation,
                      .precision = maps.layer.precision,
                      .tune_at_first_use = false,
                      .transposed = maps.back()};
  const auto number = static_cast<size_t>(pass);
  options.filters[number] = maps.layer.filter;
  if (maps.schedule) options.schedules[number] = &*maps.schedule;
  options.build_schedule = [](const Context& where, const KernelMap& of,
                              const ScheduleOptions& wanted) {
    return kept_schedules().get(where, of, wanted);
  };
  return Plan::make(ctx, maps.map, options);
}

Tensor forward(const Tensor& x,
               const Tensor& weight,
               const std::optional<Tensor>& bias,
               const Tensors& map,
               const Ints& layer,
               const std::optional<Tensor>& residual,
               bool relu) {
  const Context ctx = context_of(x);
  const Maps maps(map, {}, layer);
  const HeldMatrix in = held_matrix(x, "x");
  const HeldWeights w = held_weights(weight, maps.map.geometry);
  Plan plan = plan_of(ctx, maps, Pass::forward, w.weights);
  Epilogue epilogue{.relu = relu};
  Tensor held_bias;
  if (bias) {
    check(bias->dim() == 1, "bias has ", bias->dim(), " dimensions, expected 1");
    held_bias = contiguous_tensor(*bias);
    epilogue.bias = matrix_ref(held_bias, 1, held_bias.size(0), dtype_of(held_bias, "bias"));
  }
  std::optional<HeldMatrix> added;
  if (residual) {
    added = held_matrix(*residual, "residual");
    epilogue.residual = added->matrix;
  }
  const int64_t rows = maps.map.n_out;
  Tensor y = empty_tensor(ctx.device, {rows, w.weights.c_out}, scalar_type(w.weights.dtype));
  plan.forward(ctx, in.matrix, w.weights, epilogue,
               matrix_ref(y, rows, w.weights.c_out, w.weights.dtype));
  return y;
}

// The schedule is the transposed map's, or the map's where it is symmetric.
Tensor grad_input(const Tensor& dy,
                  const Tensor& weight,
                  const Tensors& map,
                  const Tensors& transposed,
                  const Ints& layer) {
  const Context ctx = context_of(dy);
  const Maps maps(map, transposed, layer);
  const HeldMatrix out = held_matrix(dy, "dy");
  const HeldWeights w = held_weights(weight, maps.map.geometry);
  Plan plan = plan_of(ctx, maps, Pass::grad_input, w.weights);
  const int64_t rows = maps.map.n_in;
  Tensor dx = empty_tensor(ctx.device, {rows, w.weights.c_in}, scalar_type(w.weights.dtype));
  plan.grad_input(ctx, out.matrix, w.weights,
                  matrix_ref(dx, rows, w.weights.c_in, w.weights.dtype));
  return dx;
}

std::tuple<Tensor, Tensor> grad_weight(const Tensor& x,
                                       const Tensor& dy,
                                       const Tensors& map,
                                       const Ints& layer,
                                       const std::vector<bool>& wanted) {
  const Context ctx = context_of(x);
  const Maps maps(map, {}, layer);
  const HeldMatrix in = held_matrix(x, "x");
  const HeldMatrix out = held_matrix(dy, "dy");
  const ScalarType type = scalar_type(out.matrix.dtype);
  check(wanted.size() == 2, "got ", wanted.size(), " flags, expected 2");
  Tensor dw = empty_tensor(ctx.device, {0}, type);
  if (wanted[0]) {
    const Geometry& geometry = maps.map.geometry;
    const Int3& size = geometry.size;
    dw = empty_tensor(ctx.device, {out.matrix.cols, size[0], size[1], size[2], in.matrix.cols},
                      type);
    const HeldWeights w = held_weights(dw, geometry);
    plan_of(ctx, maps, Pass::grad_weight, w.weights)
        .grad_weight(ctx, in.matrix, out.matrix, w.weights);
  }
  const Tensor db = empty_tensor(ctx.device, {wanted[1] ? out.matrix.cols : 0}, type);
  if (wanted[1]) {
    grad_bias(ctx, out.matrix, matrix_ref(db, 1, out.matrix.cols, out.matrix.dtype));
  }
  return {dw, db};
}

}  // namespace

void add_operators(StableLibrary& m) {
  m.impl("_check_coords", TORCH_BOX(&Guarded<&check_coords>::call));
  m.impl("_unique", TORCH_BOX(&Guarded<&unique_coords>::call));
  m.impl("_output_coords", TORCH_BOX(&Guarded<&strided_coords>::call));
  m.impl("_submanifold_map", TORCH_BOX(&Guarded<&submanifold_map>::call));
  m.impl("_kernel_map", TORCH_BOX(&Guarded<&kernel_map>::call));
  m.impl("_transpose", TORCH_BOX(&Guarded<&transposed_map>::call));
  m.impl("_pairs", TORCH_BOX(&Guarded<&pairs_of_map>::call));
  m.impl("_schedule", TORCH_BOX(&Guarded<&schedule_parts>::call));
  m.impl("_forward", TORCH_BOX(&Guarded<&forward>::call));
  m.impl("_grad_input", TORCH_BOX(&Guarded<&grad_input>::call));
  m.impl("_grad_weight", TORCH_BOX(&Guarded<&grad_weight>::call));
  m.impl("_views", TORCH_BOX(&Guarded<&views>::call));
  m.impl("_kept", TORCH_BOX(&Guarded<&kept_parts>::call));
  m.impl("_forget", TORCH_BOX(&Guarded<&forget_map>::call));
}

}  // namespace voxgemm
