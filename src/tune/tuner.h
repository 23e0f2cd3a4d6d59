// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <functional>
#include <optional>
#include <span>
#include <vector>

namespace voxgemm {

double median(std::vector<double> values);  // of at least one

// What is worth timing, and in which order; knows no clock and no kernel.

struct Contender {
  double predicted = 0;
  bool known = false;  // was measured before
};
// Their places, cheapest prediction first: all, or those that the model may have misjudged. Known
// ones are left out unless `again`.
struct Wanted {
  bool exhaustive = false;
  bool again = false;
};
std::vector<size_t> worth_timing(std::span<const Contender> contenders, const Wanted& wanted);

// Rounds in which each contender is timed once. What changes a machine's speed meets all of a round
// alike, so times are compared inside a round: with that of the first contender, the model's
// favourite. The first round warms up and is not counted, but for those that it shows to be
// hopeless. Contenders that are clearly behind drop out after some rounds, and keep their times.
class Tuner {
 public:
  struct Options {
    int rounds = 7;
    double budget_seconds = 1;
  };
  Tuner(size_t contenders, const Options& options);

  // Whom to time now; nothing: it is over.
  std::optional<size_t> next() const;
  // That one's seconds a call, and what finding out took.
  void record(double seconds, double spent);
  // It cannot be timed.
  void drop();

  // The first's median over the counted rounds, times the median of a contender's ratio to it. One
  // that dropped out has its ratio to the one that it was behind, in the rounds that it had: the
  // first's few laps of these may have been disturbed. 0: it has no counted round.
  double seconds(size_t contender) const;
  double spent() const { return spent_; }

 private:
  void advance();
  void drop_slow(double factor, const std::function<double(size_t)>& seconds_of);

  Options options_;
  std::vector<std::vector<double>> laps_;  // by contender; the first is the warm-up
  std::vector<bool> dropped_;
  // Whom its times are held against: the first or, once it dropped out, one that was still there.
  std::vector<size_t> against_;
  size_t turn_ = 0;
  int round_ = 0;
  double spent_ = 0;
};

}  // namespace voxgemm
