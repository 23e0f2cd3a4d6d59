// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <vector>

#include "conv/operators.h"
#include "core/dispatch.h"
#include "cpu/avx2.h"
#include "cpu/row_lists.h"
#include "cpu/widen.h"

namespace voxgemm::cpu {
namespace {

// Result rows handled by one task.
constexpr int64_t piece = 256;

// The state of one result row; S is what its sums are kept in.
template <class S>
struct Row {
  std::vector<S> values;
  std::vector<int32_t> winners;
  int64_t count = 0;

  explicit Row(int64_t cols)
      : values(static_cast<size_t>(cols)), winners(static_cast<size_t>(cols)) {}
  void clear() {
    std::fill(values.begin(), values.end(), S{0});
    std::fill(winners.begin(), winners.end(), -1);
    count = 0;
  }
  template <class T>
  void add(const T* x, int32_t row, Reduction reduction) {
    const bool is_first = count++ == 0;
    const auto cols = static_cast<int64_t>(values.size());
    if (reduction == Reduction::sum || reduction == Reduction::mean) {
      for (int64_t c = 0; c < cols; ++c) values[c] += widen(x[c]);
    } else if (is_first) {
      for (int64_t c = 0; c < cols; ++c) values[c] = widen(x[c]);
      std::fill(winners.begin(), winners.end(), row);
    } else if (reduction == Reduction::max) {
      take(x, row, [](S value, S held) { return !(value <= held); });
    } else {
      take(x, row, [](S value, S held) { return !(value >= held); });
    }
  }
  // Without branches: vector code. A NaN is better than what is held, and nothing than a NaN.
  template <class T, class Better>
  void take(const T* x, int32_t row, const Better& better) {
    S* held = values.data();
    int32_t* rows = winners.data();
    const auto cols = static_cast<int64_t>(values.size());
    for (int64_t c = 0; c < cols; ++c) {
      const S value = widen(x[c]);
      const bool wins = better(value, held[c]) & (held[c] == held[c]);
      held[c] = wins ? value : held[c];
      rows[c] = wins ? row : rows[c];
    }
  }
  template <class T>
  void write(int64_t row, Reduction reduction, const Reduced& result) const {
    const S divisor =
        reduction == Reduction::mean ? static_cast<S>(std::max<int64_t>(count, 1)) : 1;
    const auto cols = static_cast<int64_t>(values.size());
    for (int64_t c = 0; c < cols; ++c) store(values[c] / divisor, result.y.row<T>(row)[c]);
    if (result.winners)
      std::copy(winners.begin(), winners.end(), result.winners->row<int32_t>(row));
  }
};

// take(row) for the rows of the input side that feed row r, in the order of the taps.
template <class Take>
void for_taps(const KernelMap& map, int64_t r, const Take& take) {
  for (int tap = 0; tap < map.taps(); ++tap) {
    const int32_t in = map.neighbours.row<int32_t>(tap)[r];
    if (RowLists::is_row(in, map.n_in)) take(in);
  }
}

}  // namespace

void pool(const Context& ctx,
          const KernelMap& map,
          const MatrixRef& x,
          Reduction reduction,
          const Reduced& result) {
  dispatch_float(x.dtype, [&]<class T>(Type<T>) {
    for_vector_pieces(ctx, map.n_out, piece, [&](int64_t first, int64_t last) {
      Row<Sum<T>> row(x.cols);
      for (int64_t r = first; r < last; ++r) {
        row.clear();
        for_taps(map, r, [&](int32_t in) { row.add(x.row<const T>(in), in, reduction); });
        row.template write<T>(r, reduction, result);
      }
    });
  });
}

void pool_grad(const Context& ctx, const PoolBack& grad, const MatrixRef& dx) {
  const auto* counts = grad.counts.as<int32_t>();
  const KernelMap& back = *grad.transposed;
  dispatch_float(dx.dtype, [&]<class T>(Type<T>) {
    for_vector_pieces(ctx, back.n_out, piece, [&](int64_t first, int64_t last) {
      std::vector<Sum<T>> sum(static_cast<size_t>(dx.cols));
      for (int64_t r = first; r < last; ++r) {
        std::fill(sum.begin(), sum.end(), Sum<T>{0});
        for_taps(back, r, [&](int32_t out) {
          const T* dy = grad.dy.row<const T>(out);
          const int32_t* won = grad.winners ? grad.winners->row<int32_t>(out) : nullptr;
          const Sum<T> count = counts == nullptr ? 1 : static_cast<Sum<T>>(counts[out]);
          if (won == nullptr) {
            for (int64_t c = 0; c < dx.cols; ++c) sum[c] += widen(dy[c]) / count;
            return;
          }
          for (int64_t c = 0; c < dx.cols; ++c) sum[c] += won[c] == r ? widen(dy[c]) : 0;
        });
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
      Row<double> row(x.cols);
      row.clear();
      for (const int64_t r : lists.of(segment)) {
        row.add(x.row<const T>(r), static_cast<int32_t>(r), reduction);
      }
      row.template write<T>(segment, reduction, result);
    });
  });
}

}  // namespace voxgemm::cpu
