// SPDX-License-Identifier: Apache-2.0
// Every engine that this CPU runs. Operands are multiples of 1/64 in [-2, 2]: all dtypes hold them,
// and sums of up to 129 products are exact in f32, so results must equal the double sums to the
// bit. Buffers have exactly the promised sizes, so the address sanitizer sees any access past them.

#include "cpu/engine.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <new>
#include <random>
#include <set>
#include <string>
#include <vector>

namespace voxgemm::cpu {
namespace {

constexpr int widths[] = {1, 3, 6, 15, 16, 17, 32, 33, 48, 64, 96, 100, 129};
constexpr int pair_counts[] = {0, 1, 2, 5, 11, 12, 13, 31, 64, 128};
constexpr int most_pairs = 128;

const char* dtype_name(Dtype dtype) {
  return dtype == Dtype::f32 ? "f32" : dtype == Dtype::bf16 ? "bf16" : "f16";
}

float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// f16 as the standard defines it, one case at a time.
double decode_f16(uint16_t bits) {
  const int exponent = bits >> 10 & 31;
  const int fraction = bits & 1023;
  double value;
  if (exponent == 31) {
    value = fraction == 0 ? std::numeric_limits<double>::infinity()
                          : std::numeric_limits<double>::quiet_NaN();
  } else if (exponent == 0) {
    value = std::ldexp(fraction, -24);
  } else {
    value = std::ldexp(fraction + 1024, exponent - 25);
  }
  return (bits & 0x8000) != 0 ? -value : value;
}

double decode_16(uint16_t bits, Dtype dtype) {
  return dtype == Dtype::bf16 ? float_of(static_cast<uint32_t>(bits) << 16) : decode_f16(bits);
}

// The nearest 16-bit value, ties to even, by search among all of them: they are ordered like their
// bits.
uint16_t nearest_16(double value, Dtype dtype) {
  const double magnitude = std::fabs(value);
  const uint16_t infinity = dtype == Dtype::bf16 ? 0x7f80 : 0x7c00;
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  uint16_t low = 0;
  uint16_t high = infinity;
  while (high - low > 1) {
    const uint16_t middle = (low + high) / 2;
    (decode_16(middle, dtype) <= magnitude ? low : high) = middle;
  }
  if (std::isinf(magnitude)) return sign | infinity;
  // The step past the largest finite value counts as one more of the same size.
  const double below = decode_16(low, dtype);
  const double above =
      high == infinity ? below + (below - decode_16(low - 1, dtype)) : decode_16(high, dtype);
  const double half = below + (above - below) / 2;
  if (magnitude < half || (magnitude == half && low % 2 == 0)) return sign | low;
  return sign | high;
}

// A buffer of exactly n elements of a dtype.
class Elements {
 public:
  Elements(Dtype dtype, int64_t n) : dtype_(dtype), bytes_(n * size_of(dtype)) {}
  void* data() { return bytes_.data(); }
  void set(int64_t index, double value) {
    if (dtype_ == Dtype::f32) {
      reinterpret_cast<float*>(bytes_.data())[index] = static_cast<float>(value);
    } else {
      reinterpret_cast<uint16_t*>(bytes_.data())[index] =
          std::isnan(value) ? 0x7fff : nearest_16(value, dtype_);
    }
  }
  double get(int64_t index) const {
    if (dtype_ == Dtype::f32) return reinterpret_cast<const float*>(bytes_.data())[index];
    return decode_16(reinterpret_cast<const uint16_t*>(bytes_.data())[index], dtype_);
  }

 private:
  Dtype dtype_;
  std::vector<char> bytes_;
};

// Memory as the drivers give it: aligned to 64, and no byte longer than asked for.
class Aligned {
 public:
  explicit Aligned(size_t bytes) : data_(::operator new (bytes, std::align_val_t{64})) {
    std::memset(data_, 0xff, bytes);  // NaN in every dtype
  }
  ~Aligned() { ::operator delete (data_, std::align_val_t{64}); }
  Aligned(const Aligned&) = delete;
  Aligned& operator=(const Aligned&) = delete;
  void* data() { return data_; }

