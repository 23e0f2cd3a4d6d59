// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <vector>

#include "cpu/row_engine.h"
#include "voxgemm/context.h"

namespace voxgemm::cpu {

// body(first, last) for pieces of [0, rows), shared among threads; a piece is a multiple of
// list_rows.
template <class Body>
void for_row_pieces(const Context& ctx, int64_t rows, int64_t piece, const Body& body) {
  parallel_for(ctx, (rows + piece - 1) / piece,
               [&](int64_t task, int) { body(task * piece, std::min(rows, (task + 1) * piece)); });
}

// body(lists, first) for rows [first, last), list_rows at a time; list(row) makes one.
template <class List, class Body>
void for_lists(int64_t first, int64_t last, List& list, const Body& body) {
  RowList lists[list_rows];
  for (; first < last; first += list_rows) {
    const int64_t count = std::min<int64_t>(list_rows, last - first);
    for (int64_t i = 0; i < count; ++i) lists[i] = list(first + i);
    body(std::span<const RowList>(lists, static_cast<size_t>(count)), first);
  }
}

// The same for all rows of a map.
template <class Body>
void for_map_lists(const Context& ctx,
                   const RowEngine& engine,
                   const KernelMap& map,
                   const Body& body) {
  const MapRows rows(map);
  for_row_pieces(ctx, map.n_out, 512, [&](int64_t first, int64_t last) {
    std::vector<int32_t> memory(static_cast<size_t>(list_memory(rows.taps)));
    RowList lists[list_rows];
    for (; first < last; first += list_rows) {
      const auto count = static_cast<int>(std::min<int64_t>(list_rows, last - first));
      engine.list(rows, first, count, memory.data(), lists);
      body(std::span<const RowList>(lists, static_cast<size_t>(count)), first);
    }
  });
}

// The rows of a matrix from one on.
inline MatrixRef rows_from(MatrixRef matrix, int64_t row) {
  matrix.data =
      matrix.as<char>() + row * matrix.stride * static_cast<int64_t>(size_of(matrix.dtype));
  matrix.rows -= row;
  return matrix;
}

// Rows of x that lists name, and the rows of y from `first` on that they make.
inline RowArgs row_args(const MatrixRef& x,
                        std::span<const RowList> lists,
                        const MatrixRef& y,
                        int64_t first) {
  return {.x = x.data,
          .x_stride = x.stride,
          .n = static_cast<int>(y.cols),
          .lists = lists.data(),
          .rows = static_cast<int>(lists.size()),
          .y = rows_from(y, first).data,
          .y_stride = y.stride};
}

// The rows of a matrix of row numbers [n, cols] in which each number stands, ascending, with the
// factors beside them if there are some. Numbers outside of [0, count) are in no list.
template <class S>
class RowLists {
 public:
  RowLists(const MatrixRef& numbers, int64_t count, const S* factors = nullptr)
      : starts_(static_cast<size_t>(count) + 2, 0) {
    const auto* rows = numbers.as<const int32_t>();
    const int64_t places = numbers.rows * numbers.cols;
    const auto is_row = [&](int32_t row) { return static_cast<uint32_t>(row) < count; };
    for (int64_t p = 0; p < places; ++p) {
      if (is_row(rows[p])) ++starts_[rows[p] + 2];
    }
    for (int64_t r = 0; r < count; ++r) starts_[r + 2] += starts_[r + 1];
    rows_.resize(static_cast<size_t>(starts_[count + 1]));
    if (factors != nullptr) factors_.resize(rows_.size());
    // Filling a list moves its start to its end, which is the start of the next.
    for (int64_t r = 0, p = 0; r < numbers.rows; ++r) {
      for (int64_t c = 0; c < numbers.cols; ++c, ++p) {
        if (!is_row(rows[p])) continue;
        const int64_t place = starts_[rows[p] + 1]++;
        rows_[place] = static_cast<int32_t>(r);
        if (factors != nullptr) factors_[place] = factors[p];
      }
    }
  }
  RowList operator()(int64_t row) const {
    return {.rows = rows_.data() + starts_[row],
            .factors = factors_.data() + (factors_.empty() ? 0 : starts_[row]),
            .count = starts_[row + 1] - starts_[row]};
  }

 private:
  std::vector<int64_t> starts_;  // [count + 2]
  std::vector<int32_t> rows_;
  std::vector<S> factors_;
};

}  // namespace voxgemm::cpu
