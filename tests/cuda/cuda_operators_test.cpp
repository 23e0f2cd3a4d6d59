// SPDX-License-Identifier: Apache-2.0
//
// The operators beside convolution on a CUDA device against the CPU's, which their own tests judge.
#include "gpu.h"

#include "support/random_coords.h"
#include "voxgemm/depthwise.h"
#include "voxgemm/hash_table.h"
#include "voxgemm/pooling.h"
#include "voxgemm/sampling.h"
#include "voxgemm/serialize.h"

namespace voxgemm::test {
namespace {

using Operators = OnGpu;

Matrix random_words(Random* random, int64_t rows, Dtype dtype, uint64_t range) {
  const Matrix matrix = make_matrix(context(), rows, 1, dtype);
  for (int64_t r = 0; r < rows; ++r) {
    const uint64_t word = random->bits() % range;
    if (dtype == Dtype::i32) {
      matrix.as<uint32_t>()[r] = static_cast<uint32_t>(word);
    } else {
      matrix.as<uint64_t>()[r] = word;
    }
  }
  return matrix;
}

std::vector<char> bytes(const Context& ctx, const MatrixRef& matrix) {
  const Matrix host = to_host(ctx, matrix);
  const auto* data = host.as<char>();
  return {data, data + host.rows * host.cols * size_of(host.dtype)};
}
std::vector<char> bytes(const MatrixRef& host) {
  const auto* data = host.as<char>();
  return {data, data + host.rows * host.cols * size_of(host.dtype)};
}

TEST_F(Operators, CurvesAreTheCpus) {
  Random random(1);
  for (const int64_t rows : {0, 1, 1000, 70000}) {
    Voxels voxels(rows);
    for (Voxel& v : voxels) {
      for (int32_t& value : v) value = static_cast<int32_t>(random.bits());
    }
    const Matrix host = coords_matrix(context(), voxels);
    const Matrix device = to_device(*gpu(), host);
    for (int curve = 0; curve < curve_count; ++curve) {
      for (const Dtype dtype : {Dtype::i32, Dtype::i64}) {
        const CurveOptions options{.curve = static_cast<Curve>(curve),
                                   .bits = dtype == Dtype::i32 ? 9 : 20,
                                   .axes = {2, 0, 1},
                                   .origin = {-5, 3, 100}};
        const Matrix codes = make_matrix(context(), rows, 1, dtype);
        const Matrix device_codes = make_matrix(*gpu(), rows, 1, dtype);
        curve_encode(context(), host, options, codes);
        curve_encode(*gpu(), device, options, device_codes);
        ASSERT_EQ(bytes(*gpu(), device_codes), bytes(codes));
        const Matrix back = make_matrix(context(), rows, 4, Dtype::i32);
        const Matrix device_back = make_matrix(*gpu(), rows, 4, Dtype::i32);
        curve_decode(context(), codes, options, back);
        curve_decode(*gpu(), device_codes, options, device_back);
        ASSERT_EQ(bytes(*gpu(), device_back), bytes(back));
        const SortedCodes sorted = sort_codes(context(), codes);
        const SortedCodes device_sorted = sort_codes(*gpu(), device_codes);
        ASSERT_EQ(bytes(*gpu(), device_sorted.permutation), bytes(sorted.permutation));
        ASSERT_EQ(bytes(*gpu(), device_sorted.inverse), bytes(sorted.inverse));
      }
    }
  }
}

TEST_F(Operators, HashTablesAreTheCpus) {
  Random random(2);
  for (const Dtype key : {Dtype::i32, Dtype::i64}) {
    for (const Dtype value : {Dtype::i32, Dtype::i64}) {
      constexpr int64_t slots = 30000;
      const Matrix keys = make_matrix(context(), slots, 1, key);
      const Matrix values = make_matrix(context(), slots, 1, value);
      std::memset(keys.data, 0xff, slots * size_of(key));
      std::memset(values.data, 0xff, slots * size_of(value));
      const Matrix device_keys = to_device(*gpu(), keys);
      const Matrix device_values = to_device(*gpu(), values);
      // The table fills up: later inserts fail.
      for (int round = 0; round < 8; ++round) {
        const int64_t rows = round == 3 ? 0 : random.integer(1, 9000);
        const Matrix more = random_words(&random, rows, key, 60000);
        const Matrix more_values = random_words(&random, rows, value, ~uint64_t{0});
        if (round == 5) std::memset(more.row<char>(0) + 80 * size_of(key), 0xff, size_of(key));
        const Matrix device_more = to_device(*gpu(), more);
        const Matrix device_more_values = to_device(*gpu(), more_values);
        HashInsert insert{.keys = more, .values = {}, .skip_empty = round == 6};
        HashInsert device_insert{.keys = device_more, .values = {}, .skip_empty = round == 6};
        if (round % 2 == 0) {
          insert.values = more_values;
          device_insert.values = device_more_values;
        }
        const Matrix status = hash_insert(context(), {keys, values}, insert);
        const Matrix device_status =
            hash_insert(*gpu(), {device_keys, device_values}, device_insert);
        ASSERT_EQ(bytes(*gpu(), device_status), bytes(status)) << "round " << round;
        ASSERT_EQ(bytes(*gpu(), device_keys), bytes(keys)) << "round " << round;
        ASSERT_EQ(bytes(*gpu(), device_values), bytes(values)) << "round " << round;
      }
      const Matrix wanted = random_words(&random, 50000, key, 70000);
      const Matrix found = make_matrix(context(), wanted.rows, 1, value);
      const Matrix device_found = make_matrix(*gpu(), wanted.rows, 1, value);
      hash_lookup(context(), {keys, values}, wanted, found);
      hash_lookup(*gpu(), {device_keys, device_values}, to_device(*gpu(), wanted), device_found);
      ASSERT_EQ(bytes(*gpu(), device_found), bytes(found));
    }
  }
}

TEST_F(Operators, KeysOfVoxelsAreTheCpus) {
  Random random(3);
  Voxels voxels(5000);
  for (Voxel& v : voxels) {
    for (int32_t& value : v) value = static_cast<int32_t>(random.integer(-3, 40));
  }
  const Matrix host = coords_matrix(context(), voxels);
  const Matrix device = to_device(*gpu(), host);
  for (const Dtype dtype : {Dtype::i32, Dtype::i64}) {
    const Matrix keys = make_matrix(context(), host.rows, 1, dtype);
    const Matrix device_keys = make_matrix(*gpu(), host.rows, 1, dtype);
    voxel_keys(context(), host, {30, 41, 20}, keys);
    voxel_keys(*gpu(), device, {30, 41, 20}, device_keys);
    ASSERT_EQ(bytes(*gpu(), device_keys), bytes(keys));
  }
}

// Small whole numbers: every sum is exact, so results are the CPU's bit for bit.
Matrix whole_numbers(Random* random, int64_t rows, int64_t cols, Dtype dtype) {
  const Matrix matrix = make_matrix(context(), rows, cols, dtype);
  dispatch_float(dtype, [&]<class T>(Type<T>) {
    for (int64_t i = 0; i < rows * cols; ++i) {
      store(static_cast<float>(random->integer(-3, 3)), matrix.as<T>()[i]);
    }
  });
  return matrix;
}

// A matrix on the host and its twin, which lies in the middle of wider memory of ones (NaN as a
// float): what is read or written beside it shows.
class Twins {
 public:
  Matrix host;
  Matrix device;

