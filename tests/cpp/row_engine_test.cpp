// SPDX-License-Identifier: Apache-2.0
// Rows made of lists of rows, by every engine that this CPU runs. Operands are multiples of 1/64 in
// [-2, 2], so that sums are exact in f32 and results equal the double sums, rounded once, to the
// bit. Buffers have exactly the promised sizes; what lies between rows is NaN.

#include <gtest/gtest.h>

#include <limits>
#include <random>
#include <string>
#include <vector>

#include "core/dispatch.h"
#include "cpu/row_engine.h"

namespace voxgemm::cpu {
namespace {

constexpr int widths[] = {1, 3, 4, 7, 8, 9, 15, 16, 17, 20, 31, 33, 64, 100, 129, 144, 200};
constexpr int gap = 3;  // columns between rows
constexpr int x_rows = 37;
constexpr double nan_value = std::numeric_limits<double>::quiet_NaN();
constexpr double infinity = std::numeric_limits<double>::infinity();

double small_multiple(std::mt19937& random) {
  return static_cast<double>(static_cast<int>(random() % 257) - 128) / 64;
}

template <class T>
double rounded(double value) {
  T result;
  store(value, result);
  return to_float(result);
}

// [rows, n], rows `gap` columns apart, drawn by draw(); NaN without.
template <class T>
struct Rows {
  int n;
  int64_t stride;
  std::vector<T> values;
  template <class Draw>
  Rows(int64_t rows, int n, const Draw& draw)
      : n(n), stride(n + gap), values(static_cast<size_t>(rows * stride)) {
    for (size_t i = 0; i < values.size(); ++i) {
      store(static_cast<int64_t>(i) % stride < n ? draw() : nan_value, values[i]);
    }
  }
  Rows(int64_t rows, int n) : Rows(rows, n, [] { return nan_value; }) {}
  double at(int64_t r, int64_t c) const { return to_float(values[r * stride + c]); }
  // Rows from `first` on are expected(r, c), those before and what lies between NaN.
  template <class Expected>
  void expect(int64_t first, const Expected& expected) const {
    for (int64_t i = 0; i < std::ssize(values); ++i) {
      const int64_t r = i / stride;
      const int64_t c = i % stride;
      const double wanted = r >= first && c < n ? expected(r, c) : nan_value;
      const double got = at(r, c);
      if (std::isnan(wanted)) {
        ASSERT_TRUE(std::isnan(got)) << "row " << r << ", column " << c << ": " << got;
      } else {
        ASSERT_EQ(got, wanted) << "row " << r << ", column " << c;
      }
    }
  }
};

// The table of a map, a third of its rows absent.
struct Table {
  int taps;
  int rows;
  std::vector<int32_t> numbers;
  Table(int taps, int rows, std::mt19937& random)
      : taps(taps), rows(rows), numbers(static_cast<size_t>(taps) * rows) {
    const int32_t absent[] = {-1, -9, x_rows, x_rows + 4, INT32_MAX, INT32_MIN};
    for (int32_t& number : numbers) {
      number = random() % 3 != 0 ? static_cast<int32_t>(random() % x_rows) : absent[random() % 6];
    }
  }
  MapRows map() const {
    MapRows result;
    result.numbers = numbers.data();
    result.tap_stride = rows;
    result.taps = taps;
    result.x_rows = x_rows;
    return result;
  }
  // body(tap, row of x) for what row r has.
  template <class Body>
  void for_taps(int64_t r, const Body& body) const {
    for (int tap = 0; tap < taps; ++tap) {
      const int32_t in = numbers[int64_t{tap} * rows + r];
      if (in >= 0 && in < x_rows) body(tap, in);
    }
  }
};

// Lists of 0 to 40 rows, with factors.
template <class S>
struct Lists {
  std::vector<std::vector<int32_t>> rows;
  std::vector<std::vector<S>> factors;
  std::vector<RowList> lists;
  template <class Draw>
  Lists(int count, std::mt19937& random, const Draw& draw) : rows(count), factors(count) {
    for (int r = 0; r < count; ++r) {
      for (size_t left = random() % 3 != 0 ? random() % 5 : random() % 41; left > 0; --left) {
        rows[r].push_back(static_cast<int32_t>(random() % x_rows));
        factors[r].push_back(static_cast<S>(draw()));
      }
      lists.push_back(
          {.rows = rows[r].data(), .factors = factors[r].data(), .count = std::ssize(rows[r])});
    }
  }
  template <class T, class Out>
  RowArgs args(const Rows<T>& x, Rows<Out>& y) const {
    return {.x = x.values.data(),
            .x_stride = x.stride,
            .n = x.n,
            .lists = lists.data(),
            .rows = static_cast<int>(lists.size()),
            .y = y.values.data(),
            .y_stride = y.stride};
  }
};

class RowEngineTest : public testing::TestWithParam<const RowEngine*> {
 protected:
  std::mt19937 random{11};
  double draw() { return small_multiple(random); }
  const RowEngine& engine() { return *GetParam(); }
  // body(Type<T>, n) for every width.
  template <class Body>
  void for_widths(const Body& body) {
    if (!engine().supported()) GTEST_SKIP() << "this CPU has no " << engine().isa;
    dispatch_float(engine().dtype, [&]<class T>(Type<T> type) {
      for (const int n : widths) {
        SCOPED_TRACE(testing::Message() << "n " << n);
        body(type, n);
        if (testing::Test::HasFailure()) return;
      }
    });
  }
  // body(Type<T>, n, table, first of the rows asked for) for every shape.
  template <class Body>
  void for_tables(const Body& body) {
    for_widths([&](auto type, int n) {
      for (const int taps : {1, 16, 27, 33}) {
        for (const int rows : {1, 15, 16, 17, 130}) {
          for (const int first : {0, rows / 2, rows}) {
            SCOPED_TRACE(testing::Message() << taps << " taps, rows " << first << " to " << rows);
            body(type, n, Table(taps, rows, random), first);
          }
        }
      }
    });
  }
  template <class T>
  Rows<T> drawn(int64_t rows, int n) {
    return Rows<T>(rows, n, [&] { return draw(); });
  }
};

TEST_P(RowEngineTest, convolution_equals_double_sums) {
  for_tables([&]<class T>(Type<T>, int n, const Table& table, int first) {
    using S = Sum<T>;
    const Rows<T> x = drawn<T>(x_rows, n);
    const int64_t width = std::max(n, engine().lanes);
    std::vector<S> weights(static_cast<size_t>(table.taps * width));
    std::vector<S> start(static_cast<size_t>(width));
    for (int64_t c = 0; c < n; ++c) {
      start[c] = static_cast<S>(draw());
      for (int64_t t = 0; t < table.taps; ++t) weights[t * width + c] = static_cast<S>(draw());
    }
    Rows<T> y(table.rows, n);
    std::vector<int32_t> memory(static_cast<size_t>(list_memory(table.taps)));
    RowList lists[list_rows];
    for (int r = first; r < table.rows; r += list_rows) {
      const int count = std::min(list_rows, table.rows - r);
      engine().list(table.map(), r, count, memory.data(), lists);
      const RowArgs rows = {.x = x.values.data(),
                            .x_stride = x.stride,
                            .n = n,
                            .lists = lists,
                            .rows = count,
                            .y = y.values.data() + r * y.stride,
                            .y_stride = y.stride};
      engine().convolve({.rows = rows,
                         .weights = weights.data(),
                         .weight_stride = width,
                         .start = r % 2 == 0 ? start.data() : nullptr});
    }
    y.expect(first, [&](int64_t r, int64_t c) {
      double sum = (r - (r - first) % list_rows) % 2 == 0 ? start[c] : 0;
      table.for_taps(r, [&](int tap, int in) { sum += x.at(in, c) * weights[tap * width + c]; });
      return rounded<T>(sum);
    });
  });
}

TEST_P(RowEngineTest, outer_products_equal_double_sums) {
  for_tables([&]<class T>(Type<T>, int n, const Table& table, int first) {
    const Rows<T> x = drawn<T>(x_rows, n);
    const Rows<T> dy = drawn<T>(table.rows, n);
    const int64_t width = std::max(n, engine().lanes);
    std::vector<Sum<T>> dw(static_cast<size_t>(table.taps * width), 1);
    engine().outer({.map = table.map(),
                    .first = first,
                    .last = table.rows,
                    .x = x.values.data(),
                    .x_stride = x.stride,
                    .dy = dy.values.data(),
                    .dy_stride = dy.stride,
                    .n = n,
                    .dw = dw.data(),
                    .dw_stride = width});
    std::vector<double> wanted(dw.size(), 1);
    for (int64_t r = first; r < table.rows; ++r) {
      table.for_taps(r, [&](int tap, int in) {
        for (int64_t c = 0; c < n; ++c) wanted[tap * width + c] += x.at(in, c) * dy.at(r, c);
      });
    }
    for (int64_t i = 0; i < std::ssize(dw); ++i) {
      if (i % width >= n) continue;
      ASSERT_EQ(dw[i], wanted[i]) << "tap " << i / width << ", column " << i % width;
    }
  });
}

TEST_P(RowEngineTest, sums_equal_double_sums) {
  for_widths([&]<class T>(Type<T>, int n) {
    const Rows<T> x = drawn<T>(x_rows, n);
    const Lists<Sum<T>> of(20, random, [&] { return draw(); });
    std::vector<Sum<T>> scales(x_rows);
    for (Sum<T>& scale : scales) scale = static_cast<Sum<T>>(draw());
    // sum(term(list, entry, x)), of a mean over the entries.
    const auto sums = [&](const auto& term, bool mean = false) {
      return [&, term, mean](int64_t r, int64_t c) {
        double sum = 0;
        const auto& rows = of.rows[r];
        for (size_t i = 0; i < rows.size(); ++i) sum += term(r, i, x.at(rows[i], c));
        return mean && !rows.empty() ? sum / static_cast<double>(rows.size()) : sum;
      };
    };
    const auto plain = [](int64_t, size_t, double value) { return value; };
    const auto weighted = [&](int64_t r, size_t i, double value) {
      return value * of.factors[r][i];
    };
    const auto scaled = [&](int64_t r, size_t i, double value) {
      return value * scales[of.rows[r][i]];
    };
    // Rounded to the sums' type before it is to T.
    const auto mean = [&](int64_t r, int64_t c) {
      return rounded<T>(static_cast<Sum<T>>(sums(plain, true)(r, c)));
    };
    const auto to_t = [](const auto& sum) {
      return [sum](int64_t r, int64_t c) { return rounded<T>(sum(r, c)); };
    };
    {
      Rows<T> y(20, n);
      engine().sum({.rows = of.args(x, y)});
      y.expect(0, to_t(sums(plain)));
    }
    {
      Rows<T> y(20, n);
      engine().sum({.rows = of.args(x, y), .mean = true});
      y.expect(0, mean);
    }
    {
      Rows<T> y(20, n);
      engine().sum({.rows = of.args(x, y), .weighted = true});
      y.expect(0, to_t(sums(weighted)));
    }
    {
      Rows<T> y(20, n);
      engine().sum({.rows = of.args(x, y), .scales = scales.data()});
      y.expect(0, to_t(sums(scaled)));
    }
    {
      Rows<T> y(20, n);
      engine().sum_in_double({.rows = of.args(x, y), .mean = true});
      y.expect(0, to_t(sums(plain, true)));
    }
    {
      Rows<double> y(20, n);
      engine().sum_to_double(of.args(x, y));
      y.expect(0, sums(plain));
    }
  });
}

// Sums in double of floats as they come: subnormal, infinite and NaN results, ties of the result's
// dtype and what lies just beside them.
TEST_P(RowEngineTest, sums_in_double_are_rounded_once) {
  for_widths([&]<class T>(Type<T>, int n) {
    if (n > 33) return;
    const Rows<T> x(x_rows, n, [&] {
      if (random() % 50 == 0) return random() % 2 == 0 ? infinity : 0.0;
      return std::ldexp(draw(), static_cast<int>(random() % 30) - 20);
    });
    for (int repeat = 0; repeat < 20; ++repeat) {
      const Lists<Sum<T>> of(20, random, [&] {
        const int exponent = -static_cast<int>(random() % 24);
        return draw() + std::ldexp(draw(), exponent);
      });
      Rows<T> y(20, n);
      engine().sum_in_double({.rows = of.args(x, y), .weighted = true});
      y.expect(0, [&](int64_t r, int64_t c) {
        double sum = 0;
        for (size_t i = 0; i < of.rows[r].size(); ++i) {
          sum = std::fma(x.at(of.rows[r][i], c), of.factors[r][i], sum);
        }
        return rounded<T>(sum);
      });
    }
  });
}

TEST_P(RowEngineTest, every_16_bit_value_comes_and_goes) {
  if (size_of(engine().dtype) != 2) GTEST_SKIP() << "for 16-bit floats";
  for_widths([&]<class T>(Type<T>, int n) {
    if constexpr (sizeof(T) == 2) {
      Rows<T> x(0x10000 / n + 1, n);
      std::vector<int32_t> numbers(0x10000 / n + 1);
      std::vector<RowList> lists;
      for (int64_t r = 0; r < std::ssize(numbers); ++r) {
        numbers[r] = static_cast<int32_t>(r);
        lists.push_back({.rows = &numbers[r], .count = 1});
        for (int64_t c = 0; c < n; ++c) {
          x.values[r * x.stride + c].bits = static_cast<uint16_t>(r * n + c);
        }
      }
      for (const auto run : {engine().sum, engine().sum_in_double}) {
        Rows<T> y(std::ssize(numbers), n);
        run({.rows = {.x = x.values.data(),
                      .x_stride = x.stride,
                      .n = n,
                      .lists = lists.data(),
                      .rows = static_cast<int>(lists.size()),
                      .y = y.values.data(),
                      .y_stride = y.stride}});
        y.expect(0, [&](int64_t r, int64_t c) { return x.at(r, c); });
      }
    }
  });
}

TEST_P(RowEngineTest, the_first_of_the_best_is_picked) {
  for_widths([&]<class T>(Type<T>, int n) {
    const Rows<T> x(x_rows, n, [&] {
      const double special[] = {nan_value, infinity, -infinity, -0.0, 0.0};
      return random() % 8 == 0 ? special[random() % 5] : draw();
    });
    const Lists<Sum<T>> of(20, random, [] { return 0.0; });
    for (const bool smallest : {false, true}) {
      SCOPED_TRACE(smallest ? "smallest" : "largest");
      const auto best = [&](int64_t r, int64_t c) {
        int32_t won = -1;
        for (const int32_t row : of.rows[r]) {
          const double value = x.at(row, c);
          const double held = won < 0 ? 0 : x.at(won, c);
          const bool better = smallest ? value < held : value > held;
          if (won < 0 || (!std::isnan(held) && (std::isnan(value) || better))) won = row;
        }
        return won;
      };
      const auto value = [&](int64_t r, int64_t c) {
        const int32_t row = best(r, c);
        return row < 0 ? 0 : x.at(row, c);
      };
      std::vector<int32_t> winners(static_cast<size_t>(20 * n), -7);
      for (int32_t* to : {static_cast<int32_t*>(nullptr), winners.data()}) {
        Rows<T> y(20, n);
        engine().pick({.rows = of.args(x, y), .smallest = smallest, .winners = to});
        y.expect(0, value);
        for (int64_t r = 0; r < 20; ++r) {
          for (int64_t c = 0; c < n; ++c) {
            if (!of.rows[r].empty()) continue;
            ASSERT_FALSE(std::signbit(y.at(r, c))) << "row " << r << ", column " << c;
          }
        }
      }
      for (int64_t i = 0; i < std::ssize(winners); ++i) {
        ASSERT_EQ(winners[i], best(i / n, i % n)) << "row " << i / n << ", column " << i % n;
      }
    }
  });
}

TEST_P(RowEngineTest, what_a_row_has_won_is_added) {
  for_widths([&]<class T>(Type<T>, int n) {
    constexpr int first = 100;
    const Rows<T> x = drawn<T>(x_rows, n);
    std::vector<int32_t> winners(static_cast<size_t>(x_rows * n));
    for (int32_t& winner : winners) winner = first - 1 + static_cast<int32_t>(random() % 22);
    const Lists<Sum<T>> of(20, random, [] { return 0.0; });
    Rows<T> y(20, n);
    engine().sum_won({.rows = of.args(x, y), .winners = winners.data(), .first = first});
    y.expect(0, [&](int64_t r, int64_t c) {
      double sum = 0;
      for (const int32_t row : of.rows[r]) {
        if (winners[int64_t{row} * n + c] == first + r) sum += x.at(row, c);
      }
      return rounded<T>(sum);
    });
  });
}

TEST_P(RowEngineTest, dots_equal_double_sums) {
  for_tables([&]<class T>(Type<T>, int n, const Table& table, int first) {
    const Rows<T> x = drawn<T>(x_rows, n);
    const Rows<T> dy = drawn<T>(table.rows, n);
    // [rows, taps] here.
    std::vector<Sum<T>> dots(table.numbers.size(), 7);
    engine().dot({.x = x.values.data(),
                  .x_stride = x.stride,
                  .x_rows = x_rows,
                  .dy = dy.values.data(),
                  .dy_stride = dy.stride,
                  .n = n,
                  .numbers = table.numbers.data(),
                  .taps = table.taps,
                  .first = first,
                  .last = table.rows,
                  .dots = dots.data()});
    for (int64_t i = 0; i < std::ssize(dots); ++i) {
      const int64_t r = i / table.taps;
      const int32_t row = table.numbers[i];
      double sum = r < first ? 7 : 0;
      for (int64_t c = 0; r >= first && row >= 0 && row < x_rows && c < n; ++c) {
        sum += x.at(row, c) * dy.at(r, c);
      }
      ASSERT_EQ(dots[i], sum) << "row " << r << ", tap " << i % table.taps;
    }
  });
}

INSTANTIATE_TEST_SUITE_P(engines,
                         RowEngineTest,
                         testing::ValuesIn(row_engines().begin(), row_engines().end()),
                         [](const auto& info) {
                           return std::string(name(info.param->dtype)) + "_" + info.param->isa;
                         });

}  // namespace
}  // namespace voxgemm::cpu
