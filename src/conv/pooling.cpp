// SPDX-License-Identifier: Apache-2.0
#include "voxgemm/pooling.h"

#include "conv/backend.h"
#include "conv/items.h"
#include "conv/operators.h"
#include "conv/passes.h"
#include "conv/validate.h"
#include "voxgemm/depthwise.h"
#include "voxgemm/error.h"

namespace voxgemm {
namespace {

// A table without columns has no memory.
void validate_map(const Context& ctx, const KernelMap& map) {
  const MatrixRef& table = map.neighbours;
  check(table.rows == map.taps() && table.cols == map.n_out && table.dtype == Dtype::i32,
        "the map's neighbour table is ", table.rows, " x ", table.cols, " ", name(table.dtype),
        ", expected ", map.taps(), " x ", map.n_out, " i32");
  check(table.device == ctx.device, "map and context are on different devices");
}

bool picks(Reduction reduction) {
  return reduction == Reduction::max || reduction == Reduction::min;
}

void validate_result(const Context& ctx,
                     const MatrixRef& x,
                     Reduction reduction,
                     const Reduced& result,
                     int64_t rows) {
  validate_enumerator(reduction, Reduction::mean, "the reduction");
  validate_matrix(ctx, x, {"x", x.rows, x.cols, float_dtype(x, "x")});
  validate_matrix(ctx, result.y, {"y", rows, x.cols, x.dtype});
  validate_apart(memory_of(result.y, "y"), memory_of(x, "x"));
  check(picks(reduction) || !result.winners,
        "winners are asked of a sum or mean, expected max or min");
  if (result.winners) {
    validate_column(ctx, *result.winners, {"winners", rows, x.cols, Dtype::i32});
    const Memory winners = memory_of(*result.winners, "winners");
    validate_apart(winners, memory_of(x, "x"));
    validate_apart(winners, memory_of(result.y, "y"));
  }
}

// What goes back through a map: gradients of repeated rows are added first, and rows that are not
// their voxel's lowest get none.
class WayBack {
 public:
  WayBack(const Context& ctx, const KernelMap& map, const KernelMap* given) : ctx_(ctx), map_(map) {
    validate_map(ctx, map);
    if (given == nullptr && !map.symmetric) made_ = transpose(ctx, map);
    transposed_ = map.symmetric ? &map : given == nullptr ? &made_ : given;
    check(transposed_->n_in == map.n_out && transposed_->n_out == map.n_in &&
              transposed_->taps() == map.taps(),
          "the transposed map has ", transposed_->n_in, " -> ", transposed_->n_out, " rows and ",
          transposed_->taps(), " taps, expected ", map.n_out, " -> ", map.n_in, " rows and ",
          map.taps(), " taps");
    validate_map(ctx, *transposed_);
  }
  const KernelMap* transposed() const { return transposed_; }
  MatrixRef merged(const MatrixRef& dy) {
    if (map_.out_first.empty()) return dy;
    merged_ = run(ctx_, cuda::merge_repeated, cpu::merge_repeated, dy, map_.out_first);
    return merged_;
  }
  void finish(const MatrixRef& dx) const {
    if (map_.in_first.empty() || dx.rows == 0) return;
    run(ctx_, cuda::zero_repeated, cpu::zero_repeated, dx, map_.in_first);
  }