  explicit Twins(const Matrix& values, int64_t margin = 0)
      : Twins(values.rows, values.cols, values.dtype, margin) {
    host = values;
    copy(*gpu(), host, device);
  }
  Twins(int64_t rows, int64_t cols, Dtype dtype, int64_t margin = 0)
      : host(make_matrix(context(), rows, cols, dtype)), margin_(margin) {
    wide_ = make_matrix(context(), rows, cols + 2 * margin, dtype);
    if (!wide_.empty()) std::memset(wide_.data, 0xff, rows * wide_.cols * size_of(dtype));
    device = wide_ = to_device(*gpu(), wide_);
    device.cols = cols;
    device.data = device.as<char>() + margin * size_of(dtype);
  }
  void expect_same() const {
    ASSERT_EQ(bytes(*gpu(), device), bytes(host));
    for (const int64_t first : {int64_t{0}, margin_ + host.cols}) {
      MatrixRef beside = wide_;
      beside.cols = margin_;
      beside.data = wide_.as<char>() + first * size_of(wide_.dtype);
      for (const char byte : bytes(*gpu(), beside)) ASSERT_EQ(byte, '\xff');
    }
  }

 private:
  int64_t margin_;
  Matrix wide_;
};

constexpr Dtype float_dtypes[] = {Dtype::f16, Dtype::bf16, Dtype::f32, Dtype::f64};

// One column, odd numbers, one pack, several, more than the lanes of a warp hold; margins that
// leave rows aligned to 16 bytes, and one that does not.
struct Width {
  int64_t cols;
  int64_t margin = 0;
};
class OperatorsOfWidth : public OnGpu, public ::testing::WithParamInterface<Width> {};
std::string name_of(const ::testing::TestParamInfo<Width>& info) {
  const auto [cols, margin] = info.param;
  return margin > 0 ? join(cols, "_between_", margin) : join(cols);
}
constexpr Width widths[] = {{1}, {5}, {8}, {64}, {100}, {520}, {64, 8}, {40, 1}};
INSTANTIATE_TEST_SUITE_P(List, OperatorsOfWidth, ::testing::ValuesIn(widths), name_of);

struct MapTwins {
  KernelMap host;
  KernelMap device;

