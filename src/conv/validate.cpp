// SPDX-License-Identifier: Apache-2.0
#include "conv/validate.h"

#include "voxgemm/error.h"

namespace voxgemm {
namespace {

std::string device_name(const Device& device) {
  return device.kind == DeviceKind::cpu ? "cpu" : join("cuda:", device.index);
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

void validate_plan(const KernelMap& map, const PlanOptions& options) {
  check(options.c_in >= 1, "c_in is ", options.c_in, ", expected at least 1");
  check(options.c_out >= 1, "c_out is ", options.c_out, ", expected at least 1");
  check(is_float(options.dtype), "dtype is ", name(options.dtype),
        ", expected f16, bf16, f32 or f64");
  check(map.neighbours.rows == map.taps() && map.neighbours.cols == map.n_out &&
            map.neighbours.dtype == Dtype::i32,
        "the map's neighbour table is ", map.neighbours.rows, " x ", map.neighbours.cols, " ",
        name(map.neighbours.dtype), ", expected ", map.taps(), " x ", map.n_out, " i32");
}

void validate_matrix(const Context& ctx, const MatrixRef& matrix, const Expected& expected) {
  check(matrix.rows == expected.rows && matrix.cols == expected.cols, expected.what, " is ",
        matrix.rows, " x ", matrix.cols, ", expected ", expected.rows, " x ", expected.cols);
  check(matrix.dtype == expected.dtype, expected.what, " has dtype ", name(matrix.dtype),
        ", expected ", name(expected.dtype));
  check(matrix.device == ctx.device, expected.what, " is on ", device_name(matrix.device),
        ", expected ", device_name(ctx.device));
  check(matrix.stride >= matrix.cols || matrix.rows <= 1, expected.what, " has rows ",
        matrix.stride, " elements apart, expected at least ", matrix.cols);
  check(matrix.data != nullptr || matrix.rows == 0, expected.what, " has no memory");
}

void validate_weights(const Context& ctx,
                      const WeightsRef& w,
                      const KernelMap& map,
                      const PlanOptions& options) {
  validate_weight_shape(ctx, w, map, options);
  check(w.dtype == options.dtype, "the weights have dtype ", name(w.dtype), ", expected ",
        name(options.dtype));
}

void validate_weight_gradient(const Context& ctx,
                              const WeightsRef& dw,
                              const KernelMap& map,
                              const PlanOptions& options) {
  validate_weight_shape(ctx, dw, map, options);
  check(dw.dtype == options.dtype || (dw.dtype == Dtype::f32 && options.dtype != Dtype::f64),
        "the weight gradient has dtype ", name(dw.dtype), ", expected ", name(options.dtype),
        options.dtype == Dtype::f64 ? "" : " or f32");
}

void validate_apart(const MatrixRef& output,
                    const char* output_name,
                    const MatrixRef& input,
                    const char* input_name) {
  const auto end = [](const MatrixRef& m) {
    const int64_t elements = m.rows == 0 ? 0 : (m.rows - 1) * m.stride + m.cols;
    return static_cast<const char*>(m.data) + elements * size_of(m.dtype);
  };
  const auto* out = static_cast<const char*>(output.data);
  const auto* in = static_cast<const char*>(input.data);
  check(out >= end(input) || in >= end(output), output_name, " shares memory with ", input_name);
}

}  // namespace voxgemm
