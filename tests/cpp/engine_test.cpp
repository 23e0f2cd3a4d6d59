// SPDX-License-Identifier: Apache-2.0
// Every engine that this CPU runs. Operands are multiples of 1/64 in [-2, 2]: all dtypes hold them, and sums
// of up to 129 products are exact in f32, so results must equal the double sums to the bit. Buffers have
// exactly the promised sizes, so the address sanitizer sees any access past them.

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

double decode(const void* data, int64_t index, Dtype dtype) {
  if (dtype == Dtype::f32) return static_cast<const float*>(data)[index];
  const uint16_t bits = static_cast<const uint16_t*>(data)[index];
  return dtype == Dtype::bf16 ? float_of(static_cast<uint32_t>(bits) << 16) : decode_f16(bits);
}

// The nearest 16-bit value, ties to even, by search among all of them: they are ordered like their bits.
uint16_t nearest_16(double value, Dtype dtype) {
  const double magnitude = std::fabs(value);
  const uint16_t infinity = dtype == Dtype::bf16 ? 0x7f80 : 0x7c00;
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  uint16_t low = 0;
  uint16_t high = infinity;
  while (high - low > 1) {
    const uint16_t middle = (low + high) / 2;
    (decode(&middle, 0, dtype) <= magnitude ? low : high) = middle;
  }
  if (std::isinf(magnitude)) return sign | infinity;
  // The step past the largest finite value counts as one more of the same size.
  const double below = decode(&low, 0, dtype);
  const uint16_t before = low - 1;
  const double above = high == infinity ? below + (below - decode(&before, 0, dtype))
                                        : decode(&high, 0, dtype);
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
  double get(int64_t index) const { return decode(bytes_.data(), index, dtype_); }

 private:
  Dtype dtype_;
  std::vector<char> bytes_;
};

