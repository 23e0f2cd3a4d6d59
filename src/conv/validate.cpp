// SPDX-License-Identifier: Apache-2.0
#include "conv/validate.h"

#include "conv/kernel.h"
#include "voxgemm/error.h"

namespace voxgemm {
namespace {

std::string device_name(const Device& device) {
  return device.kind == DeviceKind::cpu ? "cpu" : join("cuda:", device.index);
}

// A name, or the number that a caller cast.
std::string shown(Dtype dtype) {
  return size_of(dtype) == 0 ? join("number ", static_cast<int>(dtype)) : std::string(name(dtype));
}

bool is_float(Dtype dtype) {
  return dtype == Dtype::f16 || dtype == Dtype::bf16 || dtype == Dtype::f32 || dtype == Dtype::f64;
}

void validate_weight_shape(const Context& ctx,
                           const WeightsRef& w,
                           const KernelMap& map,
                           const PlanOptions& options) {
  check(w.taps == map.taps(), "the weights have ", w.taps, " taps, the kernel map has ",
        map.taps());
  check(w.c_in == options.c_in, "the weights have ", w.c_in, " input channels, expected ",
        options.c_in);
  check(w.c_out == options.c_out, "the weights have ", w.c_out, " output channels, expected ",
        options.c_out);
  check(w.device == ctx.device, "the weights are on ", device_name(w.device), ", expected ",
        device_name(ctx.device));
  check(w.data != nullptr, "the weights have no memory");
}

}  // namespace

void validate_algorithms(const Filter& filter) {
  for (const Algorithm algorithm : filter.algorithms) {
    const auto number = static_cast<int>(algorithm);
    check(number >= 0 && number < algorithm_count, "the filter names algorithm ", number,
          ", expected 0 to ", algorithm_count - 1);
  }
}

void validate_filter(DeviceKind kind, const Filter& filter) {
  validate_algorithms(filter);
  if (filter.kernel.empty()) return;
  check(filter.algorithms.empty(), "the filter names kernel \"", filter.kernel,
        "\" and algorithms, expected one of the two");
  check(find_kernel(kind, filter.kernel) != nullptr, "the filter names kernel \"", filter.kernel,
        "\", expected a name that explain() prints");
}

void validate_problem(const Problem& problem) {
  validate_enumerator(problem.pass, Pass::grad_weight, "the pass");
  validate_enumerator(problem.dtype, Dtype::i64, "the dtype");
  validate_enumerator(problem.precision, Precision::bf16x6, "the precision");
  validate_enumerator(problem.operation, Operation::inverse, "the operation");
  validate_enumerator(problem.device.kind, DeviceKind::cuda, "the kind of device");
}

void validate_plan(const Context& ctx, const KernelMap& map, const PlanOptions& options) {
  validate_enumerator(ctx.device.kind, DeviceKind::cuda, "the context's kind of device");
  for (const Filter& filter : options.filters) validate_filter(ctx.device.kind, filter);
  check(options.c_in >= 1, "c_in is ", options.c_in, ", expected at least 1");
  check(options.c_out >= 1, "c_out is ", options.c_out, ", expected at least 1");
  check(is_float(options.dtype), "dtype is ", shown(options.dtype),
        ", expected f16, bf16, f32 or f64");
  validate_enumerator(options.operation, Operation::inverse, "the operation");
  validate_enumerator(options.precision, Precision::bf16x6, "the precision");
  check(map.neighbours.rows == map.taps() && map.neighbours.cols == map.n_out &&
            map.neighbours.dtype == Dtype::i32,
        "the map's neighbour table is ", map.neighbours.rows, " x ", map.neighbours.cols, " ",
        shown(map.neighbours.dtype), ", expected ", map.taps(), " x ", map.n_out, " i32");
  check(map.neighbours.device == ctx.device, "map and context are on different devices");
  check(options.build_schedule != nullptr,
        "build_schedule is empty, expected Schedule::build or another function");
  for (const Pass pass : {Pass::forward, Pass::grad_input, Pass::grad_weight}) {
    const Schedule* const given = options.schedules[static_cast<size_t>(pass)];
    const int64_t rows = pass == Pass::grad_input ? map.n_in : map.n_out;
    check(given == nullptr || (given->rows() == rows && given->taps() == map.taps()),
          "the schedule of ", name(pass), " is of ", given == nullptr ? 0 : given->rows(),
          " rows and ", given == nullptr ? 0 : given->taps(), " taps, expected ", rows, " and ",
          map.taps());
  }
  if (options.transposed == nullptr) return;
  const KernelMap& back = *options.transposed;
  check(back.n_in == map.n_out && back.n_out == map.n_in && back.taps() == map.taps(),
        "the transposed map has ", back.n_in, " -> ", back.n_out, " rows and ", back.taps(),
        " taps, expected ", map.n_out, " -> ", map.n_in, " rows and ", map.taps(), " taps");
}

void validate_matrix(const Context& ctx, const MatrixRef& matrix, const Expected& expected) {
  validate_enumerator(ctx.device.kind, DeviceKind::cuda, "the context's kind of device");
  check(matrix.rows >= 0 && matrix.cols >= 0, expected.what, " is ", matrix.rows, " x ",
        matrix.cols, ", expected 0 or more of each");
  check(matrix.rows == expected.rows && matrix.cols == expected.cols, expected.what, " is ",
        matrix.rows, " x ", matrix.cols, ", expected ", expected.rows, " x ", expected.cols);
  check(matrix.dtype == expected.dtype, expected.what, " has dtype ", shown(matrix.dtype),
        ", expected ", name(expected.dtype));
  check(matrix.device == ctx.device, expected.what, " is on ", device_name(matrix.device),
        ", expected ", device_name(ctx.device));
  check(matrix.stride >= matrix.cols || matrix.rows <= 1, expected.what, " has rows ",
        matrix.stride, " elements apart, expected at least ", matrix.cols);
  check(matrix.data != nullptr || matrix.rows == 0 || matrix.cols == 0, expected.what,
        " has no memory");
}

void validate_column(const Context& ctx, const MatrixRef& matrix, const Expected& expected) {
  validate_matrix(ctx, matrix, expected);
  check(matrix.stride == matrix.cols || matrix.rows <= 1 || matrix.cols == 0, expected.what,
        " has rows ", matrix.stride, " elements apart, expected ", matrix.cols);
}

void validate_shape(const Int3& shape) {
  check(shape[0] >= 0 && shape[1] >= 0 && shape[2] >= 0, "the spatial shape is (", shape[0], ", ",
        shape[1], ", ", shape[2], "), expected extents >= 0");
}

Dtype float_dtype(const MatrixRef& matrix, const char* what) {
  check(is_float(matrix.dtype), what, " has dtype ", shown(matrix.dtype),
        ", expected f16, bf16, f32 or f64");
  return matrix.dtype;
}

Dtype integer_dtype(const MatrixRef& matrix, const char* what) {
  check(matrix.dtype == Dtype::i32 || matrix.dtype == Dtype::i64, what, " has dtype ",
        shown(matrix.dtype), ", expected i32 or i64");
  return matrix.dtype;
}

void validate_sortable(int64_t rows) {
  // Numbers of places have 32 bits, also those behind a piece of 256 of them.
  constexpr int64_t most = (int64_t{1} << 32) - 512;
  check(rows <= most, ErrorCode::unsupported, "there are ", rows,
        " rows to sort, expected at most ", most);
}

void validate_weights(const Context& ctx,
                      const WeightsRef& w,
                      const KernelMap& map,
                      const PlanOptions& options) {
  validate_weight_shape(ctx, w, map, options);
  check(w.dtype == options.dtype, "the weights have dtype ", shown(w.dtype), ", expected ",
        name(options.dtype));
}

void validate_weight_gradient(const Context& ctx,
                              const WeightsRef& dw,
                              const KernelMap& map,
                              const PlanOptions& options) {
  validate_weight_shape(ctx, dw, map, options);
  check(dw.dtype == options.dtype || (dw.dtype == Dtype::f32 && options.dtype != Dtype::f64),
        "the weight gradient has dtype ", shown(dw.dtype), ", expected ", name(options.dtype),
        options.dtype == Dtype::f16 || options.dtype == Dtype::bf16 ? " or f32" : "");
}

Memory memory_of(const MatrixRef& matrix, const char* what) {
  const auto size = static_cast<int64_t>(size_of(matrix.dtype));
  const int64_t width = matrix.cols * size;
  // The stride of a single row may be anything.
  const int64_t step = matrix.rows > 1 ? matrix.stride * size : width;
  return {what, static_cast<const char*>(matrix.data), matrix.rows, width, step};
}

Memory memory_of(const WeightsRef& w, const char* what) {
  int64_t first = 0;
  int64_t last = 0;
  for (const int64_t reach :
       {(w.taps - 1) * w.tap_stride, (w.c_in - 1) * w.in_stride, (w.c_out - 1) * w.out_stride}) {
    (reach < 0 ? first : last) += reach;
  }
  const auto size = static_cast<int64_t>(size_of(w.dtype));
  const int64_t width = (last - first + 1) * size;
  return {what, static_cast<const char*>(w.data) + first * size, 1, width, width};
}

void validate_apart(const Memory& output, const Memory& input) {
  const auto end = [](const Memory& m) { return m.data + (m.rows - 1) * m.step + m.width; };
  if (output.rows * output.width == 0 || input.rows * input.width == 0) return;
  if (output.data >= end(input) || input.data >= end(output)) return;
  // The input's rows may lie in the gaps between the output's.
  bool between = false;
  if (output.step == input.step && output.step > 0) {
    const int64_t distance = (input.data - output.data) % output.step;
    const int64_t shift = distance < 0 ? distance + output.step : distance;
    between = shift >= output.width && shift + input.width <= output.step;
  }
  check(between, output.what, " shares memory with ", input.what);
}

}  // namespace voxgemm
