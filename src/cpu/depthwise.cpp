// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <vector>

#include "conv/operators.h"
#include "core/dispatch.h"
#include "cpu/avx2.h"
#include "cpu/brick_set.h"
#include "cpu/row_lists.h"
#include "cpu/widen.h"

namespace voxgemm::cpu {
namespace {

// Rows handled by one task.
constexpr int64_t piece = 512;

template <class T>
void widen_row(const T* from, int64_t cols, Sum<T>* to) {
  for (int64_t c = 0; c < cols; ++c) to[c] = widen(from[c]);
}

// y[r] = bias + sum over taps of x[row] * w[tap], mirrored or not.
template <class T>
void multiply(const Context& ctx,
              const KernelMap& map,
              const DepthwiseForward& operands,
              bool mirrored,
              const MatrixRef& y) {
  // By name: a lambda cannot take a structured binding in every compiler.
  const auto& x = operands.x;
  const auto& w = operands.w;
  const auto& bias = operands.bias;
  const int64_t cols = y.cols;
  std::vector<Sum<T>> weights(static_cast<size_t>(map.taps() * cols));
  for (int tap = 0; tap < map.taps(); ++tap) {
    const int64_t row = mirrored ? map.taps() - 1 - tap : tap;
    widen_row(w.row<const T>(row), cols, weights.data() + tap * cols);
  }
  std::vector<Sum<T>> start(static_cast<size_t>(cols), Sum<T>{0});
  if (bias) widen_row(bias->as<T>(), cols, start.data());
  for_vector_pieces(ctx, map.n_out, piece, [&](int64_t first, int64_t last) {
    std::vector<Sum<T>> sum(static_cast<size_t>(cols));
    for (int64_t r = first; r < last; ++r) {
      std::copy(start.begin(), start.end(), sum.begin());
      for (int tap = 0; tap < map.taps(); ++tap) {
        const int32_t in = map.neighbours.row<int32_t>(tap)[r];
        if (!RowLists::is_row(in, map.n_in)) continue;
        const T* from = x.row<const T>(in);
        const Sum<T>* weight = weights.data() + tap * cols;
        for (int64_t c = 0; c < cols; ++c) sum[c] += weight[c] * widen(from[c]);
      }
      for (int64_t c = 0; c < cols; ++c) store(sum[c], y.row<T>(r)[c]);
    }
  });
}

}  // namespace

void depthwise_forward(const Context& ctx,
                       const KernelMap& map,
                       const DepthwiseForward& operands,
                       const MatrixRef& y) {
  dispatch_float(y.dtype, [&]<class T>(Type<T>) { multiply<T>(ctx, map, operands, false, y); });
}

void depthwise_grad_input(const Context& ctx,
                          const KernelMap& map,
                          const DepthwiseGradInput& operands,
                          const MatrixRef& dx) {
  const DepthwiseForward seen = {.x = operands.dy, .w = operands.w, .bias = {}};
  dispatch_float(dx.dtype, [&]<class T>(Type<T>) {
    multiply<T>(ctx, *operands.transposed, seen, map.symmetric, dx);
  });
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
  const int64_t size = map.taps() * x.cols;
  dispatch_float(x.dtype, [&]<class T>(Type<T>) {
    const Buffer<Sum<T>> sums(ctx, slices * size);
    for_vector_pieces(ctx, map.n_out, rows, [&](int64_t first, int64_t last) {
      Sum<T>* sum = sums.data() + first / rows * size;
      std::fill_n(sum, size, Sum<T>{0});
      std::vector<Sum<T>> gradient(static_cast<size_t>(x.cols));
      for (int64_t r = first; r < last; ++r) {
        widen_row(dy.row<const T>(r), x.cols, gradient.data());
        for (int tap = 0; tap < map.taps(); ++tap) {
          const int32_t in = map.neighbours.row<int32_t>(tap)[r];
          if (!RowLists::is_row(in, map.n_in)) continue;
          const T* from = x.row<const T>(in);
          Sum<T>* to = sum + tap * x.cols;
          for (int64_t c = 0; c < x.cols; ++c) to[c] += gradient[c] * widen(from[c]);
        }
      }
    });
    dispatch_float(dw.dtype, [&]<class D>(Type<D>) {
      for (int64_t i = 0; i < size; ++i) {
        double total = 0;
        for (int64_t slice = 0; slice < slices; ++slice) total += sums[slice * size + i];
        store(total, dw.row<D>(i / x.cols)[i % x.cols]);
      }
    });
  });
}

}  // namespace voxgemm::cpu
