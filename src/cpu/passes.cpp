// SPDX-License-Identifier: Apache-2.0
#include "conv/passes.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "core/dispatch.h"

namespace voxgemm::cpu {

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
  Matrix merged = make_matrix(ctx, dy.rows, dy.cols, dy.dtype);
  dispatch_float(dy.dtype, [&]<class T>(Type<T>) {
    for (int64_t r = 0; r < dy.rows; ++r) {
      std::memcpy(merged.row<T>(r), dy.row<T>(r), dy.cols * sizeof(T));
    }
    std::vector<double> sums(static_cast<size_t>(dy.cols));
    std::vector<int32_t> next(dy.rows, -1);  // chains of rows with the same first row
    std::vector<int32_t> last(dy.rows, -1);
    for (int64_t r = 0; r < dy.rows; ++r) {
      const int32_t head = first.as<int32_t>()[r];
      if (head == r) {
        last[r] = head;
      } else {
        next[last[head]] = static_cast<int32_t>(r);
        last[head] = static_cast<int32_t>(r);
      }
    }
    for (int64_t head = 0; head < dy.rows; ++head) {
      if (first.as<int32_t>()[head] != head || next[head] < 0) continue;
      std::fill(sums.begin(), sums.end(), 0.0);
      for (int32_t r = static_cast<int32_t>(head); r >= 0; r = next[r]) {
        for (int64_t c = 0; c < dy.cols; ++c) sums[c] += to_float(dy.row<const T>(r)[c]);
      }
      for (int64_t c = 0; c < dy.cols; ++c) store(sums[c], merged.row<T>(head)[c]);
    }
  });
  return merged;
}

void zero_repeated(const Context&, const MatrixRef& dx, const MatrixRef& first) {
  for (int64_t r = 0; r < dx.rows; ++r) {
    if (first.as<int32_t>()[r] == r) continue;
    std::memset(dx.row<char>(0) + r * dx.stride * size_of(dx.dtype), 0,
                dx.cols * size_of(dx.dtype));
  }
}

void grad_bias(const Context& ctx, const MatrixRef& dy, const MatrixRef& db) {
  // Rows are summed in blocks of this size, then the blocks in order: the same for any number of
  // threads.
  constexpr int64_t block = 2048;
  const int64_t blocks = (dy.rows + block - 1) / block;
  std::vector<double> sums(static_cast<size_t>(blocks * dy.cols), 0.0);
  parallel_for(ctx, blocks, [&](int64_t b, int) {
    double* sum = sums.data() + b * dy.cols;
    dispatch_float(dy.dtype, [&]<class T>(Type<T>) {
      for (int64_t r = b * block; r < std::min(dy.rows, (b + 1) * block); ++r) {
        for (int64_t c = 0; c < dy.cols; ++c) sum[c] += to_float(dy.row<const T>(r)[c]);
      }
    });
  });
  std::vector<double> total(static_cast<size_t>(dy.cols), 0.0);
  for (int64_t b = 0; b < blocks; ++b) {
    for (int64_t c = 0; c < dy.cols; ++c) total[c] += sums[b * dy.cols + c];
  }
  dispatch_float(db.dtype, [&]<class T>(Type<T>) {
    for (int64_t c = 0; c < dy.cols; ++c) store(total[c], db.as<T>()[c]);
  });
}

}  // namespace voxgemm::cpu
