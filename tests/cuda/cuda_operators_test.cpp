// SPDX-License-Identifier: Apache-2.0
//
// The operators beside convolution on a CUDA device against the CPU's, which their own tests judge.
#include "gpu.h"

#include "support/random_coords.h"
#include "voxgemm/hash_table.h"
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

}  // namespace
}  // namespace voxgemm::test
