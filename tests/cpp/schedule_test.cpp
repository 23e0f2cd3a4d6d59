// SPDX-License-Identifier: Apache-2.0
#include "voxgemm/schedule.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>

#include "support/message_of.h"
#include "support/run.h"

namespace voxgemm::test {
namespace {

using Order = ScheduleOptions::Order;

// Every order, one and several groups, one and several tiles a chunk, one and several chunks.
std::vector<ScheduleOptions> all_options(int taps) {
  std::vector<ScheduleOptions> list;
  for (const int tile_rows : {64, 192}) {
    list.push_back({.tile_rows = tile_rows, .chunk_rows = tile_rows});
    for (const int tiles : {1, 3, 100}) {
      const int chunk_rows = tile_rows * tiles;
      list.push_back({Order::by_tap, taps, tile_rows, chunk_rows});
      for (int groups = (taps + 31) / 32; groups <= taps; groups = groups * 2 + 1) {
        list.push_back({Order::by_mask, groups, tile_rows, chunk_rows});
      }
    }
  }
  return list;
}

std::string text(const ScheduleOptions& o) {
  return join("order ", static_cast<int>(o.order), ", ", o.groups, " groups, ", o.tile_rows,
              " tile rows, ", o.chunk_rows, " chunk rows");
}

Case case_of(const std::string& layer) {
  return make_case(context(), problem_text(Pass::forward, Dtype::f32, layer));
}

// The schedule computes y[row] += taps in order; summing x through it must give what the table
// gives.
std::vector<std::vector<int>> taps_of_rows(const Schedule& schedule) {
  std::vector<std::vector<int>> taps(schedule.rows());
  for (int64_t t = 0; t < schedule.tiles(); ++t) {
    const Tile tile = schedule.tile(t);
    for (int b = 0; b < tile.blocks; ++b) {
      const IndexBlock block = schedule.block(tile, b);
      for (int i = 0; i < tile.rows; ++i) {
        if (block.rows[i] >= 0) taps[schedule.row(tile, i)].push_back(block.tap);
      }
    }
  }
  return taps;
}

class Schedules : public ::testing::TestWithParam<std::string> {};

TEST_P(Schedules, HoldEveryPairOnce) {
  const Case c = case_of(GetParam());
  for (const ScheduleOptions& options : all_options(c.map.taps())) {
    SCOPED_TRACE(text(options));
    const Schedule schedule = Schedule::build(context(), c.map, options);
    EXPECT_EQ(schedule_violation(schedule, c.map), "");
    EXPECT_EQ(schedule.options(), options);
    EXPECT_EQ(schedule.rows(), c.map.n_out);
    EXPECT_EQ(schedule.taps(), c.map.taps());
    EXPECT_EQ(schedule.first_tile(0), 0);
  }
}

TEST_P(Schedules, VisitTheTapsOfARowInRisingOrder) {
  const Case c = case_of(GetParam());
  for (const ScheduleOptions& options : all_options(c.map.taps())) {
    SCOPED_TRACE(text(options));
    const auto taps = taps_of_rows(Schedule::build(context(), c.map, options));
    int64_t pairs = 0;
    for (const auto& list : taps) {
      EXPECT_TRUE(std::is_sorted(list.begin(), list.end()));
      pairs += static_cast<int64_t>(list.size());
    }
    EXPECT_EQ(pairs, c.map.pairs(context()));
  }
}

TEST_P(Schedules, DoNotDependOnThreads) {
  const Case c = case_of(GetParam());
  for (const ScheduleOptions& options : all_options(c.map.taps())) {
    SCOPED_TRACE(text(options));
    const Schedule one = Schedule::build(Context::cpu(1), c.map, options);
    const Schedule seven = Schedule::build(Context::cpu(7), c.map, options);
    ASSERT_EQ(one.tiles(), seven.tiles());
    EXPECT_EQ(one.bytes(), seven.bytes());
    for (int64_t t = 0; t < one.tiles(); ++t) {
      const Tile a = one.tile(t);
      const Tile b = seven.tile(t);
      ASSERT_EQ(a.rows, b.rows);
      ASSERT_EQ(a.blocks, b.blocks);
      for (int i = 0; i < a.rows; ++i) ASSERT_EQ(one.row(a, i), seven.row(b, i));
    }
  }
}

// Sorted orders leave out what no row has: never more visits than the natural order, and none of a
// tap without pairs.
TEST_P(Schedules, SkipIndexBlocksWithoutPairs) {
  const Case c = case_of(GetParam());
  for (const ScheduleOptions& options : all_options(c.map.taps())) {
    SCOPED_TRACE(text(options));
    const Schedule schedule = Schedule::build(context(), c.map, options);
    int64_t entries = 0;
    for (int64_t t = 0; t < schedule.tiles(); ++t) {
      const Tile tile = schedule.tile(t);
      for (int b = 0; b < tile.blocks; ++b) {
        const IndexBlock block = schedule.block(tile, b);
        entries += tile.rows;
        if (options.order == Order::natural) continue;
        const auto present = [](int32_t row) { return row >= 0; };
        const int count =
            static_cast<int>(std::count_if(block.rows, block.rows + tile.rows, present));
        EXPECT_GT(count, 0) << "tile " << t << ", tap " << block.tap;
        EXPECT_TRUE(options.order != Order::by_tap || count == tile.rows);
        // Whole tiles may be read: what lies past the rows is absent.
        EXPECT_TRUE(std::none_of(block.rows + tile.rows, block.rows + options.tile_rows, present));
      }
    }
    EXPECT_EQ(schedule.row_visits(), entries);
    EXPECT_GE(entries, c.map.pairs(context()));
    if (options.order == Order::natural) {
      EXPECT_EQ(entries, c.map.n_out * c.map.taps());
      EXPECT_EQ(schedule.bytes(), 0U);
    }
    EXPECT_TRUE(options.order != Order::by_tap || entries == c.map.pairs(context()));
  }
}

std::string name_of(const ::testing::TestParamInfo<std::string>& info) {
  return std::to_string(info.index);
}
INSTANTIATE_TEST_SUITE_P(Layers,
                         Schedules,
                         ::testing::Values("subm3 1->1 empty",
                                           "subm3 1->1 line:1",
                                           "subm3 1->1 random:129:6",
                                           "subm3 1->1 shell:24",
                                           "subm4 1->1 random:64:6",
                                           "subm5 1->1 random:65:6",
                                           "conv3s2p1 1->1 random:500:12",
                                           "inv2s2 1->1 shell:12",
                                           "subm3 1->1 repeat:129"),
                         name_of);

// Equal masks meet in one tile: 64 rows that have tap a, 64 that have tap b, alternating.
TEST(Schedule, ByMaskPutsEqualMasksTogether) {
  Case c = case_of("subm3x1x1 1->1 line:128");
  auto* table = c.map.neighbours.as<int32_t>();  // [3, 128]
  std::fill_n(table, 3 * 128, -1);
  for (int row = 0; row < 128; ++row) table[row % 2 * 2 * 128 + row] = row;
  const Schedule schedule = Schedule::build(context(), c.map, {Order::by_mask, 1, 64, 128});
  EXPECT_EQ(schedule_violation(schedule, c.map), "");
  EXPECT_EQ(schedule.tiles(), 2);
  EXPECT_EQ(schedule.row_visits(), 128);
  for (int64_t t = 0; t < 2; ++t) EXPECT_EQ(schedule.tile(t).blocks, 1);
}

// A copy of the map whose table can be changed.
KernelMap copy_of(const KernelMap& map) {
  KernelMap copy = map;
  const MatrixRef& table = map.neighbours;
  copy.neighbours = make_matrix(context(), table.rows, table.cols, table.dtype);
  for (int64_t r = 0; r < table.rows; ++r) {
    std::memcpy(copy.neighbours.row<int32_t>(r), table.row<int32_t>(r), table.cols * 4);
  }
  return copy;
}

class Violations : public ::testing::TestWithParam<Order> {
 protected:
  Violations()
      : layer(case_of("subm3 1->1 random:200:8")),
        built(Schedule::build(context(), layer.map, options())) {}