 private:
  void* data_;
};

using Random = std::mt19937;

double small_multiple(Random& random) {
  return static_cast<double>(static_cast<int>(random() % 257) - 128) / 64;
}

// Full significands, so that the order of roundings shows in the last bits.
double any_value(Random& random) { return std::normal_distribution<double>()(random); }

int round_up(int value, int unit) { return (value + unit - 1) / unit * unit; }

constexpr double nan_value = std::numeric_limits<double>::quiet_NaN();

// `count` distinct rows out of `rows`, in random order.
std::vector<int32_t> distinct_rows(Random& random, int count, int rows) {
  std::vector<int32_t> all(rows);
  for (int i = 0; i < rows; ++i) all[i] = i;
  std::shuffle(all.begin(), all.end(), random);
  return {all.begin(), all.begin() + count};
}

using Draw = double (*)(Random&);

struct Shape {
  int rows;
  int cols;
  int gap = 0;  // between rows
  int64_t stride() const { return cols + gap; }
  int64_t size() const { return (rows - 1) * stride() + cols; }
};

// A matrix of which only `used` rows may be read: all else, gaps between rows too, is NaN.
struct Operand {
  Operand(const Shape& shape, Dtype dtype)
      : cols(shape.cols), stride(shape.stride()), values(dtype, shape.size()) {
    for (int64_t i = 0; i < shape.size(); ++i) values.set(i, nan_value);
  }
  void draw(Random& random, Draw value, const std::vector<int32_t>& used) {
    for (const int row : used) {
      for (int c = 0; c < cols; ++c) values.set(row * stride + c, value(random));
    }
  }
  double at(int row, int col) const { return values.get(row * stride + col); }
  int cols;
  int64_t stride;
  Elements values;
};

enum class Contiguous { k, n };

// W [k, n] and its packed form.
struct Weights {
  Weights(const Engine& engine, int k, int n, Contiguous contiguous)
      : k_stride(contiguous == Contiguous::k ? 1 : n),
        n_stride(contiguous == Contiguous::k ? k : 1),
        size(int64_t{k} * n),
        values(engine.dtype, size),
        packed(engine.packed_bytes(k, n)) {}
  void draw(const Engine& engine, Random& random, Draw value, const Shape& shape) {
    for (int64_t i = 0; i < size; ++i) values.set(i, value(random));
    engine.pack({.weights = values.data(),
                 .k_stride = k_stride,
                 .n_stride = n_stride,
                 .k = shape.rows,
                 .n = shape.cols,
                 .packed = packed.data()});
  }
  double at(int r, int c) const { return values.get(r * k_stride + c * n_stride); }
  int64_t k_stride;
  int64_t n_stride;
  int64_t size;
  Elements values;
  Aligned packed;
};

class EngineTest : public testing::TestWithParam<const Engine*> {
 protected:
  void SetUp() override {
    if (!engine.supported()) GTEST_SKIP() << engine.isa << " does not run on this CPU";
  }
  const Engine& engine = *GetParam();
};

// x, W and an accumulator, of which any pairs of rows can be multiplied.
struct Product {
  Product(const Engine& by, Random& random, Draw value, const Shape& x_shape, int cols)
      : engine(by),
        n(cols),
        acc_stride(round_up(cols, by.panel_cols)),
        in_rows(distinct_rows(random, most_pairs, x_shape.rows)),
        acc_rows(distinct_rows(random, most_pairs, acc_count)),
        x(x_shape, engine.dtype),
        w(engine, x_shape.cols, n, n % 2 == 0 ? Contiguous::k : Contiguous::n),
        start(acc_count * acc_stride) {
    x.draw(random, value, in_rows);
    w.draw(engine, random, value, {.rows = x_shape.cols, .cols = n});
    for (float& sum : start) sum = static_cast<float>(value(random));
  }
  // Pairs [first, end) of in_rows and acc_rows.
  void multiply(int first, int end, std::vector<float>& acc, bool begun = false) {
    // Exact copies: a read past the last pair is a read past the end.
    const std::vector<int32_t> in(in_rows.begin() + first, in_rows.begin() + end);
    const std::vector<int32_t> out(acc_rows.begin() + first, acc_rows.begin() + end);
    Aligned scratch(engine.scratch_bytes(x.cols, n));
    engine.multiply({.x = x.values.data(),
                     .x_stride = x.stride,
                     .k = x.cols,
                     .n = n,
                     .packed = w.packed.data(),
                     .in_rows = in.data(),
                     .acc_rows = out.data(),
                     .pairs = end - first,
                     .acc = acc.data(),
                     .acc_stride = acc_stride,
                     .scratch = scratch.data(),
                     .begun = begun});
  }
  double sum(int pair, int col) const {
    double result = 0;
    for (int r = 0; r < x.cols; ++r) result += x.at(in_rows[pair], r) * w.at(r, col);
    return result;
  }
  static constexpr int acc_count = 140;
  const Engine& engine;
  int n;
  int64_t acc_stride;
  std::vector<int32_t> in_rows;
  std::vector<int32_t> acc_rows;
  Operand x;
  Weights w;
  std::vector<float> start;
};

TEST_P(EngineTest, multiply_equals_double_sums) {
  Random random(1);
  for (const int k : widths) {
    for (const int n : widths) {
      Product p(engine, random, small_multiple, {.rows = 150, .cols = k, .gap = k % 3}, n);
      std::vector<float> expected = p.start;
      int done = 0;
      for (const int pairs : pair_counts) {
        for (; done < pairs; ++done) {
          float* row = &expected[p.acc_rows[done] * p.acc_stride];
          for (int c = 0; c < n; ++c) row[c] = static_cast<float>(row[c] + p.sum(done, c));
        }
        std::vector<float> acc = p.start;
        p.multiply(0, pairs, acc);
        for (int64_t i = 0; i < std::ssize(acc); ++i) {
          // Padding columns belong to the engine.
          if (i % p.acc_stride >= n) continue;
          ASSERT_EQ(acc[i], expected[i])
              << "k " << k << ", n " << n << ", pairs " << pairs << ", row " << i / p.acc_stride
              << ", column " << i % p.acc_stride;
        }
      }
    }
  }
}

TEST_P(EngineTest, wide_reductions_too) {
  Random random(2);
  // Multiples of 1/4 up to 1/2 keep 1024 products exact.
  const Draw draw = [](Random& r) { return std::round(small_multiple(r)) / 4; };
  for (const int k : {255, 640, 1024}) {
    const int n = 70;
    const int pairs = 37;
    Product p(engine, random, draw, {.rows = most_pairs, .cols = k}, n);
    std::vector<float> acc = p.start;
    p.multiply(0, pairs, acc);
    for (int i = 0; i < pairs; ++i) {
      const int64_t row = p.acc_rows[i] * p.acc_stride;
      for (int c = 0; c < n; ++c) {
        ASSERT_EQ(acc[row + c], p.start[row + c] + p.sum(i, c))
            << "k " << k << ", pair " << i << ", column " << c;
      }
    }
  }
}

TEST_P(EngineTest, a_row_does_not_depend_on_its_neighbours) {
  Random random(3);
  for (const int k : widths) {
    for (const int n : {1, 17, 33, 64, 100}) {
      Product p(engine, random, any_value, {.rows = most_pairs, .cols = k}, n);
      std::vector<float> together = p.start;
      p.multiply(0, most_pairs, together);
      // Pieces of 1, 2, 3, ... rows: every place in every size of block.
      std::vector<float> apart = p.start;
      engine.begin();
      for (int first = 0, size = 1; first < most_pairs; first += size++) {
        p.multiply(first, std::min(first + size, most_pairs), apart, true);
      }
      engine.end();
      for (int row = 0; row < Product::acc_count; ++row) {
        ASSERT_EQ(std::memcmp(&together[row * p.acc_stride], &apart[row * p.acc_stride],
                              n * sizeof(float)),
                  0)
            << "k " << k << ", n " << n << ", row " << row;
      }
    }
  }
}

// Columns are cut differently for different numbers of threads.
TEST_P(EngineTest, a_column_does_not_depend_on_its_neighbours) {
  Random random(4);
  for (const int k : {16, 17, 33, 64, 300}) {
    const int n = 150;
    Product p(engine, random, any_value, {.rows = most_pairs, .cols = k}, n);
    std::vector<float> together = p.start;
    p.multiply(0, most_pairs, together);
    for (int first = 0, cols = engine.panel_cols; first < n;
         first += cols, cols += engine.panel_cols) {
      cols = std::min(cols, n - first);
      const size_t offset = first * p.w.n_stride * size_of(engine.dtype);
      Aligned packed(engine.packed_bytes(k, cols));
      engine.pack({.weights = static_cast<char*>(p.w.values.data()) + offset,
                   .k_stride = p.w.k_stride,
                   .n_stride = p.w.n_stride,
                   .k = k,
                   .n = cols,
                   .packed = packed.data()});
      std::vector<float> acc = p.start;
      Aligned scratch(engine.scratch_bytes(k, cols));
      engine.multiply({.x = p.x.values.data(),
                       .x_stride = p.x.stride,
                       .k = k,
                       .n = cols,
                       .packed = packed.data(),
                       .in_rows = p.in_rows.data(),
                       .acc_rows = p.acc_rows.data(),
                       .pairs = most_pairs,
                       .acc = acc.data() + first,
                       .acc_stride = p.acc_stride,
                       .scratch = scratch.data()});
      for (const int row : p.acc_rows) {
        ASSERT_EQ(std::memcmp(&together[row * p.acc_stride + first],
                              &acc[row * p.acc_stride + first], cols * sizeof(float)),
                  0)
            << "k " << k << ", columns " << first << " to " << first + cols << ", row " << row;
      }
    }
  }
}

TEST_P(EngineTest, infinite_weights_reach_only_their_products) {
  Random random(5);
  const Draw infinity = [](Random&) { return std::numeric_limits<double>::infinity(); };
  Product p(engine, random, infinity, {.rows = most_pairs, .cols = 20}, 40);
  p.x.draw(
      random, [](Random&) { return 1.0; }, p.in_rows);
  const int pairs = 5;
  std::vector<float> acc(p.start.size());
  p.multiply(0, pairs, acc);
  const std::set<int32_t> present(p.acc_rows.begin(), p.acc_rows.begin() + pairs);
  for (int row = 0; row < Product::acc_count; ++row) {
    const float expected = present.count(row) > 0 ? std::numeric_limits<float>::infinity() : 0.0F;
    for (int c = 0; c < p.n; ++c) ASSERT_EQ(acc[row * p.acc_stride + c], expected);
  }
}

TEST_P(EngineTest, outer_equals_double_sums) {
  Random random(6);
  constexpr int rows = 150;
  for (const int k : widths) {
    for (const int n : widths) {
      const auto x_all = distinct_rows(random, most_pairs, rows);
      const auto dy_all = distinct_rows(random, most_pairs, rows);
      Operand x({.rows = rows, .cols = k, .gap = n % 3}, engine.dtype);
      Operand dy({.rows = rows, .cols = n, .gap = k % 2}, engine.dtype);
      x.draw(random, small_multiple, x_all);
      dy.draw(random, small_multiple, dy_all);
      const int64_t dw_stride = n + n % 4;
      const int64_t dw_size = (k - 1) * dw_stride + n;
      std::vector<double> expected(dw_size);
      for (double& value : expected) value = small_multiple(random);
      const std::vector<float> start(expected.begin(), expected.end());
      int done = 0;
      for (const int pairs : pair_counts) {
        for (; done < pairs; ++done) {
          for (int r = 0; r < k; ++r) {
            for (int c = 0; c < n; ++c) {
              expected[r * dw_stride + c] += x.at(x_all[done], r) * dy.at(dy_all[done], c);
            }
          }
        }
        const std::vector<int32_t> x_rows(x_all.begin(), x_all.begin() + pairs);
        const std::vector<int32_t> dy_rows(dy_all.begin(), dy_all.begin() + pairs);
        std::vector<float> dw = start;
        Aligned scratch(engine.scratch_bytes(k, n));
        const bool begun = pairs % 2 == 0;
        if (begun) engine.begin();
        engine.outer({.x = x.values.data(),
                      .x_stride = x.stride,
                      .dy = dy.values.data(),
                      .dy_stride = dy.stride,
                      .x_rows = x_rows.data(),
                      .dy_rows = dy_rows.data(),
                      .pairs = pairs,
                      .k = k,
                      .n = n,
                      .dw = dw.data(),
                      .dw_stride = dw_stride,
                      .scratch = scratch.data(),
                      .begun = begun});
        if (begun) engine.end();
        for (int64_t i = 0; i < dw_size; ++i) {
          ASSERT_EQ(dw[i], expected[i])
              << "k " << k << ", n " << n << ", pairs " << pairs << ", row " << i / dw_stride
              << ", column " << i % dw_stride;
        }
      }
    }
  }
}

TEST_P(EngineTest, store_adds_the_bias_and_rounds_once) {
  Random random(7);
  const float special[] = {0.0F,
                           -0.0F,
                           1e-8F,
                           -3e-6F,
                           6.1e-5F,
                           65519.0F,
                           65520.0F,
                           -1e30F,
                           3.4e38F,
                           1e-40F,
                           std::numeric_limits<float>::infinity(),
                           -std::numeric_limits<float>::infinity(),
                           1.00390625F,
                           1.01171875F,
                           1.00048828125F,
                           1.00146484375F,
                           0x1p-25F,
                           0x1.8p-24F};
  for (const int n : widths) {
    for (const bool with_bias : {false, true}) {
      const StoreArgs shape{.acc_stride = n + 5, .y_stride = n + 3, .rows = 7, .n = n};
      std::vector<float> acc(shape.rows * shape.acc_stride);
      Elements bias(engine.dtype, n);
      for (int round = 0; round < 6; ++round) {
        for (float& value : acc) {
          // Random exponents reach the subnormal results of f16 too.
          value = random() % 4 == 0 ? special[random() % std::size(special)]
                                    : static_cast<float>(std::ldexp(
                                          any_value(random), static_cast<int>(random() % 40) - 28));
        }
        for (int c = 0; c < n; ++c) bias.set(c, any_value(random));
        Elements y(engine.dtype, static_cast<int>(shape.rows * shape.y_stride));
        for (int i = 0; i < shape.rows * shape.y_stride; ++i) y.set(i, 5.0);
        StoreArgs args = shape;
        args.acc = acc.data();
        args.bias = with_bias ? bias.data() : nullptr;
        args.y = y.data();
        engine.store(args);
        for (int i = 0; i < shape.rows * shape.y_stride; ++i) {
          const int64_t row = i / shape.y_stride;
          const auto c = static_cast<int>(i % shape.y_stride);
          if (c >= n) {
            ASSERT_EQ(y.get(i), 5.0) << "past row " << row;
            continue;
          }
          const float value = acc[row * shape.acc_stride + c];
          const float sum = with_bias ? value + static_cast<float>(bias.get(c)) : value;
          Elements expected(engine.dtype, 1);
          expected.set(0, sum);
          ASSERT_EQ(y.get(i), expected.get(0))
              << "n " << n << ", row " << row << ", column " << c << ", sum " << sum;
        }
      }
    }
  }
  const float nans[] = {float_of(0x7f800001), float_of(0x7fffffff), float_of(0xffc00000)};
  Elements y(engine.dtype, 3);
  engine.store({.acc = nans, .acc_stride = 3, .y = y.data(), .y_stride = 3, .rows = 1, .n = 3});
  for (int c = 0; c < 3; ++c) EXPECT_TRUE(std::isnan(y.get(c)));
}

TEST_P(EngineTest, every_16_bit_value_is_read_and_written_as_it_is) {
  if (engine.dtype == Dtype::f32) return;
  Elements values(engine.dtype, 1 << 16);
  auto* bits = static_cast<uint16_t*>(values.data());
  for (int i = 0; i < 1 << 16; ++i) bits[i] = static_cast<uint16_t>(i);
  const std::vector<float> zeros(1 << 16, -0.0F);
  Elements y(engine.dtype, 1 << 16);
  engine.store({.acc = zeros.data(),
                .acc_stride = 1 << 16,
                .bias = values.data(),
                .y = y.data(),
                .y_stride = 1 << 16,
                .rows = 1,
                .n = 1 << 16});
  for (int i = 0; i < 1 << 16; ++i) {
    if (std::isnan(values.get(i))) {
      EXPECT_TRUE(std::isnan(y.get(i))) << i;
    } else {
      EXPECT_EQ(static_cast<uint16_t*>(y.data())[i], i);
    }
  }
}

TEST_P(EngineTest, compact_keeps_present_rows_in_order) {
  Random random(8);
  for (int n = 0; n <= 200; ++n) {
    for (const unsigned density : {0U, 1U, 4U, 8U}) {
      std::vector<int32_t> indices(n);
      for (int32_t& index : indices)
        index = random() % 8 < density ? static_cast<int32_t>(random() >> 1) : -1;
      std::vector<int32_t> in_rows(n + 16);
      std::vector<int32_t> positions(n + 16);
      const int found = engine.compact(indices.data(), n, 1000, in_rows.data(), positions.data());
      int expected = 0;
      for (int i = 0; i < n; ++i) {
        if (indices[i] < 0) continue;
        ASSERT_LT(expected, found);
        ASSERT_EQ(in_rows[expected], indices[i]);
        ASSERT_EQ(positions[expected], 1000 + i);
        ++expected;
      }
      ASSERT_EQ(found, expected);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(engines,
                         EngineTest,
                         testing::ValuesIn(engines().begin(), engines().end()),
                         [](const auto& info) {
                           return std::string(info.param->isa) + "_" +
                                  std::string(dtype_name(info.param->dtype));
                         });

TEST(engines, every_dtype_has_one_that_runs_everywhere) {
  for (const Dtype dtype : {Dtype::f32, Dtype::bf16, Dtype::f16}) {
    const Engine* last = nullptr;
    std::set<std::string> isas;
    for (const Engine* engine : engines()) {
      if (engine->dtype != dtype) continue;
      EXPECT_TRUE(isas.insert(engine->isa).second) << engine->isa << " stands in the list twice";
      last = engine;
    }
    ASSERT_NE(last, nullptr);
    EXPECT_STREQ(last->isa, "portable");
    EXPECT_TRUE(last->supported());
  }
}

}  // namespace
}  // namespace voxgemm::cpu
