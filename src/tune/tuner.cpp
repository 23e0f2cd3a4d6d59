// SPDX-License-Identifier: Apache-2.0
#include "tune/tuner.h"

#include <algorithm>
#include <limits>
#include <numeric>

namespace voxgemm {
namespace {

// The models are seldom wrong by more than this between two kernels that matter.
constexpr double plausible = 2.0;
constexpr size_t most_plausible = 8;
constexpr size_t least_plausible = 3;
// What is this far behind after three counted rounds will not come first, nor what is so far behind
// after one, or after the round that warms up.
constexpr double behind = 1.25;
constexpr double far_behind = 2.0;
constexpr double hopeless = 4.0;

}  // namespace

double median(std::vector<double> values) {
  const auto middle = values.begin() + static_cast<int64_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  if (values.size() % 2 == 1) return *middle;
  return (*middle + *std::max_element(values.begin(), middle)) / 2;
}

std::vector<size_t> worth_timing(std::span<const Contender> contenders, const Wanted& wanted) {
  std::vector<size_t> order(contenders.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) {
    return contenders[a].predicted < contenders[b].predicted;
  });
  if (!wanted.exhaustive) {
    size_t count = 0;
    while (count < std::min(order.size(), most_plausible) &&
           (count < least_plausible ||
            contenders[order[count]].predicted <= plausible * contenders[order[0]].predicted)) {
      ++count;
    }
    order.resize(count);
  }
  if (!wanted.again) std::erase_if(order, [&](size_t c) { return contenders[c].known; });
  return order;
}

Tuner::Tuner(size_t contenders, const Options& options)
    : options_(options), laps_(contenders), dropped_(contenders, false), against_(contenders, 0) {}

std::optional<size_t> Tuner::next() const {
  if (turn_ >= laps_.size() || round_ > options_.rounds) return std::nullopt;
  if (spent_ < options_.budget_seconds) return turn_;
  // Past the budget only the first, the model's favourite, still gets its time.
  const bool served = dropped_[0] || laps_[0].size() >= 2;
  return served ? std::nullopt : std::optional<size_t>(0);
}

void Tuner::record(double seconds, double spent) {
  const size_t contender = *next();
  turn_ = contender;
  laps_[contender].push_back(seconds);
  spent_ += spent;
  advance();
}

void Tuner::drop() {
  const size_t contender = *next();
  turn_ = contender;
  dropped_[contender] = true;
  laps_[contender].clear();
  advance();
}

void Tuner::advance() {
  do {
    if (++turn_ < laps_.size()) continue;
    turn_ = 0;
    ++round_;
    if (round_ == 1) {
      drop_slow(hopeless, [this](size_t c) { return laps_[c].empty() ? 0 : laps_[c][0]; });
    } else if (round_ == 2 || round_ >= 4) {
      drop_slow(round_ == 2 ? far_behind : behind, [this](size_t c) { return seconds(c); });
    }
  } while (round_ <= options_.rounds && dropped_[turn_]);
}

void Tuner::drop_slow(double factor, const std::function<double(size_t)>& seconds_of) {
  double least = std::numeric_limits<double>::infinity();
  size_t best = 0;
  std::vector<double> times;
  for (size_t c = 0; c < laps_.size(); ++c) {
    times.push_back(seconds_of(c));
    if (dropped_[c] || times[c] <= 0 || times[c] >= least) continue;
    least = times[c];
    best = c;
  }
  // The first stays: it is what the others are held against.
  for (size_t c = 1; c < laps_.size(); ++c) {
    if (dropped_[c] || times[c] <= factor * least) continue;
    dropped_[c] = true;
    against_[c] = best;
  }
}

double Tuner::seconds(size_t contender) const {
  const std::vector<double>& laps = laps_[contender];
  const bool was_hopeless = laps.size() == 1 && dropped_[contender];
  if (laps.size() < 2 && !was_hopeless) return 0;
  const size_t begin = was_hopeless ? 0 : 1;
  const size_t other = against_[contender];
  const double of_other = contender == other ? 0 : seconds(other);
  std::vector<double> ratios;
  for (size_t lap = begin; lap < laps.size(); ++lap) {
    ratios.push_back(of_other > 0 ? laps[lap] / laps_[other][lap] : laps[lap]);
  }
  return of_other > 0 ? median(ratios) * of_other : median(ratios);
}

}  // namespace voxgemm
