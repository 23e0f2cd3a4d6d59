// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace voxgemm::cpu {

// The places of every row number in a list, ascending. Numbers outside [0, count)
// are in no list.
class RowLists {
 public:
  static bool is_row(int32_t row, int64_t count) { return static_cast<uint32_t>(row) < count; }

  RowLists(const int32_t* rows, int64_t places, int64_t count)
      : starts_(static_cast<size_t>(count) + 2, 0) {
    for (int64_t p = 0; p < places; ++p) {
      if (is_row(rows[p], count)) ++starts_[rows[p] + 2];
    }
    for (int64_t r = 0; r < count; ++r) starts_[r + 2] += starts_[r + 1];
    places_.resize(static_cast<size_t>(starts_[count + 1]));
    // Filling a list moves its start to its end, which is the start of the next.
    for (int64_t p = 0; p < places; ++p) {
      if (is_row(rows[p], count)) places_[starts_[rows[p] + 1]++] = p;
    }
  }
  std::span<const int64_t> of(int64_t row) const {
    return {places_.data() + starts_[row], places_.data() + starts_[row + 1]};
  }

 private:
  std::vector<int64_t> starts_;  // [count + 2]
  std::vector<int64_t> places_;
};

}  // namespace voxgemm::cpu
