// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <optional>

#include "conv/operators.h"
#include "core/dispatch.h"
#include "cpu/brick_set.h"
#include "cpu/row_lists.h"

namespace voxgemm::cpu {
namespace {

// A matrix as sums are, with zeros up to whole vectors of the engine, mirrored or not.
template <class S>
class Widened {
 public:
  Widened(const Context& ctx, const RowEngine& engine, const MatrixRef& m, bool mirrored)
      : stride_(std::max<int64_t>(m.cols, engine.lanes)), values_(ctx, m.rows * stride_) {
    std::fill_n(values_.data(), values_.size(), S{0});
    dispatch_float(m.dtype, [&]<class T>(Type<T>) {
      for (int64_t r = 0; r < m.rows; ++r) {
        const T* from = m.row<const T>(mirrored ? m.rows - 1 - r : r);
        for (int64_t c = 0; c < m.cols; ++c) {
          values_[r * stride_ + c] = static_cast<S>(to_float(from[c]));
        }
      }
    });
  }
  int64_t stride() const { return stride_; }
  const S* data() const { return values_.data(); }

 private:
  int64_t stride_;
  Buffer<S> values_;
};

void convolve(const Context& ctx,
              const KernelMap& map,
              const DepthwiseForward& operands,
              bool mirrored,
              const MatrixRef& y) {
  const RowEngine& engine = row_engine(y.dtype);
  dispatch_float(y.dtype, [&]<class T>(Type<T>) {
    const Widened<Sum<T>> weights(ctx, engine, operands.w, mirrored);
    const auto bias = operands.bias
                          ? std::make_optional<Widened<Sum<T>>>(ctx, engine, *operands.bias, false)
                          : std::nullopt;
    for_map_lists(ctx, engine, map, [&](std::span<const RowList> lists, int64_t first) {
      engine.convolve({.rows = row_args(operands.x, lists, y, first),
                       .weights = weights.data(),
                       .weight_stride = weights.stride(),
                       .start = bias ? bias->data() : nullptr});
    });
  });
}

}  // namespace

void depthwise_forward(const Context& ctx,
                       const KernelMap& map,
                       const DepthwiseForward& operands,
                       const MatrixRef& y) {
  convolve(ctx, map, operands, false, y);
}

void depthwise_grad_input(const Context& ctx,
                          const KernelMap& map,
                          const DepthwiseGradInput& operands,
                          const MatrixRef& dx) {
  const DepthwiseForward seen = {.x = operands.dy, .w = operands.w, .bias = {}};
  convolve(ctx, *operands.transposed, seen, map.symmetric, dx);
}

void depthwise_grad_weight(const Context& ctx,
                           const KernelMap& map,
                           const MatrixRef& x,
                           const MatrixRef& dy,
                           const MatrixRef& dw) {
  // Slices of rows, whose sums are added in order: the same for any number of threads.
  constexpr int64_t most_slices = 64;
  constexpr int64_t least_rows = 512;
  const int64_t rows = std::max(least_rows, (map.n_out + most_slices - 1) / most_slices);
  const int64_t slices = (map.n_out + rows - 1) / rows;
  const RowEngine& engine = row_engine(x.dtype);
  const int64_t stride = std::max<int64_t>(x.cols, engine.lanes);
  const int64_t size = map.taps() * stride;
  dispatch_float(x.dtype, [&]<class T>(Type<T>) {
    const Buffer<Sum<T>> sums(ctx, slices * size);
    std::fill_n(sums.data(), slices * size, Sum<T>{0});
    parallel_for(ctx, slices, [&](int64_t slice, int) {
      engine.outer({.map = MapRows(map),
                    .first = slice * rows,
                    .last = std::min(map.n_out, (slice + 1) * rows),
                    .x = x.data,
                    .x_stride = x.stride,
                    .dy = dy.data,
                    .dy_stride = dy.stride,
                    .n = static_cast<int>(x.cols),
                    .dw = sums.data() + slice * size,
                    .dw_stride = stride});
    });
    dispatch_float(dw.dtype, [&]<class D>(Type<D>) {
      for (int64_t tap = 0; tap < map.taps(); ++tap) {
        for (int64_t c = 0; c < x.cols; ++c) {
          double total = 0;
          for (int64_t slice = 0; slice < slices; ++slice) {
            total += sums[slice * size + tap * stride + c];
          }
          store(static_cast<Sum<D>>(total), dw.row<D>(tap)[c]);
        }
      }
    });
  });
}

}  // namespace voxgemm::cpu
