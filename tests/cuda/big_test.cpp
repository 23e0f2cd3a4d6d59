// SPDX-License-Identifier: Apache-2.0
// Sizes past 32 bits: 2.5e9 feature elements, and a map of more than 2^31 entries (100 million
// voxels). The clouds are full boxes in raster order, so that the row of every voxel is known;
// single rows of the results are compared with sums in double.
#include "cuda/device.h"
#include "cuda/gpu.h"

namespace voxgemm::test {
namespace {

using Big = OnGpu;

// A box of edge^3 voxels and a value for every feature that needs no table.
struct Box {
  int edge;
  int channels;

  int64_t rows() const { return int64_t{edge} * edge * edge; }
  int64_t row(int x, int y, int z) const {
    const auto inside = [&](int v) { return v >= 0 && v < edge; };
    return inside(x) && inside(y) && inside(z) ? (int64_t{x} * edge + y) * edge + z : -1;
  }
  // Exact in bf16, between -1 and 1.
  static double value(int64_t row, int channel) {
    const uint64_t mixed =
        (static_cast<uint64_t>(row) * 0x9e3779b97f4a7c15u + channel) * 0xbf58476d1ce4e5b9u;
    return static_cast<double>(static_cast<int>(mixed >> 59) - 16) / 16;
  }
};

Matrix coords_of(const Context& ctx, const Box& box) {
  Matrix host = make_matrix(context(), box.rows(), 4, Dtype::i32);
  parallel_for(context(), box.edge, [&](int64_t x, int) {
    for (int y = 0; y < box.edge; ++y) {
      for (int z = 0; z < box.edge; ++z) {
        auto* c = host.row<int32_t>(box.row(static_cast<int>(x), y, z));
        c[0] = 0;
        c[1] = static_cast<int32_t>(x);
        c[2] = y;
        c[3] = z;
      }
    }
  });
  return to_device(ctx, host);
}

Matrix features_of(const Context& ctx, const Box& box) {
  Matrix host = make_matrix(context(), box.rows(), box.channels, Dtype::bf16);
  parallel_for(context(), box.edge, [&](int64_t x, int) {
    const int64_t slab = box.rows() / box.edge;
    for (int64_t r = x * slab; r < (x + 1) * slab; ++r) {
      for (int c = 0; c < box.channels; ++c) {
        store(static_cast<float>(Box::value(r, c)), host.row<Bfloat16>(r)[c]);
      }
    }
  });
  return to_device(ctx, host);
}

// One row of a matrix of the device.
std::vector<double> row_of(const Context& ctx, const MatrixRef& m, int64_t row) {
  MatrixRef one = m;
  one.data = m.row<char>(0) + row * m.stride * size_of(m.dtype);
  one.rows = 1;
  const Matrix host = to_host(ctx, one);
  std::vector<double> values;
  for (int64_t c = 0; c < m.cols; ++c) values.push_back(to_float(host.as<Bfloat16>()[c]));
  return values;
}

struct Sample {
  int x, y, z;
};

// y[o][n] = sum over taps and k of x[in][k] * w[tap][k][n], with w a value as well; backward:
// dx[i][n] = sum of dy[out][k] * w[tap][n][k] with the voxel in = out + tap - 1.
void expect_row(
    const Context& ctx, const Box& box, const MatrixRef& y, const Sample& at, bool backward) {
  const int sign = backward ? -1 : 1;
  const auto actual = row_of(ctx, y, box.row(at.x, at.y, at.z));
  for (int n = 0; n < box.channels; n += 7) {
    Sums sums{.values = {0}, .magnitudes = {0}, .terms = {27.0 * box.channels}};
    for (int tap = 0; tap < 27; ++tap) {
      const int64_t in = box.row(at.x + sign * (tap / 9 - 1), at.y + sign * (tap / 3 % 3 - 1),
                                 at.z + sign * (tap % 3 - 1));
      for (int k = 0; in >= 0 && k < box.channels; ++k) {
        const int row = backward ? n : k;
        const int col = backward ? k : n;
        const double product =
            Box::value(in, k) * Box::value(int64_t{tap} * box.channels + row, col);
        sums.values[0] += product;
        sums.magnitudes[0] += std::fabs(product);
      }
    }
    EXPECT_TRUE(within_bound({actual[n]}, sums, {Dtype::f32, Dtype::bf16}))
        << "voxel " << at.x << " " << at.y << " " << at.z << " channel " << n;
  }
}

// Whether the gradient of a row is one, else zero.
bool counts(int64_t row) { return Box::value(row, 0) == 0; }

// With x all ones the weight gradient counts the pairs of the rows of dy that are one: whole
// numbers below 2^24, so that any order of sums is exact. x is overwritten.
void expect_counts(
    const Context& ctx, const Box& box, const MatrixRef& x, const WeightsRef& w, Plan* plan) {
  Matrix host = make_matrix(context(), box.rows(), box.channels, Dtype::bf16);
  constexpr uint16_t one = 0x3f80;
  std::fill_n(host.as<uint16_t>(), box.rows() * box.channels, one);
  copy(ctx, host, x);
  std::vector<std::array<int64_t, 27>> expected(box.edge);
  parallel_for(context(), box.edge, [&](int64_t slab, int) {
    const int px = static_cast<int>(slab);
    for (int py = 0; py < box.edge; ++py) {
      for (int pz = 0; pz < box.edge; ++pz) {
        const int64_t row = box.row(px, py, pz);
        std::fill_n(host.row<uint16_t>(row), box.channels, counts(row) ? one : uint16_t{0});
        for (int tap = 0; counts(row) && tap < 27; ++tap) {
          const bool present =
              box.row(px + tap / 9 - 1, py + tap / 3 % 3 - 1, pz + tap % 3 - 1) >= 0;
          expected[slab][tap] += present ? 1 : 0;
        }
      }
    }
  });
  const Matrix dy = to_device(ctx, host);
  const Matrix dw = make_matrix(ctx, int64_t{27} * box.channels, box.channels, Dtype::f32);
  WeightsRef result = w;
  result.data = dw.data;
  result.dtype = Dtype::f32;
  plan->grad_weight(ctx, x, dy, result);
  const Matrix found = to_host(ctx, dw);
  for (int tap = 0; tap < 27; ++tap) {
    int64_t pairs = 0;
    for (const auto& of_slab : expected) pairs += of_slab[tap];
    ASSERT_LT(pairs, int64_t{1} << 24);
    for (int64_t i = 0; i < int64_t{box.channels} * box.channels; ++i) {
      ASSERT_EQ(found.as<float>()[int64_t{tap} * box.channels * box.channels + i], pairs)
          << "tap " << tap << " element " << i;
    }
  }
}

void run_box(const Box& box) {
  const Context& ctx = *gpu();
  const Matrix coords = coords_of(ctx, box);
  KernelMap map = build_submanifold_map(ctx, coords, Geometry::submanifold({3, 3, 3}));
  settle(ctx, &map);
  const int64_t inner = int64_t{3} * box.edge - 2;
  EXPECT_EQ(map.pairs(ctx), inner * inner * inner);
  EXPECT_TRUE(map.in_first.empty());
  const Matrix x = features_of(ctx, box);
  Matrix host = make_matrix(context(), 27 * box.channels, box.channels, Dtype::bf16);
  for (int64_t r = 0; r < host.rows; ++r) {
    for (int n = 0; n < box.channels; ++n) {
      store(static_cast<float>(Box::value(r, n)), host.row<Bfloat16>(r)[n]);
    }
  }
  const Matrix w = to_device(ctx, host);
  const WeightsRef w_ref = {.data = w.data,
                            .taps = 27,
                            .c_in = box.channels,
                            .c_out = box.channels,
                            .tap_stride = int64_t{box.channels} * box.channels,
                            .in_stride = box.channels,
                            .out_stride = 1,
                            .dtype = Dtype::bf16,
                            .device = ctx.device};
  Plan plan =
      Plan::make(ctx, map, {.c_in = box.channels, .c_out = box.channels, .dtype = Dtype::bf16});
  const Matrix y = make_matrix(ctx, box.rows(), box.channels, Dtype::bf16);
  plan.forward(ctx, x, w_ref, {}, y);
  const int last = box.edge - 1;
  const int middle = box.edge / 2;
  for (const Sample& at : {Sample{0, 0, 0}, Sample{last, last, last}, Sample{middle, 3, last},
                           Sample{last, middle, 5}, Sample{last - 1, last - 1, last - 1}}) {
    expect_row(ctx, box, y, at, false);
  }
  // Of a symmetric map grad_input is a forward with mirrored taps and transposed weights.
  plan.grad_input(ctx, x, w_ref, y);
  for (const Sample& at : {Sample{0, 0, 0}, Sample{last, last, last}, Sample{middle, 3, last}}) {
    expect_row(ctx, box, y, at, true);
  }
  expect_counts(ctx, box, x, w_ref, &plan);
}

// Whether the device has so many free bytes.
bool has_memory(double bytes) {
  size_t free = 0;
  size_t total = 0;
  return cudaMemGetInfo(&free, &total) == cudaSuccess && static_cast<double>(free) > bytes;
}

TEST_F(Big, MoreThan31BitsOfFeatures) {
  if (!has_memory(40e9)) GTEST_SKIP() << "needs 40 GB of device memory";
  run_box({.edge = 272, .channels = 128});
}

TEST_F(Big, MoreThan31BitsOfNeighbours) {
  if (!has_memory(80e9)) GTEST_SKIP() << "needs 80 GB of device memory";
  run_box({.edge = 464, .channels = 16});
}

}  // namespace
}  // namespace voxgemm::test
