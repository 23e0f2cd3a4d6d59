// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "voxgemm/choose.h"

namespace voxgemm {

// The rule of a choice, of anything that has a predicted time and may have a measured one: offer()
// all, then measured() what is known, then best().
//
// The model's favourite is the cheapest by prediction, a reference only if there is nothing else.
// If it was measured, the fastest of all measured ones is picked; else the favourite. Predicted and
// measured times are never compared with each other: then a model that is wrong by a factor would
// make whatever happens to be measured win, or lose, wherever another filter is asked for.
template <class T>
class Ranking {
 public:
  void offer(const T& item, double predicted, bool reference) {
    ++offered_;
    const bool better = offered_ == 1 || (favourite_is_reference_ && !reference) ||
                        (favourite_is_reference_ == reference && predicted < predicted_);
    if (!better) return;
    favourite_ = item;
    favourite_is_reference_ = reference;
    predicted_ = predicted;
  }
  void measured(const T& item, double seconds) {
    if (item == favourite_) favourite_is_measured_ = true;
    if (fastest_seconds_ > 0 && seconds >= fastest_seconds_) return;
    fastest_ = item;
    fastest_seconds_ = seconds;
  }

  bool empty() const { return offered_ == 0; }
  const T& favourite() const { return favourite_; }
  const T& best() const { return by_store() ? fastest_ : favourite_; }
  Chooser by() const {
    if (offered_ == 1) return Chooser::filter;
    return by_store() ? Chooser::store : Chooser::model;
  }

 private:
  bool by_store() const { return favourite_is_measured_; }

  int offered_ = 0;
  T favourite_ = {};
  bool favourite_is_reference_ = false;
  bool favourite_is_measured_ = false;
  double predicted_ = 0;
  T fastest_ = {};
  double fastest_seconds_ = 0;
};

}  // namespace voxgemm
