// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>
#include <vector>

#include "conv/operators.h"
#include "core/dispatch.h"
#include "cpu/brick_set.h"
#include "cpu/row_lists.h"

namespace voxgemm::cpu {
namespace {

// Result rows handled by one task.
constexpr int64_t piece = 256;

// The state of one result row; sums are in double.
struct Row {
  std::vector<double> values;
  std::vector<int32_t> winners;
  int64_t count = 0;

  explicit Row(int64_t cols)
      : values(static_cast<size_t>(cols)), winners(static_cast<size_t>(cols)) {}
  void clear() {
    std::fill(values.begin(), values.end(), 0.0);
    std::fill(winners.begin(), winners.end(), -1);
    count = 0;
  }
  template <class T>
  void add(const T* x, int32_t row, Reduction reduction) {
    ++count;
    const auto cols = static_cast<int64_t>(values.size());
    if (reduction == Reduction::sum || reduction == Reduction::mean) {
      for (int64_t c = 0; c < cols; ++c) values[c] += to_float(x[c]);
      return;
    }
    for (int64_t c = 0; c < cols; ++c) {
      const double value = to_float(x[c]);
      const bool better = reduction == Reduction::max ? value > values[c] : value < values[c];
      if (winners[c] < 0 || better || (std::isnan(value) && !std::isnan(values[c]))) {
        values[c] = value;
        winners[c] = row;
      }
    }
  }
  template <class T>
  void write(int64_t row, Reduction reduction, const Reduced& result) const {
    const double divisor = reduction == Reduction::mean ? std::max<int64_t>(count, 1) : 1;
    const auto cols = static_cast<int64_t>(values.size());
    for (int64_t c = 0; c < cols; ++c) store(values[c] / divisor, result.y.row<T>(row)[c]);
    if (result.winners)
      std::copy(winners.begin(), winners.end(), result.winners->row<int32_t>(row));
  }
};

bool is_row(int32_t row, int64_t count) { return RowLists::is_row(row, count); }

}  // namespace

void pool(const Context& ctx,
          const KernelMap& map,
          const MatrixRef& x,
          Reduction reduction,
          const Reduced& result) {
  dispatch_float(x.dtype, [&]<class T>(Type<T>) {
    for_pieces(ctx, map.n_out, piece, [&](int64_t first, int64_t last) {
      Row row(x.cols);
      for (int64_t r = first; r < last; ++r) {
        row.clear();
        for (int tap = 0; tap < map.taps(); ++tap) {
          const int32_t in = map.neighbours.row<int32_t>(tap)[r];
          if (is_row(in, map.n_in)) row.add(x.row<const T>(in), in, reduction);
        }
        row.write<T>(r, reduction, result);
      }
    });
  });
}

void pool_grad(const Context& ctx,
               const KernelMap& map,
               Reduction reduction,
               const PoolGrad& grad,
               const MatrixRef& dx) {
  std::vector<int32_t> counts(reduction == Reduction::mean ? map.n_out : 0, 0);
  for (int tap = 0; tap < map.taps() && !counts.empty(); ++tap) {
    const auto* in = map.neighbours.row<int32_t>(tap);
    for (int64_t r = 0; r < map.n_out; ++r) counts[r] += is_row(in[r], map.n_in) ? 1 : 0;
  }
  const KernelMap& back = *grad.transposed;
  dispatch_float(dx.dtype, [&]<class T>(Type<T>) {
    for_pieces(ctx, back.n_out, piece, [&](int64_t first, int64_t last) {
      std::vector<double> sum(static_cast<size_t>(dx.cols));
      for (int64_t r = first; r < last; ++r) {
        std::fill(sum.begin(), sum.end(), 0.0);
        for (int tap = 0; tap < back.taps(); ++tap) {
          const int32_t out = back.neighbours.row<int32_t>(tap)[r];
          if (!is_row(out, back.n_in)) continue;
          const T* dy = grad.dy.row<const T>(out);
          const int32_t* won = grad.winners ? grad.winners->row<int32_t>(out) : nullptr;
          const double count = counts.empty() ? 1 : counts[out];
          for (int64_t c = 0; c < dx.cols; ++c) {
            if (won == nullptr || won[c] == r) sum[c] += to_float(dy[c]) / count;
          }
        }
        for (int64_t c = 0; c < dx.cols; ++c) store(sum[c], dx.row<T>(r)[c]);
      }
    });
  });
}

void segment_reduce(const Context& ctx,
                    const MatrixRef& x,
                    const MatrixRef& segments,
                    Reduction reduction,
                    const Reduced& result) {
  const RowLists lists(segments.as<int32_t>(), segments.rows, result.y.rows);
  dispatch_float(x.dtype, [&]<class T>(Type<T>) {
    // Segments are few and long: one a task.
    parallel_for(ctx, result.y.rows, [&](int64_t segment, int) {
      Row row(x.cols);
      row.clear();
      for (const int64_t r : lists.of(segment)) {
        row.add(x.row<const T>(r), static_cast<int32_t>(r), reduction);
      }
      row.write<T>(segment, reduction, result);
    });
  });
}

}  // namespace voxgemm::cpu