  // room: of max_voxels, beyond the output voxels.
  explicit MapTwins(const std::string& text, const std::string& of = "", int64_t room = 0) {
    const Problem problem = Problem::parse("forward f32 " + text + " 1->1 x");
    const std::string usual = text.find("conv") == 0 ? "random:700:12" : "repeat:700";
    const Matrix coords = coords_matrix(context(), cloud(of.empty() ? usual : of));
    const Matrix on_device = to_device(*gpu(), coords);
    if (problem.operation == Operation::submanifold) {
      host = build_submanifold_map(context(), coords, problem.geometry);
      device = build_submanifold_map(*gpu(), on_device, problem.geometry);
      return;
    }
    OutputOptions options;
    Matrix outputs = output_coords(context(), coords, problem.geometry);
    if (room > 0) {
      options.max_voxels = outputs.rows + room;
      outputs = output_coords(context(), coords, problem.geometry, options);
    }
    host = build_kernel_map(context(), coords, outputs, problem.geometry);
    device = build_kernel_map(*gpu(), on_device,
                              output_coords(*gpu(), on_device, problem.geometry, options),
                              problem.geometry);
  }
};

// No voxels, one, rows of padding, and rows of padding only.
std::vector<MapTwins> edge_maps() {
  return {MapTwins("subm3", "empty"),     MapTwins("subm3", "odd"),
          MapTwins("conv3s2p1", "empty"), MapTwins("conv3s2p1", "odd"),
          MapTwins("conv3s2p1", "", 300), MapTwins("conv2s2", "empty", 20)};
}

void check_depthwise(const MapTwins& map, Dtype dtype, const Width& width, Random* random) {
  const auto [cols, margin] = width;
  SCOPED_TRACE(join(map.host.n_in, " -> ", map.host.n_out, " rows, ", map.host.taps(), " taps, ",
                    name(dtype), " ", cols, " columns, margin ", margin));
  const Twins x(whole_numbers(random, map.host.n_in, cols, dtype), margin);
  const Twins dy(whole_numbers(random, map.host.n_out, cols, dtype), margin);
  const Twins w(whole_numbers(random, map.host.taps(), cols, dtype), margin);
  // Not aligned where the rest is.
  const Twins bias(whole_numbers(random, 1, cols, dtype), margin + 1);
  const Twins y(map.host.n_out, cols, dtype, margin);
  depthwise_forward(context(), map.host, {x.host, w.host, bias.host}, y.host);
  depthwise_forward(*gpu(), map.device, {x.device, w.device, bias.device}, y.device);
  y.expect_same();
  const Twins dx(map.host.n_in, cols, dtype, margin);
  depthwise_grad_input(context(), map.host, {dy.host, w.host}, dx.host);
  depthwise_grad_input(*gpu(), map.device, {dy.device, w.device}, dx.device);
  dx.expect_same();
  for (const Dtype of_sums : {dtype, dtype == Dtype::f64 ? dtype : Dtype::f32}) {
    const Twins dw(map.host.taps(), cols, of_sums, margin);
    depthwise_grad_weight(context(), map.host, x.host, dy.host, dw.host);
    depthwise_grad_weight(*gpu(), map.device, x.device, dy.device, dw.device);
    dw.expect_same();
  }
}

TEST_P(OperatorsOfWidth, DepthwiseIsTheCpus) {
  Random random(4);
  for (const std::string text : {"subm3", "subm2", "conv3s2p1", "subm5x1x3", "subm5"}) {
    const MapTwins map(text);
    for (const Dtype dtype : float_dtypes) check_depthwise(map, dtype, GetParam(), &random);
  }
}
TEST_F(Operators, DepthwiseOfEdgesIsTheCpus) {
  Random random(10);
  for (const MapTwins& map : edge_maps()) {
    for (const Dtype dtype : float_dtypes) {
      for (const Width& width : {Width{3}, Width{64}}) check_depthwise(map, dtype, width, &random);
    }
  }
}

// Large clouds in raster order, which sm_90 has a kernel for; the second half in no order, which
// leaves tiles to others; a transposed map, whose taps are not mirrored.
TEST_F(Operators, DepthwiseOfManyRowsIsTheCpus) {
  Random random(11);
  for (const Dtype dtype : {Dtype::f16, Dtype::bf16}) {
    SCOPED_TRACE(name(dtype));
    check_depthwise(MapTwins("subm3", "shell:95"), dtype, {64}, &random);
    check_depthwise(MapTwins("subm3", "shell:68"), dtype, {128, 8}, &random);
    check_depthwise(MapTwins("conv3s2p1", "shell:95"), dtype, {64}, &random);
  }
  check_depthwise(MapTwins("subm3", "half:95"), Dtype::f16, {64}, &random);
}

// Elements are the same, or NaN on both sides.
void expect_same_or_nan(const Twins& twins) {
  const Matrix device = to_host(*gpu(), twins.device);
  dispatch_float(twins.host.dtype, [&]<class T>(Type<T>) {
    for (int64_t i = 0; i < twins.host.rows * twins.host.cols; ++i) {
      const auto expected = to_float(twins.host.as<T>()[i]);
      const auto actual = to_float(device.as<T>()[i]);
      ASSERT_TRUE(actual == expected || (actual != actual && expected != expected))
          << "element " << i << ": " << actual << ", expected " << expected;
    }
  });
}

// An infinite factor of a row that is absent, or of another column, does not show.
TEST_F(Operators, DepthwiseKeepsInfinitiesApart) {
  Random random(9);
  const MapTwins few("conv3s2p1");
  const MapTwins many("subm3", "shell:68");
  for (const Dtype dtype : {Dtype::f16, Dtype::bf16, Dtype::f32}) {
    for (const int64_t cols : {8, 40, 64, 128}) {
      SCOPED_TRACE(join(name(dtype), " ", cols));
      const MapTwins& map = cols == 128 ? many : few;
      const auto numbers = [&](int64_t rows) {
        const Matrix matrix = whole_numbers(&random, rows, cols, dtype);
        dispatch_float(dtype, [&]<class T>(Type<T>) {
          for (int64_t i = 0; i < 1 + rows / 40; ++i) {
            store(random.integer(0, 3) == 0 ? NAN : INFINITY,
                  matrix.as<T>()[random.integer(0, rows * cols - 1)]);
          }
        });
        return Twins(matrix);
      };
      const Twins x = numbers(map.host.n_in);
      const Twins dy = numbers(map.host.n_out);
      const Twins w = numbers(map.host.taps());
      const Twins y(map.host.n_out, cols, dtype);
      depthwise_forward(context(), map.host, {x.host, w.host}, y.host);
      depthwise_forward(*gpu(), map.device, {x.device, w.device}, y.device);
      expect_same_or_nan(y);
      const Twins dx(map.host.n_in, cols, dtype);
      depthwise_grad_input(context(), map.host, {dy.host, w.host}, dx.host);
      depthwise_grad_input(*gpu(), map.device, {dy.device, w.device}, dx.device);
      expect_same_or_nan(dx);
      const Twins dw(map.host.taps(), cols, Dtype::f32);
      depthwise_grad_weight(context(), map.host, x.host, dy.host, dw.host);
      depthwise_grad_weight(*gpu(), map.device, x.device, dy.device, dw.device);
      expect_same_or_nan(dw);
    }
  }
}

void check_pooling(const MapTwins& map, Dtype dtype, const Width& width, Random* random) {
  const auto [cols, margin] = width;
  const Twins x(whole_numbers(random, map.host.n_in, cols, dtype), margin);
  const Twins dy(whole_numbers(random, map.host.n_out, cols, dtype), margin);
  for (const Reduction reduction : {Reduction::max, Reduction::min, Reduction::sum}) {
    SCOPED_TRACE(join(map.host.n_in, " -> ", map.host.n_out, " rows, ", map.host.taps(), " taps, ",
                      name(dtype), " ", cols, " columns, margin ", margin, " reduction ",
                      static_cast<int>(reduction)));
    const bool picks = reduction != Reduction::sum;
    const Twins y(map.host.n_out, cols, dtype, margin);
    const Twins rows(map.host.n_out, cols, Dtype::i32);
    Reduced host{.y = y.host};
    Reduced device{.y = y.device};
    PoolGrad host_grad{.dy = dy.host};
    PoolGrad device_grad{.dy = dy.device};
    if (picks) {
      host.winners = host_grad.winners = rows.host;
      device.winners = device_grad.winners = rows.device;
    }
    pool(context(), map.host, x.host, reduction, host);
    pool(*gpu(), map.device, x.device, reduction, device);
    y.expect_same();
    if (picks) rows.expect_same();
    const Twins dx(map.host.n_in, cols, dtype, margin);
    pool_grad(context(), map.host, reduction, host_grad, dx.host);
    pool_grad(*gpu(), map.device, reduction, device_grad, dx.device);
    dx.expect_same();
  }
}

TEST_P(OperatorsOfWidth, PoolingIsTheCpus) {
  Random random(5);
  for (const std::string text : {"subm3", "conv2s2", "conv3s2p1"}) {
    const MapTwins map(text);
    for (const Dtype dtype : float_dtypes) check_pooling(map, dtype, GetParam(), &random);
  }
}
TEST_F(Operators, PoolingOfEdgesIsTheCpus) {
  Random random(11);
  for (const MapTwins& map : edge_maps()) {
    for (const Dtype dtype : float_dtypes) {
      for (const Width& width : {Width{3}, Width{64}}) check_pooling(map, dtype, width, &random);
    }
  }
}

TEST_P(OperatorsOfWidth, SegmentsAreTheCpus) {
  Random random(6);
  // One segment of thousands of rows, a few of some, many of one or none, and rows of none.
  const Matrix numbers = make_matrix(context(), 9000, 1, Dtype::i32);
  for (int64_t r = 0; r < numbers.rows; ++r) {
    const int64_t kind = random.integer(0, 3);
    numbers.as<int32_t>()[r] = static_cast<int32_t>(kind < 2    ? 7
                                                    : kind == 2 ? random.integer(20, 25)
                                                                : random.integer(-9, 8000));
  }
  const Twins segments(numbers);
  const auto [cols, margin] = GetParam();
  for (const Dtype dtype : float_dtypes) {
    const Twins x(whole_numbers(&random, numbers.rows, cols, dtype), margin);
    for (const Reduction reduction : {Reduction::max, Reduction::min, Reduction::sum}) {
      SCOPED_TRACE(join(name(dtype), " ", cols, " ", static_cast<int>(reduction)));
      const Twins y(7000, cols, dtype, margin);
      const Twins rows(7000, cols, Dtype::i32);
      Reduced host{.y = y.host};
      Reduced device{.y = y.device};
      if (reduction != Reduction::sum) {
        host.winners = rows.host;
        device.winners = rows.device;
      }
      segment_reduce(context(), x.host, segments.host, reduction, host);
      segment_reduce(*gpu(), x.device, segments.device, reduction, device);
      y.expect_same();
      if (host.winners) rows.expect_same();
    }
  }
}

// Some of the row numbers are past the last of `rows_in` rows, some before the first.
void check_weighted_sums(const std::array<int64_t, 3>& shape, const Width& width, Random* random) {
  const auto [places, taps, rows_in] = shape;
  const auto [cols, margin] = width;
  const Matrix numbers = make_matrix(context(), places, taps, Dtype::i32);
  for (int64_t i = 0; i < places * taps; ++i) {
    numbers.as<int32_t>()[i] =
        static_cast<int32_t>(random->integer(0, 3) == 0 ? 5 : random->integer(-50, rows_in + 99));
  }
  const Twins rows(numbers);
  for (const Dtype dtype : float_dtypes) {
    SCOPED_TRACE(join(places, " places, ", taps, " taps, ", rows_in, " rows, ", name(dtype), " ",
                      cols, " columns, margin ", margin));
    const Dtype weight = dtype == Dtype::f64 ? Dtype::f64 : Dtype::f32;
    const Twins weights(whole_numbers(random, places, taps, weight));
    const Twins x(whole_numbers(random, rows_in, cols, dtype), margin);
    const Twins dy(whole_numbers(random, places, cols, dtype), margin);
    const Twins y(places, cols, dtype, margin);
    weighted_sum(context(), x.host, {rows.host, weights.host}, y.host);
    weighted_sum(*gpu(), x.device, {rows.device, weights.device}, y.device);
    y.expect_same();
    const Twins dx(rows_in, cols, dtype, margin);
    weighted_sum_grad_input(context(), dy.host, {rows.host, weights.host}, dx.host);
    weighted_sum_grad_input(*gpu(), dy.device, {rows.device, weights.device}, dx.device);
    dx.expect_same();
    const Twins dw(places, taps, weight);
    weighted_sum_grad_weights(context(), x.host, dy.host, {rows.host, dw.host});
    weighted_sum_grad_weights(*gpu(), x.device, dy.device, {rows.device, dw.device});
    dw.expect_same();
  }
}

TEST_P(OperatorsOfWidth, WeightedSumsAreTheCpus) {
  Random random(7);
  for (const int64_t taps : {1, 8, 11}) {
    check_weighted_sums({3000, taps, 900}, GetParam(), &random);
  }
}
TEST_F(Operators, WeightedSumsOfEdgesAreTheCpus) {
  Random random(12);
  for (const auto& shape : {std::array<int64_t, 3>{0, 8, 900},
                            {1, 8, 900},
                            {50, 8, 0},
                            {50, 8, 1},
                            {50, 0, 9},
                            {40, 70, 30}}) {
    for (const Width& width : {Width{3}, Width{64}}) check_weighted_sums(shape, width, &random);
  }
}

// Points at eighths of a voxel, whose shares and their sums are exact.
void check_sample_maps(const std::string& voxels, int64_t count, Random* random) {
  SCOPED_TRACE(join(voxels, ", ", count, " points"));
  const Twins coords(coords_matrix(context(), cloud(voxels)));
  const VoxelIndex index(context(), coords.host);
  const VoxelIndex device_index(*gpu(), coords.device);
  for (const Dtype dtype : {Dtype::f32, Dtype::f64}) {
    const Matrix places = make_matrix(context(), count, 3, dtype);
    dispatch_float(dtype, [&]<class T>(Type<T>) {
      for (int64_t i = 0; i < places.rows * 3; ++i) {
        store(static_cast<float>(random->integer(-40, 640)) / 8, places.as<T>()[i]);
      }
    });
    const Twins points(places);
    const Twins dweights(whole_numbers(random, count, 8, dtype));
    for (const SampleMode mode : {SampleMode::nearest, SampleMode::trilinear}) {
      for (const Rounding rounding : {Rounding::floor, Rounding::truncate}) {
        const SampleOptions options{mode, rounding, Int3{70, 60, 65}};
        const PointsRef host{.points = points.host, .batch = {}, .points_per_batch = 4990};
        const PointsRef device{.points = points.device, .batch = {}, .points_per_batch = 4990};
        const SampleMap found = sample_map(context(), index, host, options);
        const SampleMap device_found = sample_map(*gpu(), device_index, device, options);
        ASSERT_EQ(bytes(*gpu(), device_found.rows), bytes(found.rows));
        ASSERT_EQ(bytes(*gpu(), device_found.weights), bytes(found.weights));
        if (mode == SampleMode::nearest) continue;
        const Twins dpoints(count, 3, dtype);
        sample_map_grad(context(), points.host, found, dweights.host, dpoints.host);
        sample_map_grad(*gpu(), points.device, device_found, dweights.device, dpoints.device);
        dpoints.expect_same();
      }
    }
  }
}

TEST_F(Operators, SampleMapsAreTheCpus) {
  Random random(8);
  for (const std::string voxels : {"repeat:3000", "odd", "empty"}) {
    for (const int64_t count : {0, 1, 5000}) check_sample_maps(voxels, count, &random);
  }
}

}  // namespace
}  // namespace voxgemm::test
