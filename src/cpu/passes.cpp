// SPDX-License-Identifier: Apache-2.0
#include "conv/passes.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <vector>

#include "core/dispatch.h"
#include "cpu/row_lists.h"

namespace voxgemm::cpu {
namespace {

// body(begin, end) for pieces of [0, rows).
void for_rows(const Context& ctx,
              int64_t rows,
              const std::function<void(int64_t begin, int64_t end)>& body) {
  constexpr int64_t piece = 2048;
  parallel_for(ctx, (rows + piece - 1) / piece,
               [&](int64_t task, int) { body(task * piece, std::min(rows, (task + 1) * piece)); });
}

}  // namespace

void fill_zero(const Context& ctx, const WeightsRef& w) {
  parallel_for(ctx, w.taps, [&](int64_t tap, int) {
    dispatch_float(w.dtype, [&]<class T>(Type<T>) {
      auto* data = static_cast<T*>(w.data) + tap * w.tap_stride;
      for (int k = 0; k < w.c_in; ++k) {
        for (int n = 0; n < w.c_out; ++n) data[k * w.in_stride + n * w.out_stride] = T{};
      }
    });
  });
}

Matrix merge_repeated(const Context& ctx, const MatrixRef& dy, const MatrixRef& first) {
  const auto* heads = first.as<int32_t>();
  // Chains of the rows of a voxel, in row order; a row of its own has none.
  std::vector<int32_t> next(dy.rows, -1);
  std::vector<int32_t> last(dy.rows, -1);
  for (int64_t r = 0; r < dy.rows; ++r) {
    const int32_t head = heads[r];
    if (head != r) next[last[head]] = static_cast<int32_t>(r);
    last[head] = static_cast<int32_t>(r);
  }
  Matrix merged = make_matrix(ctx, dy.rows, dy.cols, dy.dtype);
  for_rows(ctx, dy.rows, [&](int64_t begin, int64_t end) {
    std::vector<double> sums(static_cast<size_t>(dy.cols));
    dispatch_float(dy.dtype, [&]<class T>(Type<T>) {
      for (int64_t r = begin; r < end; ++r) {
        std::memcpy(merged.row<T>(r), dy.row<T>(r), dy.cols * sizeof(T));
        if (heads[r] != r || next[r] < 0) continue;
        std::fill(sums.begin(), sums.end(), 0.0);
        for (auto row = static_cast<int32_t>(r); row >= 0; row = next[row]) {
          for (int64_t c = 0; c < dy.cols; ++c) sums[c] += to_float(dy.row<const T>(row)[c]);
        }
        for (int64_t c = 0; c < dy.cols; ++c) store(sums[c], merged.row<T>(r)[c]);
      }
    });
  });
  return merged;
}

void zero_repeated(const Context& ctx, const MatrixRef& dx, const MatrixRef& first) {
  const auto row_bytes = static_cast<int64_t>(dx.stride * size_of(dx.dtype));
  for_rows(ctx, dx.rows, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      if (first.as<int32_t>()[r] == r) continue;
      std::memset(dx.row<char>(0) + r * row_bytes, 0, dx.cols * size_of(dx.dtype));
    }
  });
}

void grad_bias(const Context& ctx, const MatrixRef& dy, const MatrixRef& db) {
  // Rows are summed in blocks of this size, then the blocks in order: the same for any number of
  // threads.
  constexpr int64_t block = 2048;
  const int64_t blocks = (dy.rows + block - 1) / block;
  std::vector<int32_t> rows(block);
  std::iota(rows.begin(), rows.end(), 0);
  const RowEngine& engine = row_engine(dy.dtype);
  const Matrix sums = make_matrix(ctx, blocks, dy.cols, Dtype::f64);
  for_row_pieces(ctx, dy.rows, block, [&](int64_t first, int64_t last) {
    const RowList list = {.rows = rows.data(), .count = last - first};
    engine.sum_to_double(row_args(rows_from(dy, first), {&list, 1}, sums, first / block));
  });
  std::vector<double> total(static_cast<size_t>(dy.cols), 0.0);
  for (int64_t b = 0; b < blocks; ++b) {
    for (int64_t c = 0; c < dy.cols; ++c) total[c] += sums.row<double>(b)[c];
  }
  dispatch_float(db.dtype, [&]<class T>(Type<T>) {
    for (int64_t c = 0; c < dy.cols; ++c) store(total[c], db.as<T>()[c]);
  });
}

}  // namespace voxgemm::cpu