// Memory as the drivers give it: aligned to 64, and no byte longer than asked for.
class Aligned {
 public:
  explicit Aligned(size_t bytes) : data_(::operator new(bytes, std::align_val_t{64})) {
    std::memset(data_, 0xff, bytes);  // NaN in every dtype
  }
  ~Aligned() { ::operator delete(data_, std::align_val_t{64}); }
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

// A [rows, cols] matrix of which only `used` rows may be read: all else, gaps between rows too, is NaN.
struct Operand {
  Operand(Random& random, Draw draw, Dtype dtype, int rows_, int cols_, int gap,
          const std::vector<int32_t>& used)
      : cols(cols_), stride(cols_ + gap), values(dtype, int64_t{rows_ - 1} * stride + cols_) {
    for (int64_t i = 0; i < int64_t{rows_ - 1} * stride + cols; ++i) values.set(i, nan_value);
    for (const int row : used) {
      for (int c = 0; c < cols; ++c) values.set(row * stride + c, draw(random));
    }
  }
  double at(int row, int col) const { return values.get(row * stride + col); }
  int cols;
  int64_t stride;
  Elements values;
};

// W [k, n] with either of its strides 1, and its packed form.
struct Weights {
  Weights(const Engine& engine, Random& random, Draw draw, int k, int n, bool in_contiguous)
      : k_stride(in_contiguous ? 1 : n),
        n_stride(in_contiguous ? k : 1),
        values(engine.dtype, int64_t{k} * n),
        packed(engine.packed_bytes(k, n)) {
    for (int64_t i = 0; i < int64_t{k} * n; ++i) values.set(i, draw(random));
    engine.pack({.weights = values.data(), .k_stride = k_stride, .n_stride = n_stride, .k = k, .n = n,
                 .packed = packed.data()});
  }
  double at(int r, int c) const { return values.get(r * k_stride + c * n_stride); }
  int64_t k_stride;
  int64_t n_stride;
  Elements values;
  Aligned packed;
};

class EngineTest : public testing::TestWithParam<const Engine*> {
 protected:
  void SetUp() override {
    if (!engine.supported()) GTEST_SKIP() << engine.isa << " does not run on this CPU";
  }
  void multiply(Operand& x, Weights& w, int n, const std::vector<int32_t>& in_rows,
                const std::vector<int32_t>& acc_rows, std::vector<float>& acc, int64_t acc_stride) {
    Aligned scratch(engine.scratch_bytes(x.cols, n));
    engine.multiply({.x = x.values.data(), .x_stride = x.stride, .k = x.cols, .n = n,
                     .packed = w.packed.data(), .in_rows = in_rows.data(),
                     .acc_rows = acc_rows.data(), .pairs = static_cast<int>(in_rows.size()),
                     .acc = acc.data(), .acc_stride = acc_stride, .scratch = scratch.data()});
  }
  const Engine& engine = *GetParam();
};

TEST_P(EngineTest, multiply_equals_double_sums) {
  Random random(1);
  constexpr int x_rows = 150;
  constexpr int acc_count = 140;
  for (const int k : widths) {
    for (const int n : widths) {
      const auto in_all = distinct_rows(random, most_pairs, x_rows);
      const auto acc_all = distinct_rows(random, most_pairs, acc_count);
      Operand x(random, small_multiple, engine.dtype, x_rows, k, k % 3, in_all);
      Weights w(engine, random, small_multiple, k, n, n % 2 == 0);
      const int64_t acc_stride = round_up(n, engine.panel_cols);
      std::vector<float> start(acc_count * acc_stride);
      for (float& value : start) value = static_cast<float>(small_multiple(random));
      std::vector<double> product(most_pairs * n);
      for (int i = 0; i < most_pairs; ++i) {
        for (int c = 0; c < n; ++c) {
          for (int r = 0; r < k; ++r) product[i * n + c] += x.at(in_all[i], r) * w.at(r, c);
        }
      }
      for (const int pairs : pair_counts) {
        const std::vector<int32_t> in_rows(in_all.begin(), in_all.begin() + pairs);
        const std::vector<int32_t> acc_rows(acc_all.begin(), acc_all.begin() + pairs);
        std::vector<float> acc = start;
        multiply(x, w, n, in_rows, acc_rows, acc, acc_stride);
        std::vector<float> expected = start;
        for (int i = 0; i < pairs; ++i) {
          for (int c = 0; c < n; ++c) {
            expected[acc_rows[i] * acc_stride + c] += static_cast<float>(product[i * n + c]);
          }
        }
        for (int row = 0; row < acc_count; ++row) {
          for (int c = 0; c < n; ++c) {
            ASSERT_EQ(acc[row * acc_stride + c], expected[row * acc_stride + c])
                << "k " << k << ", n " << n << ", pairs " << pairs << ", row " << row << ", column " << c;
          }
        }
      }
    }
  }
}

TEST_P(EngineTest, wide_reductions_too) {
  Random random(2);
  for (const int k : {255, 640, 1024}) {
    const int n = 70;
    const int pairs = 37;
    const auto rows = distinct_rows(random, pairs, pairs);
    // Multiples of 1/4 up to 1/2 keep 1024 products exact.
    const Draw draw = [](Random& r) { return std::round(small_multiple(r)) / 4; };
    Operand x(random, draw, engine.dtype, pairs, k, 0, rows);
    Weights w(engine, random, draw, k, n, true);
    const int64_t acc_stride = round_up(n, engine.panel_cols);
    std::vector<float> acc(pairs * acc_stride);
    multiply(x, w, n, rows, rows, acc, acc_stride);
    for (int row = 0; row < pairs; ++row) {
      for (int c = 0; c < n; ++c) {
        double expected = 0;
        for (int r = 0; r < k; ++r) expected += x.at(row, r) * w.at(r, c);
        ASSERT_EQ(acc[row * acc_stride + c], expected) << "k " << k << ", row " << row << ", column " << c;
      }
    }
  }
}

TEST_P(EngineTest, a_row_does_not_depend_on_its_neighbours) {
  Random random(3);
  for (const int k : widths) {
    for (const int n : {1, 17, 33, 64, 100}) {
      const auto in_rows = distinct_rows(random, most_pairs, most_pairs);
      const auto acc_rows = distinct_rows(random, most_pairs, most_pairs);
      Operand x(random, any_value, engine.dtype, most_pairs, k, 0, in_rows);
      Weights w(engine, random, any_value, k, n, true);
      const int64_t acc_stride = round_up(n, engine.panel_cols);
      std::vector<float> start(most_pairs * acc_stride);
      for (float& value : start) value = static_cast<float>(any_value(random));
      std::vector<float> together = start;
      multiply(x, w, n, in_rows, acc_rows, together, acc_stride);
      // Pieces of 1, 2, 3, ... rows: every place in every size of block.
      std::vector<float> apart = start;
      int first = 0;
      for (int size = 1; first < most_pairs; ++size) {
        const int last = std::min(first + size, most_pairs);
        multiply(x, w, n, {in_rows.begin() + first, in_rows.begin() + last},
                 {acc_rows.begin() + first, acc_rows.begin() + last}, apart, acc_stride);
        first = last;
      }
      for (int row = 0; row < most_pairs; ++row) {
        ASSERT_EQ(std::memcmp(&together[row * acc_stride], &apart[row * acc_stride], n * sizeof(float)), 0)
            << "k " << k << ", n " << n << ", row " << row;
      }
    }
  }
}

TEST_P(EngineTest, infinite_weights_reach_only_their_products) {
  Random random(4);
  const int k = 20;
  const int n = 40;
  const int pairs = 5;
  const auto rows = distinct_rows(random, pairs, 64);
  Operand x(random, [](Random&) { return 1.0; }, engine.dtype, 64, k, 0, rows);
  Weights w(engine, random, [](Random&) { return std::numeric_limits<double>::infinity(); }, k, n, true);
  const int64_t acc_stride = round_up(n, engine.panel_cols);
  std::vector<float> acc(64 * acc_stride);
  multiply(x, w, n, rows, rows, acc, acc_stride);
  const std::set<int32_t> present(rows.begin(), rows.end());
  for (int row = 0; row < 64; ++row) {
    for (int c = 0; c < n; ++c) {
      const float value = acc[row * acc_stride + c];
      ASSERT_EQ(value, present.count(row) > 0 ? std::numeric_limits<float>::infinity() : 0.0F);
    }
  }
}

TEST_P(EngineTest, outer_equals_double_sums) {
  Random random(5);
  constexpr int rows = 150;
  for (const int k : widths) {
    for (const int n : widths) {
      const auto x_all = distinct_rows(random, most_pairs, rows);
      const auto dy_all = distinct_rows(random, most_pairs, rows);
      Operand x(random, small_multiple, engine.dtype, rows, k, n % 3, x_all);
      Operand dy(random, small_multiple, engine.dtype, rows, n, k % 2, dy_all);
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
        engine.outer({.x = x.values.data(), .x_stride = x.stride, .dy = dy.values.data(),
                      .dy_stride = dy.stride, .x_rows = x_rows.data(), .dy_rows = dy_rows.data(),
                      .pairs = pairs, .k = k, .n = n, .dw = dw.data(), .dw_stride = dw_stride,
                      .scratch = scratch.data()});
        for (int64_t i = 0; i < dw_size; ++i) {
          ASSERT_EQ(dw[i], expected[i]) << "k " << k << ", n " << n << ", pairs " << pairs << ", row "
                                        << i / dw_stride << ", column " << i % dw_stride;
        }
      }
    }
  }
}

