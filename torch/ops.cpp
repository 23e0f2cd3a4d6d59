// SPDX-License-Identifier: Apache-2.0
//
// The operators on CPU tensors. A failure leaves as a runtime_error "[voxgemm CODE] SENTENCE",
// which crosses torch without a word on stderr and which voxgemm.errors turns into the Python type
// of the code; under torch.compile, where no Python of ours stands around the operator, it is a
// RuntimeError with that text.
#include <tuple>

#include "convert.h"

namespace voxgemm {
namespace {

std::runtime_error crossing(std::string_view code, std::string_view sentence) {
  return std::runtime_error(join("[voxgemm ", code, "] ", sentence));
}

std::string_view name(ErrorCode code) {
  switch (code) {
    case ErrorCode::invalid_argument:
      return "invalid_argument";
    case ErrorCode::unsupported:
      return "unsupported";
    case ErrorCode::out_of_memory:
      return "out_of_memory";
    case ErrorCode::device:
      return "device";
  }
  return "?";
}

template <auto op, class Signature = decltype(op)>
struct Guarded;
template <auto op, class Result, class... Args>
struct Guarded<op, Result (*)(Args...)> {
  static Result call(Args... args) {
    try {
      return op(args...);
    } catch (const Error& error) {
      throw crossing(name(error.code()), error.what());
    } catch (const std::bad_alloc&) {
      throw crossing("out_of_memory", "memory ran out");
    }
  }
};

std::optional<Int3> shape_of(const std::optional<Ints>& values) {
  return values ? std::optional(int3(*values)) : std::nullopt;
}

// i32 [rows], of a matrix [rows, 1] that is left empty where it has nothing to say.
Tensor row_numbers(const Matrix& matrix) {
  return matrix.empty() ? empty_tensor({0}, ScalarType::Int) : tensor_of(matrix, {matrix.rows});
}

Tensor check_coords(const Tensor& coords,
                    const std::optional<Ints>& spatial_shape,
                    std::optional<int64_t> batch_size) {
  validate_coords(torch_context(), held_matrix(coords, "coords").matrix, shape_of(spatial_shape),
                  batch_size);
  Tensor zero = empty_tensor({1}, ScalarType::Int);
  *static_cast<int32_t*>(zero.mutable_data_ptr()) = 0;
  return zero;
}

std::tuple<Tensor, Tensor, Tensor> unique_coords(const Tensor& coords) {
  const HeldMatrix held = held_matrix(coords, "coords");
  const UniqueCoords result = unique(torch_context(), held.matrix);
  return {tensor_of(result.coords), row_numbers(result.first_row), row_numbers(result.inverse)};
}

Tensor strided_coords(const Tensor& coords,
                      const Ints& geometry,
                      int64_t rule,
                      const std::optional<Ints>& spatial_shape) {
  const HeldMatrix held = held_matrix(coords, "coords");
  return tensor_of(output_coords(torch_context(), held.matrix, geometry_of(geometry),
                                 static_cast<OutputRule>(rule), shape_of(spatial_shape)));
}

std::tuple<Tensor, Tensor, Tensor> submanifold_map(const Tensor& coords, const Ints& geometry) {
  const HeldMatrix held = held_matrix(coords, "coords");
  const KernelMap map = build_submanifold_map(torch_context(), held.matrix, geometry_of(geometry));
  return {tensor_of(map.neighbours), tensor_of(map.pairs_per_tap, {map.taps()}),
          row_numbers(map.in_first)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> kernel_map(const Tensor& in_coords,
                                                      const Tensor& out_coords,
                                                      const Ints& geometry) {
  const HeldMatrix in = held_matrix(in_coords, "in_coords");
  const HeldMatrix out = held_matrix(out_coords, "out_coords");
  const KernelMap map =
      build_kernel_map(torch_context(), in.matrix, out.matrix, geometry_of(geometry));
  return {tensor_of(map.neighbours), tensor_of(map.pairs_per_tap, {map.taps()}),
          row_numbers(map.in_first), row_numbers(map.out_first)};
}

std::tuple<Tensor, Tensor> transposed_map(const Tensors& map, const Ints& layer) {
  const KernelMap transposed = transpose(torch_context(), map_of(map, layer_of(layer)));
  return {tensor_of(transposed.neighbours),
          tensor_of(transposed.pairs_per_tap, {transposed.taps()})};
}

PlanOptions options_of(const Layer& layer, Pass pass, const WeightsRef& w) {
  PlanOptions options{
      .c_in = w.c_in, .c_out = w.c_out, .dtype = w.dtype, .operation = layer.operation};
  options.filters[static_cast<size_t>(pass)] = layer.filter;
  return options;
}

Tensor forward(const Tensor& x,
               const Tensor& weight,
               const std::optional<Tensor>& bias,
               const Tensors& map_parts,
               const Ints& layer_numbers) {
  const Context ctx = torch_context();
  const Layer layer = layer_of(layer_numbers);
  const KernelMap map = map_of(map_parts, layer);
  const HeldMatrix in = held_matrix(x, "x");
  const HeldWeights w = held_weights(weight, map.geometry);
  Plan plan = Plan::make(ctx, map, options_of(layer, Pass::forward, w.weights));
  std::optional<MatrixRef> bias_row;
  Tensor held_bias;
  if (bias) {
    check(bias->dim() == 1, "bias has ", bias->dim(), " dimensions, expected 1");
    held_bias = contiguous_tensor(*bias);
    bias_row = matrix_ref(held_bias, 1, held_bias.size(0), dtype_of(held_bias, "bias"));
  }
  Tensor y = empty_tensor({map.n_out, w.weights.c_out}, scalar_type(w.weights.dtype));
  plan.forward(ctx, in.matrix, w.weights, bias_row,
               matrix_ref(y, map.n_out, w.weights.c_out, w.weights.dtype));
  return y;
}

Tensor grad_input(const Tensor& dy,
                  const Tensor& weight,
                  const Tensors& map_parts,
                  const Tensors& transposed_parts,
                  const Ints& layer_numbers) {
  const Context ctx = torch_context();
  const Layer layer = layer_of(layer_numbers);
  const KernelMap map = map_of(map_parts, layer);
  const HeldMatrix out = held_matrix(dy, "dy");
  const HeldWeights w = held_weights(weight, map.geometry);
  PlanOptions options = options_of(layer, Pass::grad_input, w.weights);
  KernelMap transposed;
  if (!transposed_parts.empty()) {
    Layer flipped = layer;
    flipped.n_in = map.n_out;
    flipped.is_transposed = !layer.is_transposed;
    transposed = map_of(transposed_parts, flipped);
    options.transposed = &transposed;
  }
  Plan plan = Plan::make(ctx, map, options);
  Tensor dx = empty_tensor({map.n_in, w.weights.c_in}, scalar_type(w.weights.dtype));
  plan.grad_input(ctx, out.matrix, w.weights,
                  matrix_ref(dx, map.n_in, w.weights.c_in, w.weights.dtype));
  return dx;
}

std::tuple<Tensor, Tensor> grad_weight(const Tensor& x,
                                       const Tensor& dy,
                                       const Tensors& map_parts,
                                       const Ints& layer_numbers,
                                       const std::vector<bool>& wanted) {
  const Context ctx = torch_context();
  const Layer layer = layer_of(layer_numbers);
  const KernelMap map = map_of(map_parts, layer);
  const HeldMatrix in = held_matrix(x, "x");
  const HeldMatrix out = held_matrix(dy, "dy");
  const ScalarType type = scalar_type(out.matrix.dtype);
  check(wanted.size() == 2, "got ", wanted.size(), " flags, expected 2");
  Tensor dw = empty_tensor({0}, type);
  if (wanted[0]) {
    const Int3& size = map.geometry.size;
    dw = empty_tensor({out.matrix.cols, size[0], size[1], size[2], in.matrix.cols}, type);
    const HeldWeights w = held_weights(dw, map.geometry);
    Plan plan = Plan::make(ctx, map, options_of(layer, Pass::grad_weight, w.weights));
    plan.grad_weight(ctx, in.matrix, out.matrix, w.weights);
  }
  const Tensor db = empty_tensor({wanted[1] ? out.matrix.cols : 0}, type);
  if (wanted[1]) {
    grad_bias(ctx, out.matrix, matrix_ref(db, 1, out.matrix.cols, out.matrix.dtype));
  }
  return {dw, db};
}

Tensor explain_pass(const Tensors& map_parts, const Ints& layer_numbers, const Ints& problem) {
  check(problem.size() == 4, "a problem has ", problem.size(), " numbers, expected 4");
  const Layer layer = layer_of(layer_numbers);
  const KernelMap map = map_of(map_parts, layer);
  const auto pass = static_cast<Pass>(problem[0]);
  const WeightsRef w{.c_in = static_cast<int>(problem[2]),
                     .c_out = static_cast<int>(problem[3]),
                     .dtype = static_cast<Dtype>(problem[1])};
  const Context ctx = torch_context();
  const Plan plan = Plan::make(ctx, map, options_of(layer, pass, w));
  return text_tensor(explain(plan.problem(ctx, pass), layer.filter));
}

std::tuple<Tensor, Tensor> parse_problem(const Tensor& text) {
  const Problem problem = Problem::parse(text_of(text));
  Ints numbers = {static_cast<int64_t>(problem.pass), static_cast<int64_t>(problem.dtype),
                  static_cast<int64_t>(problem.operation)};
  const Geometry& geometry = problem.geometry;
  for (const Int3& values : {geometry.size, geometry.stride, geometry.padding, geometry.dilation}) {
    numbers.insert(numbers.end(), values.begin(), values.end());
  }
  numbers.insert(numbers.end(), {problem.c_in, problem.c_out});
  const Tensor result = empty_tensor({static_cast<int64_t>(numbers.size())}, ScalarType::Long);
  std::copy(numbers.begin(), numbers.end(), static_cast<int64_t*>(result.mutable_data_ptr()));
  return {result, text_tensor(problem.cloud)};
}

// The version, then a line "DTYPE KERNEL" per kernel that this machine can run.
Tensor info() {
  std::string text = VOXGEMM_VERSION;
  for (const Dtype dtype : {Dtype::f16, Dtype::bf16, Dtype::f32, Dtype::f64}) {
    Problem problem = Problem::parse("forward f32 subm3 64->64");
    problem.dtype = dtype;
    for (const Candidate& candidate : candidates(problem, {})) {
      if (candidate.reason.empty()) text += join("\n", name(dtype), " ", candidate.kernel);
    }
  }
  return text_tensor(text);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(voxgemm, CPU, m) {
  m.impl("_check_coords", TORCH_BOX(&Guarded<&check_coords>::call));
  m.impl("_unique", TORCH_BOX(&Guarded<&unique_coords>::call));
  m.impl("_output_coords", TORCH_BOX(&Guarded<&strided_coords>::call));
  m.impl("_submanifold_map", TORCH_BOX(&Guarded<&submanifold_map>::call));
  m.impl("_kernel_map", TORCH_BOX(&Guarded<&kernel_map>::call));
  m.impl("_transpose", TORCH_BOX(&Guarded<&transposed_map>::call));
  m.impl("_forward", TORCH_BOX(&Guarded<&forward>::call));
  m.impl("_grad_input", TORCH_BOX(&Guarded<&grad_input>::call));
  m.impl("_grad_weight", TORCH_BOX(&Guarded<&grad_weight>::call));
  m.impl("_explain", TORCH_BOX(&Guarded<&explain_pass>::call));
  m.impl("_parse_problem", TORCH_BOX(&Guarded<&parse_problem>::call));
}

STABLE_TORCH_LIBRARY_IMPL(voxgemm, CompositeExplicitAutograd, m) {
  m.impl("_info", TORCH_BOX(&Guarded<&info>::call));
}

}  // namespace voxgemm
