// SPDX-License-Identifier: Apache-2.0
#include "voxgemm/hash_table.h"

#include <map>

#include "core/dispatch_key.h"
#include "support/message_of.h"
#include "support/random_coords.h"
#include "support/run.h"

namespace voxgemm::test {
namespace {

template <class K>
Matrix column(const std::vector<K>& values, Dtype dtype) {
  Matrix matrix = make_matrix(context(), static_cast<int64_t>(values.size()), 1, dtype);
  std::copy(values.begin(), values.end(), matrix.as<K>());
  return matrix;
}

struct Table {
  Matrix keys;
  Matrix values;

  Table(int64_t slots, Dtype key, Dtype value)
      : keys(make_matrix(context(), slots, 1, key)),
        values(make_matrix(context(), slots, 1, value)) {
    std::memset(keys.data, 0xff, slots * size_of(key));
    std::memset(values.data, 0xff, slots * size_of(value));
  }
  HashTableRef ref() const { return {keys, values}; }
};

std::string failure(const Table& table, const HashInsert& insert) {
  const Matrix status = hash_insert(context(), table.ref(), insert);
  return message_of([&] { check_hash_insert(context(), table.ref(), status); });
}

// Random inserts and look-ups of one table against std::map, to 100 % load.
template <class K, class V>
void expect_like_map(Random& random, Dtype key, Dtype value) {
  const int64_t slots = random.integer(0, 200);
  const Table table(slots, key, value);
  std::map<K, V> expected;
  const uint64_t range = random.integer(1, 300);
  for (int round = 0; round < 6; ++round) {
    const int64_t rows = random.integer(0, 100);
    std::vector<K> keys(rows);
    std::vector<V> values(rows);
    for (int64_t r = 0; r < rows; ++r) {
      keys[r] = static_cast<K>(static_cast<K>(-2) - random.bits() % range);
      values[r] = static_cast<V>(random.bits());
    }
    const bool number = random.integer(0, 2) == 0;
    std::map<K, V> added;
    for (int64_t r = 0; r < rows; ++r)
      added.emplace(keys[r], number ? static_cast<V>(r) : values[r]);
    std::map<K, V> together = added;
    together.insert(expected.begin(), expected.end());
    const Matrix key_column = column(keys, key);
    const Matrix value_column = column(values, value);
    HashInsert insert{.keys = key_column, .values = {}};
    if (!number) insert.values = value_column;
    const std::string message = failure(table, insert);
    if (static_cast<int64_t>(together.size()) <= slots) {
      ASSERT_EQ(message, "no error");
      expected = together;
    } else {
      ASSERT_EQ(message, join("the table has ", slots, " slots for ", together.size(),
                              " distinct keys, expected at least as many slots as keys"));
    }
    std::vector<K> wanted = keys;
    for (const auto& [k, v] : expected) wanted.push_back(k);
    wanted.push_back(static_cast<K>(-1));
    wanted.push_back(0);
    const Matrix found = make_matrix(context(), static_cast<int64_t>(wanted.size()), 1, value);
    hash_lookup(context(), table.ref(), column(wanted, key), found);
    for (size_t i = 0; i < wanted.size(); ++i) {
      const auto entry = expected.find(wanted[i]);
      ASSERT_EQ(found.as<V>()[i], entry == expected.end() ? static_cast<V>(-1) : entry->second);
    }
  }
}

TEST(HashTable, IsAMap) {
  for_two_seconds([](Random& random) {
    expect_like_map<uint32_t, uint32_t>(random, Dtype::i32, Dtype::i32);
    expect_like_map<uint32_t, uint64_t>(random, Dtype::i32, Dtype::i64);
    expect_like_map<uint64_t, uint32_t>(random, Dtype::i64, Dtype::i32);
    expect_like_map<uint64_t, uint64_t>(random, Dtype::i64, Dtype::i64);
  });
}

TEST(HashTable, OneKeyTooManyLeavesItAsItWas) {
  constexpr int64_t slots = 100000;
  const Table table(slots, Dtype::i64, Dtype::i32);
  std::vector<uint64_t> keys(slots + 1);
  for (int64_t i = 0; i <= slots; ++i) keys[i] = i * 0x9e3779b97f4a7c15;
  const std::vector<uint64_t> fitting(keys.begin(), keys.end() - 1);
  EXPECT_EQ(failure(table, {.keys = column(fitting, Dtype::i64), .values = {}}), "no error");
  const auto before = elements<uint64_t>(table.keys);
  EXPECT_NE(failure(table, {.keys = column(keys, Dtype::i64), .values = {}}), "no error");
  EXPECT_EQ(elements<uint64_t>(table.keys), before);
}

TEST(HashTable, NoKeyIsAllOnes) {
  const Table table(8, Dtype::i32, Dtype::i32);
  const Matrix keys = column(std::vector<uint32_t>{5, 0xffffffff, 6, 0xffffffff}, Dtype::i32);
  EXPECT_EQ(failure(table, {.keys = keys, .values = {}}),
            "the key in row 1 is all ones, which marks an empty slot; expected any other key");
  EXPECT_EQ(elements<uint32_t>(table.keys), std::vector<uint32_t>(8, 0xffffffff));
  EXPECT_EQ(failure(table, {.keys = keys, .values = {}, .skip_empty = true}), "no error");
  const Matrix found = make_matrix(context(), 4, 1, Dtype::i32);
  hash_lookup(context(), table.ref(), keys, found);
  EXPECT_EQ(elements<int32_t>(found), (std::vector<int32_t>{0, -1, 2, -1}));
}

TEST(HashTable, KeysOfVoxels) {
  const Voxels voxels = {{0, 1, 2, 3}, {2, 3, 0, 0}, {0, -1, 0, 0}, {0, 4, 0, 0},
                         {0, 0, 5, 0}, {0, 0, 0, 6}, {-1, 0, 0, 0}, {35791394, 0, 0, 0}};
  const Matrix coords = coords_matrix(context(), voxels);
  const Matrix narrow = make_matrix(context(), coords.rows, 1, Dtype::i32);
  const Matrix wide = make_matrix(context(), coords.rows, 1, Dtype::i64);
  voxel_keys(context(), coords, {4, 5, 6}, narrow);
  voxel_keys(context(), coords, {4, 5, 6}, wide);
  // 35791394 * 120 is 4294967280; the batch's last voxels would not fit 32 bits.
  EXPECT_EQ(elements<int32_t>(narrow), (std::vector<int32_t>{45, 330, -1, -1, -1, -1, -1, -1}));
  EXPECT_EQ(elements<int64_t>(wide),
            (std::vector<int64_t>{45, 330, -1, -1, -1, -1, -1, 4294967280}));
}

}  // namespace
}  // namespace voxgemm::test