  static ScheduleOptions options() {
    const Order order = GetParam();
    return {.order = order,
            .groups = order == Order::by_tap ? 27 : 1,
            .tile_rows = 64,
            .chunk_rows = order == Order::natural ? 64 : 128};
  }
  // Where the first entry is that the predicate accepts, as (tap, row).
  template <class Predicate>
  std::pair<int, int64_t> find(Predicate predicate) const {
    for (int tap = 0; tap < layer.map.taps(); ++tap) {
      for (int64_t row = 0; row < layer.map.n_out; ++row) {
        if (predicate(tap, layer.map.neighbours.row<int32_t>(tap)[row])) return {tap, row};
      }
    }
    throw std::logic_error("no such entry");
  }

  Case layer;
  Schedule built;
};

TEST_P(Violations, AWrongRowIsFound) {
  KernelMap other = copy_of(layer.map);
  const auto [tap, row] = find([](int, int32_t in) { return in >= 0; });
  ++other.neighbours.row<int32_t>(tap)[row];
  EXPECT_NE(schedule_violation(built, other).find(join("row ", row, " and tap ", tap)),
            std::string::npos)
      << schedule_violation(built, other);
}

TEST_P(Violations, APairTheMapLacksIsFound) {
  KernelMap other = copy_of(layer.map);
  const auto [tap, row] = find([](int, int32_t in) { return in >= 0; });
  other.neighbours.row<int32_t>(tap)[row] = -1;
  EXPECT_NE(schedule_violation(built, other), "");
}

TEST_P(Violations, AMissingPairIsFound) {
  KernelMap other = copy_of(layer.map);
  const auto [tap, row] = find([](int, int32_t in) { return in < 0; });
  other.neighbours.row<int32_t>(tap)[row] = 0;
  EXPECT_NE(schedule_violation(built, other).find(join("row ", row, " and tap ", tap)),
            std::string::npos)
      << schedule_violation(built, other);
}

// The last tile has free places behind its rows; an entry there would be executed by whoever reads
// whole tiles.
TEST_P(Violations, AnEntryBehindATilesRowsIsFound) {
  if (GetParam() == Order::natural) GTEST_SKIP() << "natural index blocks end with the table";
  for (int64_t t = 0; t < built.tiles(); ++t) {
    const Tile tile = built.tile(t);
    if (tile.rows == options().tile_rows || tile.blocks == 0) continue;
    // The schedule's own memory, which only a test writes.
    const_cast<int32_t*>(built.block(tile, 0).rows)[tile.rows] = 0;
    EXPECT_NE(schedule_violation(built, layer.map), "");
    return;
  }
  FAIL() << "no tile is partly filled";
}

INSTANTIATE_TEST_SUITE_P(Orders,
                         Violations,
                         ::testing::Values(Order::natural, Order::by_mask, Order::by_tap),
                         [](const auto& info) { return std::to_string(info.index); });

TEST(ScheduleOptions, InvalidOnesAreRefusedInWords) {
  const Case c = case_of("subm4 1->1 random:64:6");
  const auto message = [&](const ScheduleOptions& options) {
    return message_of([&] { Schedule::build(context(), c.map, options); });
  };
  EXPECT_EQ(message({}), "no error") << "the defaults are valid";
  EXPECT_EQ(message({Order::by_mask, 2, 0, 128}), "tile_rows is 0, expected a multiple of 64");
  EXPECT_EQ(message({Order::by_mask, 2, 100, 200}), "tile_rows is 100, expected a multiple of 64");
  EXPECT_EQ(message({Order::by_mask, 2, -64, 64}), "tile_rows is -64, expected a multiple of 64");
  EXPECT_EQ(message({Order::by_mask, 2, 128, 64}),
            "chunk_rows is 64, expected a multiple of tile_rows = 128");
  EXPECT_EQ(message({Order::by_mask, 2, 128, 192}),
            "chunk_rows is 192, expected a multiple of tile_rows = 128");
  EXPECT_EQ(message({Order::by_mask, 0, 64, 64}),
            "groups is 0, expected 1 to 64, the number of taps");
  EXPECT_EQ(message({Order::by_mask, 65, 64, 64}),
            "groups is 65, expected 1 to 64, the number of taps");
  EXPECT_EQ(message({Order::by_mask, 1, 64, 64}),
            "groups is 1 for 64 taps, expected at most 32 taps a group");
  EXPECT_EQ(message({Order::by_tap, 2, 64, 64}), "groups is 2, expected one per tap, 64");
  EXPECT_EQ(
      message({Order::natural, 2, 64, 64}),
      "a natural schedule has one group and chunks of one tile, not 2 groups and chunks of 64 "
      "rows");
  EXPECT_EQ(message({Order::natural, 1, 64, 128}),
            "a natural schedule has one group and chunks of one tile, not 1 groups and chunks of "
            "128 rows");
}

}  // namespace
}  // namespace voxgemm::test
