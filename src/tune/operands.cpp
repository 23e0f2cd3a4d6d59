// SPDX-License-Identifier: Apache-2.0
#include "tune/operands.h"

#include <algorithm>
#include <cstring>
#include <random>

#include "conv/backend.h"
#include "conv/validate.h"
#include "core/dispatch.h"
#include "voxgemm/cuda.h"

namespace voxgemm {
namespace {

// Elements [first, first + count) of a matrix without gaps, as one row.
MatrixRef piece(const MatrixRef& matrix, int64_t first, int64_t count) {
  MatrixRef row = matrix;
  row.data = matrix.as<char>() + first * static_cast<int64_t>(size_of(matrix.dtype));
  row.rows = 1;
  row.cols = row.stride = count;
  return row;
}

Matrix filled(
    const Context& ctx, int64_t rows, int64_t cols, const PlanOptions& options, Numbers numbers) {
  Matrix matrix = make_matrix(ctx, rows, cols, options.dtype);
  fill(ctx, matrix, numbers);
  return matrix;
}

}  // namespace

void copy_elements(const Context& ctx, const MatrixRef& from, const MatrixRef& to) {
  const int64_t count = std::min(from.rows * from.cols, to.rows * to.cols);
  if (on_device(ctx)) return copy(ctx, piece(from, 0, count), piece(to, 0, count));
  std::memcpy(to.data, from.data, static_cast<size_t>(count) * size_of(from.dtype));
}

void fill(const Context& ctx, const Matrix& matrix, Numbers numbers) {
  const int64_t size = matrix.rows * matrix.cols;
  // A prime, so that rows differ.
  const int64_t drawn = std::min<int64_t>(size, 8191);
  if (drawn == 0) return;
  const Matrix block = make_matrix(Context::cpu(1), 1, drawn, matrix.dtype);
  std::mt19937 random(0);
  std::normal_distribution<double> normal;
  std::uniform_int_distribution<int> integer(-2, 2);
  dispatch_float(matrix.dtype, [&]<class T>(Type<T>) {
    for (int64_t i = 0; i < drawn; ++i) {
      const double value = numbers == Numbers::normal ? normal(random) : integer(random);
      store(value, block.as<T>()[i]);
    }
  });
  copy_elements(ctx, block, piece(matrix, 0, drawn));
  for (int64_t done = drawn; done < size; done *= 2) {
    const int64_t count = std::min(done, size - done);
    copy_elements(ctx, piece(matrix, 0, count), piece(matrix, done, count));
  }
}

Operands::Operands(const Context& ctx,
                   const KernelMap& map,
                   const PlanOptions& options,
                   Numbers numbers)
    : x(filled(ctx, map.n_in, options.c_in, options, numbers)),
      dy(filled(ctx, map.n_out, options.c_out, options, numbers)),
      w_memory(filled(ctx, options.c_out, int64_t{map.taps()} * options.c_in, options, numbers)) {
  w = {.data = w_memory.data,
       .taps = map.taps(),
       .c_in = options.c_in,
       .c_out = options.c_out,
       .tap_stride = options.c_in,
       .in_stride = 1,
       .out_stride = int64_t{map.taps()} * options.c_in,
       .dtype = options.dtype,
       .device = ctx.device};
}

void Operands::run(const Context& ctx, Plan* plan, Pass pass) const {
  if (pass == Pass::forward) return plan->forward(ctx, x, w, {}, dy);
  if (pass == Pass::grad_input) return plan->grad_input(ctx, dy, w, x);
  plan->grad_weight(ctx, x, dy, w);
}

const Matrix& Operands::result(Pass pass) const {
  if (pass == Pass::forward) return dy;
  return pass == Pass::grad_input ? x : w_memory;
}

}  // namespace voxgemm
