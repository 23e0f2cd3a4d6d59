// SPDX-License-Identifier: Apache-2.0
//
// Made-up costs and noise: no clock, no kernel.
#include "tune/tuner.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <random>

namespace voxgemm {
namespace {

using Places = std::vector<size_t>;

TEST(WorthTiming, WhatTheModelMayMisjudge) {
  const std::vector<Contender> some = {{5}, {1}, {1.9}, {2.1}, {1.5}, {9}};
  EXPECT_EQ(worth_timing(some, {}), (Places{1, 4, 2}));
  EXPECT_EQ(worth_timing(some, {.exhaustive = true}), (Places{1, 4, 2, 3, 0, 5}));
  // At least three, at most eight, and no more than there are.
  EXPECT_EQ(worth_timing(std::vector<Contender>{{8}, {1}, {4}, {16}}, {}), (Places{1, 2, 0}));
  EXPECT_EQ(worth_timing(std::vector<Contender>{{8}, {1}}, {}), (Places{1, 0}));
  EXPECT_EQ(worth_timing(std::vector<Contender>(20, Contender{1}), {}).size(), 8U);
  EXPECT_EQ(worth_timing(std::vector<Contender>(20, Contender{1}), {.exhaustive = true}).size(),
            20U);
  EXPECT_TRUE(worth_timing({}, {.exhaustive = true}).empty());
}

TEST(WorthTiming, OnlyWhatIsMissing) {
  const std::vector<Contender> some = {{5, true}, {1, true}, {1.9}, {2.1}, {1.5, true}, {9}};
  EXPECT_EQ(worth_timing(some, {}), (Places{2}));
  EXPECT_EQ(worth_timing(some, {.again = true}), (Places{1, 4, 2}));
  EXPECT_EQ(worth_timing(some, {.exhaustive = true}), (Places{2, 3, 5}));
  // What is known keeps its place among the best few: nothing else moves up.
  EXPECT_TRUE(
      worth_timing(std::vector<Contender>{{1, true}, {1, true}, {1, true}, {3}}, {}).empty());
}

// Runs a tuner to its end; the order of its turns.
Places run(Tuner* tuner, const std::function<double(size_t)>& lap) {
  Places turns;
  while (const auto turn = tuner->next()) {
    turns.push_back(*turn);
    const double seconds = lap(*turn);
    tuner->record(seconds, seconds);
    if (turns.size() > 10000) break;
  }
  return turns;
}

size_t fastest(const Tuner& tuner, size_t contenders) {
  size_t best = 0;
  for (size_t c = 1; c < contenders; ++c) {
    if (tuner.seconds(c) > 0 && tuner.seconds(c) < tuner.seconds(best)) best = c;
  }
  return best;
}

TEST(TunerTest, RoundsAreInterleavedAndTheFirstDoesNotCount) {
  Tuner tuner(3, {.rounds = 4, .budget_seconds = 1e9});
  int lap = 0;
  const Places turns =
      run(&tuner, [&](size_t c) { return lap++ < 3 ? 100.0 : 1.0 + 0.1 * double(c); });
  Places expected;
  for (int round = 0; round < 5; ++round) expected.insert(expected.end(), {0, 1, 2});
  EXPECT_EQ(turns, expected);
  for (size_t c = 0; c < 3; ++c) EXPECT_DOUBLE_EQ(tuner.seconds(c), 1.0 + 0.1 * double(c));
}

TEST(TunerTest, ThoseFarBehindDropOut) {
  Tuner tuner(5, {.rounds = 7, .budget_seconds = 1e9});
  const std::vector<double> cost = {1.0, 1.1, 1.5, 3.5, 8.0};
  const Places turns = run(&tuner, [&](size_t c) { return cost[c]; });
  EXPECT_EQ(std::count(turns.begin(), turns.end(), 0U), 8);
  EXPECT_EQ(std::count(turns.begin(), turns.end(), 1U), 8);
  EXPECT_EQ(std::count(turns.begin(), turns.end(), 2U), 4);
  EXPECT_EQ(std::count(turns.begin(), turns.end(), 3U), 2);
  EXPECT_EQ(std::count(turns.begin(), turns.end(), 4U), 1) << "hopeless from the first lap on";
  for (size_t c = 0; c < 5; ++c) EXPECT_EQ(tuner.seconds(c), cost[c]) << "its time is kept";
}

TEST(TunerTest, NoiseOfTheMachineMeetsAllAlike) {
  std::mt19937 random(0);
  std::uniform_real_distribution<double> some(0, 1);
  int right = 0;
  for (int trial = 0; trial < 200; ++trial) {
    // Phases in which everything takes up to three times as long, and one lap in ten is disturbed.
    double slow = 1;
    int laps = 0;
    Tuner tuner(4, {.rounds = 7, .budget_seconds = 1e9});
    run(&tuner, [&](size_t c) {
      if (laps++ % 5 == 0) slow = 1 + 2 * some(random);
      const double disturbed = some(random) < 0.1 ? 5 : 1;
      return slow * disturbed * (1 + 0.4 * double(c)) * (1 + 0.02 * some(random));
    });
    right += fastest(tuner, 4) == 0;
  }
  EXPECT_GE(right, 180);
}

// A hopeless contender, and one that drops out later, whatever was in the way of the favourite.
TEST(TunerTest, ADisturbedLapOfTheFavouriteMakesNobodyElseFast) {
  const std::vector<double> cost = {4.0, 1.0, 3.0, 20.0};
  for (const size_t disturbed : {0U, 1U, 2U, 7U}) {
    Tuner tuner(4, {.rounds = 7, .budget_seconds = 1e9});
    std::vector<size_t> laps(4, 0);
    run(&tuner,
        [&](size_t c) { return laps[c]++ == disturbed && c == 0 ? 1000 * cost[0] : cost[c]; });
    for (size_t c = 0; c < 4; ++c) EXPECT_DOUBLE_EQ(tuner.seconds(c), cost[c]) << disturbed;
  }
}

TEST(TunerTest, TheBudgetEndsItAndTheFavouriteIsTimedInAnyCase) {
  Tuner brief(5, {.rounds = 7, .budget_seconds = 0.5});
  EXPECT_EQ(run(&brief, [](size_t) { return 1.0; }), (Places{0, 0}));
  EXPECT_EQ(brief.seconds(0), 1.0);
  EXPECT_EQ(brief.seconds(1), 0.0);
  Tuner longer(5, {.rounds = 7, .budget_seconds = 6.5});
  EXPECT_EQ(run(&longer, [](size_t) { return 1.0; }), (Places{0, 1, 2, 3, 4, 0, 1}));
  EXPECT_EQ(longer.seconds(1), 1.0);
  EXPECT_EQ(longer.seconds(2), 0.0) << "one that only warmed up has no time";
  EXPECT_EQ(longer.spent(), 7.0);
}

TEST(TunerTest, WhatCannotBeTimedIsLeftOut) {
  Tuner tuner(3, {.rounds = 2, .budget_seconds = 1e9});
  Places turns;
  while (const auto turn = tuner.next()) {
    turns.push_back(*turn);
    *turn == 1 ? tuner.drop() : tuner.record(1, 1);
  }
  EXPECT_EQ(turns, (Places{0, 1, 2, 0, 2, 0, 2}));
  EXPECT_EQ(tuner.seconds(1), 0);
  Tuner none(2, {.rounds = 2});
  none.drop();
  none.drop();
  EXPECT_FALSE(none.next());
  EXPECT_FALSE(Tuner(0, {}).next());
}

TEST(TunerTest, MediansOfEvenAndOddNumbers) {
  const std::vector<double> laps = {99, 4, 1, 3, 2};
  for (const auto& [rounds, median] : {std::pair{3, 3.0}, {4, 2.5}}) {
    Tuner tuner(1, {.rounds = rounds, .budget_seconds = 1e9});
    size_t lap = 0;
    run(&tuner, [&](size_t) { return laps[lap++]; });
    EXPECT_EQ(tuner.seconds(0), median);
  }
}

}  // namespace
}  // namespace voxgemm