 private:
  const Context& ctx_;
  const KernelMap& map_;
  KernelMap made_;
  const KernelMap* transposed_ = nullptr;
  Matrix merged_;
};

}  // namespace

void pool(const Context& ctx,
          const KernelMap& map,
          const MatrixRef& x,
          Reduction reduction,
          const Reduced& result) {
  validate_map(ctx, map);
  check(x.rows == map.n_in, "x has ", x.rows, " rows, the map ", map.n_in);
  validate_result(ctx, x, reduction, result, map.n_out);
  if (x.cols == 0) return;
  run(ctx, cuda::pool, cpu::pool, map, x, reduction, result);
}

void pool_grad(const Context& ctx,
               const KernelMap& map,
               Reduction reduction,
               const PoolGrad& grad,
               const MatrixRef& dx) {
  validate_enumerator(reduction, Reduction::mean, "the reduction");
  validate_matrix(ctx, dx, {"dx", map.n_in, dx.cols, float_dtype(dx, "dx")});
  validate_matrix(ctx, grad.dy, {"dy", map.n_out, dx.cols, dx.dtype});
  validate_apart(memory_of(dx, "dx"), memory_of(grad.dy, "dy"));
  check(picks(reduction) == grad.winners.has_value(), "the gradient of a ",
        picks(reduction) ? "max or min came without" : "sum or mean came with",
        " winners, expected ", picks(reduction) ? "those of pool()" : "none");
  if (grad.winners) {
    validate_column(ctx, *grad.winners, {"winners", map.n_out, dx.cols, Dtype::i32});
    validate_apart(memory_of(dx, "dx"), memory_of(*grad.winners, "winners"));
  }
  if (dx.cols == 0) return;
  WayBack back(ctx, map, grad.transposed);
  Matrix counts;
  if (reduction == Reduction::mean) counts = make_matrix(ctx, map.n_out, 1, Dtype::i32);
  for_items(ctx, counts.rows, TapCounts(map, counts));
  const PoolBack seen = {back.merged(grad.dy), grad.winners, counts, back.transposed()};
  run(ctx, cuda::pool_grad, cpu::pool_grad, seen, dx);
  back.finish(dx);
}

void segment_reduce(const Context& ctx,
                    const MatrixRef& x,
                    const MatrixRef& segments,
                    Reduction reduction,
                    const Reduced& result) {
  validate_result(ctx, x, reduction, result, result.y.rows);
  validate_column(ctx, segments, {"segments", x.rows, 1, Dtype::i32});
  validate_apart(memory_of(result.y, "y"), memory_of(segments, "segments"));
  if (result.winners) {
    validate_apart(memory_of(*result.winners, "winners"), memory_of(segments, "segments"));
  }
  if (x.cols == 0) return;
  run(ctx, cuda::segment_reduce, cpu::segment_reduce, x, segments, reduction, result);
}

void depthwise_forward(const Context& ctx,
                       const KernelMap& map,
                       const DepthwiseForward& operands,
                       const MatrixRef& y) {
  const auto& [x, w, bias] = operands;
  validate_map(ctx, map);
  validate_matrix(ctx, x, {"x", map.n_in, x.cols, float_dtype(x, "x")});
  validate_matrix(ctx, w, {"the weights", map.taps(), x.cols, x.dtype});
  if (bias) validate_matrix(ctx, *bias, {"the bias", 1, x.cols, x.dtype});
  validate_matrix(ctx, y, {"y", map.n_out, x.cols, x.dtype});
  validate_apart(memory_of(y, "y"), memory_of(x, "x"));
  validate_apart(memory_of(y, "y"), memory_of(w, "the weights"));
  if (bias) validate_apart(memory_of(y, "y"), memory_of(*bias, "the bias"));
  if (y.cols == 0) return;
  run(ctx, cuda::depthwise_forward, cpu::depthwise_forward, map, operands, y);
}

void depthwise_grad_input(const Context& ctx,
                          const KernelMap& map,
                          const DepthwiseGradInput& operands,
                          const MatrixRef& dx) {
  validate_matrix(ctx, dx, {"dx", map.n_in, dx.cols, float_dtype(dx, "dx")});
  validate_matrix(ctx, operands.dy, {"dy", map.n_out, dx.cols, dx.dtype});
  validate_matrix(ctx, operands.w, {"the weights", map.taps(), dx.cols, dx.dtype});
  validate_apart(memory_of(dx, "dx"), memory_of(operands.dy, "dy"));
  validate_apart(memory_of(dx, "dx"), memory_of(operands.w, "the weights"));
  if (dx.cols == 0) return;
  WayBack back(ctx, map, operands.transposed);
  const DepthwiseGradInput seen = {back.merged(operands.dy), operands.w, back.transposed()};
  run(ctx, cuda::depthwise_grad_input, cpu::depthwise_grad_input, map, seen, dx);
  back.finish(dx);
}

void depthwise_grad_weight(const Context& ctx,
                           const KernelMap& map,
                           const MatrixRef& x,
                           const MatrixRef& dy,
                           const MatrixRef& dw) {
  validate_map(ctx, map);
  validate_matrix(ctx, x, {"x", map.n_in, x.cols, float_dtype(x, "x")});
  validate_matrix(ctx, dy, {"dy", map.n_out, x.cols, x.dtype});
  check(dw.dtype == x.dtype || (dw.dtype == Dtype::f32 && x.dtype != Dtype::f64),
        "the weight gradient has dtype ", name(dw.dtype), ", expected ", name(x.dtype),
        x.dtype == Dtype::f16 || x.dtype == Dtype::bf16 ? " or f32" : "");
  validate_matrix(ctx, dw, {"the weight gradient", map.taps(), x.cols, dw.dtype});
  validate_apart(memory_of(dw, "the weight gradient"), memory_of(x, "x"));
  validate_apart(memory_of(dw, "the weight gradient"), memory_of(dy, "dy"));
  if (dw.cols == 0) return;
  run(ctx, cuda::depthwise_grad_weight, cpu::depthwise_grad_weight, map, x, dy, dw);
}

}  // namespace voxgemm