TEST_P(EngineTest, store_adds_the_bias_and_rounds_once) {
  Random random(6);
  const float special[] = {0.0F, -0.0F, 1e-8F, -3e-6F, 6.1e-5F, 65519.0F, 65520.0F, -1e30F, 3.4e38F, 1e-40F,
                           std::numeric_limits<float>::infinity(), -std::numeric_limits<float>::infinity(),
                           1.00390625F, 1.01171875F, 1.00048828125F, 1.00146484375F, 0x1p-25F, 0x1.8p-24F};
  for (const int n : widths) {
    for (const bool with_bias : {false, true}) {
      std::vector<float> acc(n);
      Elements bias(engine.dtype, n);
      Elements y(engine.dtype, n);
      for (int round = 0; round < 40; ++round) {
        for (int c = 0; c < n; ++c) {
          // Random exponents reach the subnormal results of f16 too.
          acc[c] = random() % 4 == 0 ? special[random() % std::size(special)]
                                     : static_cast<float>(std::ldexp(any_value(random),
                                                                     static_cast<int>(random() % 40) - 28));
          bias.set(c, any_value(random));
        }
        engine.store({.acc = acc.data(), .bias = with_bias ? bias.data() : nullptr, .y = y.data(), .n = n});
        for (int c = 0; c < n; ++c) {
          const float sum = with_bias ? acc[c] + static_cast<float>(bias.get(c)) : acc[c];
          Elements expected(engine.dtype, 1);
          expected.set(0, sum);
          ASSERT_EQ(y.get(c), expected.get(0)) << "n " << n << ", column " << c << ", sum " << sum;
        }
      }
    }
  }
  const float nans[] = {float_of(0x7f800001), float_of(0x7fffffff), float_of(0xffc00000)};
  Elements y(engine.dtype, 3);
  engine.store({.acc = nans, .bias = nullptr, .y = y.data(), .n = 3});
  for (int c = 0; c < 3; ++c) EXPECT_TRUE(std::isnan(y.get(c)));
}

TEST_P(EngineTest, every_16_bit_value_is_read_and_written_as_it_is) {
  if (engine.dtype == Dtype::f32) return;
  Elements values(engine.dtype, 1 << 16);
  auto* bits = static_cast<uint16_t*>(values.data());
  for (int i = 0; i < 1 << 16; ++i) bits[i] = static_cast<uint16_t>(i);
  const std::vector<float> zeros(1 << 16, -0.0F);
  Elements y(engine.dtype, 1 << 16);
  engine.store({.acc = zeros.data(), .bias = values.data(), .y = y.data(), .n = 1 << 16});
  for (int i = 0; i < 1 << 16; ++i) {
    if (std::isnan(values.get(i))) {
      EXPECT_TRUE(std::isnan(y.get(i))) << i;
    } else {
      EXPECT_EQ(static_cast<uint16_t*>(y.data())[i], i);
    }
  }
}

TEST_P(EngineTest, compact_keeps_present_rows_in_order) {
  Random random(7);
  for (int n = 0; n <= 200; ++n) {
    for (const unsigned density : {0U, 1U, 4U, 8U}) {
      std::vector<int32_t> indices(n);
      for (int32_t& index : indices) index = random() % 8 < density ? static_cast<int32_t>(random() >> 1) : -1;
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

INSTANTIATE_TEST_SUITE_P(engines, EngineTest, testing::ValuesIn(engines().begin(), engines().end()),
                         [](const auto& info) {
                           return std::string(info.param->isa) + "_" + std::string(dtype_name(info.param->dtype));
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
