// SPDX-License-Identifier: Apache-2.0
// Depthwise convolution by every engine that this CPU runs. Operands are multiples of 1/64 in
// [-2, 2], so that sums are exact in f32 and results equal the double sums, rounded once, to the
// bit. Buffers have exactly the promised sizes; what lies between rows is NaN.

#include <gtest/gtest.h>

#include <limits>
#include <random>
#include <string>
#include <vector>

#include "core/dispatch.h"
#include "cpu/engine.h"

namespace voxgemm::cpu {
namespace {

constexpr int widths[] = {1, 3, 4, 7, 8, 9, 15, 16, 17, 20, 31, 33, 64, 100, 129, 144, 200};
constexpr int gap = 3;  // columns between rows
constexpr float nan_value = std::numeric_limits<float>::quiet_NaN();

struct Problem {
  int x_rows;
  int taps;
  int rows;
  int n;
  int64_t first;  // the rows that the engine is asked for, up to `rows`
};

float small_multiple(std::mt19937& random) {
  return static_cast<float>(static_cast<int>(random() % 257) - 128) / 64;
}

// [rows, n], rows `gap` columns apart.
template <class T>
struct Rows {
  int64_t stride;
  std::vector<T> values;
  Rows(int64_t rows, int n, std::mt19937* random)
      : stride(n + gap), values(static_cast<size_t>(rows * stride)) {
    for (size_t i = 0; i < values.size(); ++i) {
      const bool inside = static_cast<int64_t>(i) % stride < n && random != nullptr;
      store(inside ? small_multiple(*random) : nan_value, values[i]);
    }
  }
  double at(int64_t r, int64_t c) const { return to_float(values[r * stride + c]); }
};

// Row numbers [taps, rows], a third of them outside of x.
std::vector<int32_t> draw_numbers(const Problem& p, std::mt19937& random) {
  std::vector<int32_t> numbers(static_cast<size_t>(p.taps) * p.rows);
  const int32_t absent[] = {-1, -9, p.x_rows, p.x_rows + 4, INT32_MAX, INT32_MIN};
  for (int32_t& number : numbers) {
    const bool there = random() % 3 != 0 && p.x_rows > 0;
    number = there ? static_cast<int32_t>(random() % p.x_rows) : absent[random() % 6];
  }
  return numbers;
}

class DepthwiseTest : public testing::TestWithParam<const Engine*> {
 protected:
  // body(Type<T>, problem) for every shape.
  template <class Body>
  static void for_shapes(const Body& body) {
    const Engine& engine = *GetParam();
    if (!engine.supported()) GTEST_SKIP() << "this CPU has no " << engine.isa;
    dispatch_float(engine.dtype, [&]<class T>(Type<T> type) {
      for (const int n : widths) {
        for (const int taps : {1, 16, 27, 33}) {
          for (const int rows : {1, 15, 16, 17, 130}) {
            for (const int64_t first : {0, rows / 2, rows}) {
              const Problem p = {.x_rows = 37, .taps = taps, .rows = rows, .n = n, .first = first};
              SCOPED_TRACE(testing::Message() << "n " << n << ", taps " << taps << ", rows " << rows
                                              << ", first " << first);
              body(type, p);
              if (testing::Test::HasFailure()) return;
            }
          }
        }
      }
    });
  }
  template <class T>
  static DepthwiseRows rows_of(const Problem& p,
                               const Rows<T>& x,
                               const std::vector<int32_t>& numbers) {
    return {.x = x.values.data(),
            .x_stride = x.stride,
            .x_rows = p.x_rows,
            .numbers = numbers.data(),
            .tap_stride = p.rows,
            .taps = p.taps,
            .first = p.first,
            .last = p.rows,
            .n = p.n};
  }
  static int64_t width_of(const Problem& p) { return std::max(p.n, GetParam()->panel_cols); }
};

TEST_P(DepthwiseTest, rows_equal_double_sums) {
  for_shapes([]<class T>(Type<T>, const Problem& p) {
    std::mt19937 random(11);
    const Rows<T> x(p.x_rows, p.n, &random);
    const std::vector<int32_t> numbers = draw_numbers(p, random);
    const int64_t width = width_of(p);
    std::vector<float> weights(static_cast<size_t>(p.taps * width));
    std::vector<float> start(static_cast<size_t>(width));
    for (int64_t c = 0; c < p.n; ++c) {
      start[c] = small_multiple(random);
      for (int64_t tap = 0; tap < p.taps; ++tap) weights[tap * width + c] = small_multiple(random);
    }
    Rows<T> y(p.rows, p.n, nullptr);
    std::vector<int32_t> scratch(static_cast<size_t>(depthwise_scratch(p.taps)));
    GetParam()->depthwise({.from = rows_of(p, x, numbers),
                           .weights = weights.data(),
                           .weight_stride = width,
                           .start = start.data(),
                           .y = y.values.data(),
                           .y_stride = y.stride,
                           .scratch = scratch.data()});
    for (int64_t r = 0; r < p.rows; ++r) {
      for (int64_t c = 0; c < y.stride && r * y.stride + c < std::ssize(y.values); ++c) {
        T expected;
        double sum = c < p.n && r >= p.first ? start[c] : nan_value;
        for (int64_t tap = 0; tap < p.taps && c < p.n; ++tap) {
          const int32_t in = numbers[tap * p.rows + r];
          if (in >= 0 && in < p.x_rows) sum += x.at(in, c) * weights[tap * width + c];
        }
        store(static_cast<float>(sum), expected);
        const double got = y.at(r, c);
        if (std::isnan(sum)) {
          ASSERT_TRUE(std::isnan(got)) << "row " << r << ", column " << c << " was written";
        } else {
          ASSERT_EQ(got, to_float(expected)) << "row " << r << ", column " << c;
        }
      }
    }
  });
}

TEST_P(DepthwiseTest, weight_gradients_equal_double_sums) {
  for_shapes([]<class T>(Type<T>, const Problem& p) {
    std::mt19937 random(12);
    const Rows<T> x(p.x_rows, p.n, &random);
    const Rows<T> dy(p.rows, p.n, &random);
    const std::vector<int32_t> numbers = draw_numbers(p, random);
    const int64_t width = width_of(p);
    std::vector<float> dw(static_cast<size_t>(p.taps * width), 1.0F);
    GetParam()->depthwise_outer({.from = rows_of(p, x, numbers),
                                 .dy = dy.values.data(),
                                 .dy_stride = dy.stride,
                                 .dw = dw.data(),
                                 .dw_stride = width});
    for (int64_t tap = 0; tap < p.taps; ++tap) {
      for (int64_t c = 0; c < p.n; ++c) {
        double sum = 1;
        for (int64_t r = p.first; r < p.rows; ++r) {
          const int32_t in = numbers[tap * p.rows + r];
          if (in >= 0 && in < p.x_rows) sum += x.at(in, c) * dy.at(r, c);
        }
        ASSERT_EQ(dw[tap * width + c], sum) << "tap " << tap << ", column " << c;
      }
    }
  });
}

// An absent row is not read: an infinite weight of its tap does not show.
TEST_P(DepthwiseTest, absent_rows_have_no_products) {
  const Engine& engine = *GetParam();
  if (!engine.supported()) GTEST_SKIP() << "this CPU has no " << engine.isa;
  dispatch_float(engine.dtype, [&]<class T>(Type<T>) {
    const Problem p = {.x_rows = 1, .taps = 2, .rows = 1, .n = 40, .first = 0};
    std::mt19937 random(13);
    const Rows<T> x(1, p.n, &random);
    const std::vector<int32_t> numbers = {0, -1};
    std::vector<float> weights(static_cast<size_t>(2 * p.n), 1.0F);
    std::fill(weights.begin() + p.n, weights.end(), std::numeric_limits<float>::infinity());
    const std::vector<float> start(static_cast<size_t>(p.n));
    Rows<T> y(1, p.n, nullptr);
    std::vector<int32_t> scratch(static_cast<size_t>(depthwise_scratch(p.taps)));
    engine.depthwise({.from = rows_of(p, x, numbers),
                      .weights = weights.data(),
                      .weight_stride = p.n,
                      .start = start.data(),
                      .y = y.values.data(),
                      .y_stride = y.stride,
                      .scratch = scratch.data()});
    for (int c = 0; c < p.n; ++c) EXPECT_EQ(y.at(0, c), x.at(0, c));
  });
}

INSTANTIATE_TEST_SUITE_P(engines,
                         DepthwiseTest,
                         testing::ValuesIn(engines().begin(), engines().end()),
                         [](const auto& info) {
                           return std::string(name(info.param->dtype)) + "_" + info.param->isa;
                         });

}  // namespace
}  // namespace voxgemm::cpu
