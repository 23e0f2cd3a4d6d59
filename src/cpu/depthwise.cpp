// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <vector>

#include "conv/operators.h"
#include "core/dispatch.h"
#include "cpu/avx2.h"
#include "cpu/brick_set.h"
#include "cpu/engine.h"
#include "cpu/row_lists.h"
#include "cpu/widen.h"

namespace voxgemm::cpu {
namespace {

// Rows handled by one task.
constexpr int64_t piece = 512;

// What engines and the loops for f64 read; `first` and `last` are the task's.
DepthwiseRows rows_of(const KernelMap& map, const MatrixRef& x, int64_t first, int64_t last) {
  return {.x = x.data,
          .x_stride = x.stride,
          .x_rows = map.n_in,
          .numbers = map.neighbours.as<const int32_t>(),
          .tap_stride = map.neighbours.stride,
          .taps = map.taps(),
          .first = first,
          .last = last,
          .n = static_cast<int>(x.cols)};
}

// body(tap, row of x) for what row r reads, in the order of the taps.
template <class Body>
void for_taps(const DepthwiseRows& from, int64_t r, const Body& body) {
  for (int tap = 0; tap < from.taps; ++tap) {
    const int32_t in = from.numbers[tap * from.tap_stride + r];
    if (RowLists::is_row(in, from.x_rows)) {
      body(tap, static_cast<const double*>(from.x) + in * from.x_stride);
    }
  }
}

void convolve_f64(const DepthwiseRows& from,
                  const DepthwiseForward& operands,
                  bool mirrored,
                  const MatrixRef& y) {
  for (int64_t r = from.first; r < from.last; ++r) {
    double* sum = y.row<double>(r);
    std::fill_n(sum, from.n, 0.0);
    if (operands.bias) std::copy_n(operands.bias->as<double>(), from.n, sum);
    for_taps(from, r, [&](int tap, const double* x) {
      const auto* w = operands.w.row<const double>(mirrored ? from.taps - 1 - tap : tap);
      for (int c = 0; c < from.n; ++c) sum[c] += w[c] * x[c];
    });
  }
}

void add_products_f64(const DepthwiseRows& from, const MatrixRef& dy, double* sums) {
  for (int64_t r = from.first; r < from.last; ++r) {
    const auto* gradient = dy.row<const double>(r);
    for_taps(from, r, [&](int tap, const double* x) {
      double* sum = sums + int64_t{tap} * from.n;
      for (int c = 0; c < from.n; ++c) sum[c] += gradient[c] * x[c];
    });
  }
}

// A matrix as f32, with zeros up to whole vectors of the engine, mirrored or not.
class Widened {
 public:
  Widened(const Engine& engine, const MatrixRef& m, bool mirrored)
      : stride_(std::max<int64_t>(m.cols, engine.panel_cols)),
        values_(static_cast<size_t>(m.rows * stride_)) {
    dispatch_float(m.dtype, [&]<class T>(Type<T>) {
      for (int64_t r = 0; r < m.rows; ++r) {
        const T* from = m.row<const T>(mirrored ? m.rows - 1 - r : r);
        for (int64_t c = 0; c < m.cols; ++c) {
          values_[r * stride_ + c] = static_cast<float>(widen(from[c]));
        }
      }
    });
  }
  int64_t stride() const { return stride_; }
  const float* data() const { return values_.data(); }

 private:
  int64_t stride_;
  std::vector<float> values_;
};

void convolve(const Context& ctx,
              const KernelMap& map,
              const DepthwiseForward& operands,
              bool mirrored,
              const MatrixRef& y) {
  const Engine* engine = best_engine(y.dtype);
  if (engine == nullptr) {
    return for_vector_pieces(ctx, map.n_out, piece, [&](int64_t first, int64_t last) {
      convolve_f64(rows_of(map, operands.x, first, last), operands, mirrored, y);
    });
  }
  const Widened weights(*engine, operands.w, mirrored);
  std::vector<float> start(static_cast<size_t>(weights.stride()));
  if (operands.bias) {
    const Widened bias(*engine, *operands.bias, false);
    std::copy_n(bias.data(), start.size(), start.data());
  }
  parallel_for(ctx, (map.n_out + piece - 1) / piece, [&](int64_t task, int) {
    std::vector<int32_t> scratch(static_cast<size_t>(depthwise_scratch(map.taps())));
    const int64_t last = std::min(map.n_out, (task + 1) * piece);
    engine->depthwise({.from = rows_of(map, operands.x, task * piece, last),
                       .weights = weights.data(),
                       .weight_stride = weights.stride(),
                       .start = start.data(),
                       .y = y.data,
                       .y_stride = y.stride,
                       .scratch = scratch.data()});
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
  const int64_t rows = std::max(piece, (map.n_out + most_slices - 1) / most_slices);
  const int64_t slices = (map.n_out + rows - 1) / rows;
  const auto add_slices = [&](const auto* sums, int64_t stride) {
    dispatch_float(dw.dtype, [&]<class D>(Type<D>) {
      for (int64_t i = 0; i < map.taps() * x.cols; ++i) {
        const int64_t tap = i / x.cols;
        double total = 0;
        for (int64_t slice = 0; slice < slices; ++slice) {
          total += sums[(slice * map.taps() + tap) * stride + i % x.cols];
        }
        store(static_cast<Sum<D>>(total), dw.row<D>(tap)[i % x.cols]);
      }
    });
  };
  const Engine* engine = best_engine(x.dtype);
  if (engine == nullptr) {
    const int64_t size = map.taps() * x.cols;
    const Buffer<double> sums(ctx, slices * size);
    std::fill_n(sums.data(), slices * size, 0.0);
    for_vector_pieces(ctx, map.n_out, rows, [&](int64_t first, int64_t last) {
      add_products_f64(rows_of(map, x, first, last), dy, sums.data() + first / rows * size);
    });
    return add_slices(sums.data(), x.cols);
  }
  const int64_t stride = std::max<int64_t>(x.cols, engine->panel_cols);
  const Buffer<float> sums(ctx, slices * map.taps() * stride);
  std::fill_n(sums.data(), slices * map.taps() * stride, 0.0F);
  parallel_for(ctx, slices, [&](int64_t slice, int) {
    const int64_t last = std::min(map.n_out, (slice + 1) * rows);
    engine->depthwise_outer({.from = rows_of(map, x, slice * rows, last),
                             .dy = dy.data,
                             .dy_stride = dy.stride,
                             .dw = sums.data() + slice * map.taps() * stride,
                             .dw_stride = stride});
  });
  add_slices(sums.data(), stride);
}

}  // namespace voxgemm::cpu
