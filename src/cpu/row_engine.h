// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <span>
#include <type_traits>

#include "voxgemm/kernel_map.h"

namespace voxgemm::cpu {

// Results whose rows are made of lists of rows, column by column: depthwise convolution, pooling,
// weighted sums and their gradients. An engine has the arithmetic of one instruction set for one
// dtype; drivers (depthwise.cpp, pooling.cpp, sampling.cpp) make lists, share rows among threads
// and own all memory. An element's arithmetic is in the order of its list, whatever stands beside
// it.

// What sums of an element type are kept in.
template <class T>
using Sum = std::conditional_t<std::is_same_v<T, double>, double, float>;

// What one row of a result is made of.
struct RowList {
  const int32_t* rows = nullptr;  // [count], of x
  const int32_t* taps = nullptr;  // [count], of a convolution
  const void* factors = nullptr;  // [count] of Sum, of weighted sums
  int64_t count = 0;
};

struct RowArgs {
  const void* x;  // dtype, row r at x + r * x_stride elements, n columns
  int64_t x_stride;
  int n;
  const RowList* lists;  // [rows]
  int rows;
  void* y;  // dtype, [rows, n], row r at y + r * y_stride elements
  int64_t y_stride;
};

struct SumArgs {
  RowArgs rows;
  bool weighted = false;         // rows of x times the factors of the lists
  const void* scales = nullptr;  // Sum, [rows of x], what each is times; or null
  bool mean = false;             // the sum over the length of the list
};

struct ConvolveArgs {
  RowArgs rows;
  const void* weights;  // Sum, [taps, n], rows weight_stride apart; n at least lanes, with zeros
  int64_t weight_stride;
  const void* start;  // Sum, [n], likewise
};

struct PickArgs {
  RowArgs rows;
  bool smallest;     // instead of the largest
  int32_t* winners;  // null or [rows, n], contiguous
};

struct WonArgs {
  RowArgs rows;
  const int32_t* winners;  // [rows of x, n], contiguous
  int64_t first;           // the number of the first of `rows`
};

// The table of a map; numbers outside of [0, x_rows) are absent.
struct MapRows {
  const int32_t* numbers;  // of (tap, r) at numbers + tap * tap_stride + r
  int64_t tap_stride;
  int taps;
  int64_t x_rows;

  explicit MapRows(const KernelMap& map)
      : numbers(map.neighbours.as<const int32_t>()),
        tap_stride(map.neighbours.stride),
        taps(map.taps()),
        x_rows(map.n_in) {}
  MapRows() = default;
};

struct OuterRowsArgs {
  MapRows map;
  int64_t first;  // of the rows of dy, up to `last`
  int64_t last;
  const void* x;
  int64_t x_stride;
  const void* dy;
  int64_t dy_stride;
  int n;
  void* dw;  // Sum, [taps, n], rows dw_stride apart; n at least lanes
  int64_t dw_stride;
};

struct DotArgs {
  const void* x;
  int64_t x_stride;
  int64_t x_rows;
  const void* dy;  // [rows, n]
  int64_t dy_stride;
  int n;
  const int32_t* numbers;  // [rows, taps], of x
  int64_t taps;
  int64_t first;  // of the rows of dy, up to `last`
  int64_t last;
  void* dots;  // Sum, [rows, taps]
};

struct RowEngine {
  const char* isa;
  Dtype dtype;
  bool (*supported)();
  int lanes;  // columns that are computed together
  // Lists of rows [first, first + rows) of a map, at most list_rows, in the order of the taps;
  // memory: list_memory(taps).
  void (*list)(const MapRows&, int64_t first, int rows, int32_t* memory, RowList* lists);
  // y[r] = sum of the rows of x in list r, rounded once. Of an empty list 0.
  void (*sum)(const SumArgs&);
  // The same by sums in double, for lists that are long; without scales.
  void (*sum_in_double)(const SumArgs&);
  // Those sums themselves: y is double. Neither weighted nor means.
  void (*sum_to_double)(const RowArgs&);
  // y[r] = start + sum of x[row] * weights[tap], rounded once.
  void (*convolve)(const ConvolveArgs&);
  // y[r] = the largest element, of equals the first; NaN is larger, and smaller, than any. Of none
  // 0, with winner -1.
  void (*pick)(const PickArgs&);
  // y[r] = sum of the elements of x whose winner is r.
  void (*sum_won)(const WonArgs&);
  // dw[t] += sum over r of x[row of (t, r)] * dy[r].
  void (*outer)(const OuterRowsArgs&);
  // dots[r, t] = <x[row of (r, t)], dy[r]>, 0 where absent.
  void (*dot)(const DotArgs&);
};

constexpr int list_rows = 16;
constexpr int64_t list_memory(int64_t taps) { return (taps + 31) / 16 * 16 * list_rows * 3; }

// Of this build, best first.
std::span<const RowEngine* const> row_engines();
// The first for the dtype that this CPU runs.
const RowEngine& row_engine(Dtype dtype);

}  // namespace voxgemm::cpu
