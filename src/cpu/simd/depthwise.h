// SPDX-License-Identifier: Apache-2.0
#pragma once

// Depthwise convolution: every column by itself, so each element of x that a tap reads is one
// multiply-add.
//
// Rows: sixteen at a time get lists of their present taps, without a branch for each of them. Then
// a row's sums stay in registers while its list passes. Fetching the rows of the next sixteen ahead
// was no faster, in raster order and in none.
//
// Weight gradient: of a block of rows a tap at a time: its sums stay in registers while the pairs
// pass, several sets of them where a row is so narrow that each multiply-add would wait for the one
// before.
//
// The last vector of a row ends with the row, and so may begin inside the one before: both have the
// same sums. Rows narrower than a vector are read in part.

#include "cpu/simd/panels.h"
#include "cpu/simd/rows.h"

namespace voxgemm::cpu::VOXGEMM_ISA {
namespace {

constexpr int panel_most = 8;  // vectors whose sums are in registers
constexpr int gather_rows = 16;

// Numbers of rows outside [0, rows) become -1.
[[gnu::always_inline]] inline int32_t row_or_none(int32_t row, int64_t rows) {
  return static_cast<uint32_t>(row) < static_cast<uint64_t>(rows) ? row : -1;
}

// The present taps of sixteen rows in scratch.
struct TapLists {
  int64_t pitch;
  int32_t* numbers;  // [rows, pitch], with all taps
  int32_t* in;       // [rows, pitch]
  int32_t* taps;     // [rows, pitch]
  int counts[gather_rows];

  // compact() writes and reads up to 16 further.
  TapLists(int taps_here, int32_t* scratch)
      : pitch(depthwise_scratch(taps_here) / (3 * gather_rows)),
        numbers(scratch),
        in(numbers + gather_rows * pitch),
        taps(in + gather_rows * pitch) {}

  void find(const DepthwiseRows& a, int64_t first, int rows) {
#if defined(__AVX512F__)
    const __mmask16 inside = rows >= 16 ? 0xffff : (1U << rows) - 1;
    const __m512i none = _mm512_set1_epi32(-1);
    const __m512i limit = _mm512_set1_epi32(static_cast<int>(a.x_rows));
    for (int tap = 0; tap < a.taps; tap += 16) {
      U32s square[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        if (tap + i >= a.taps) {
          square[i] = (U32s)none;
          continue;
        }
        const int32_t* from = a.numbers + (tap + i) * a.tap_stride + first;
        const __m512i row = _mm512_maskz_loadu_epi32(inside, from);
        const __mmask16 there = _mm512_mask_cmplt_epu32_mask(inside, row, limit);
        square[i] = (U32s)_mm512_mask_mov_epi32(none, there, row);
      }
      transpose(square);
#pragma GCC unroll 16
      for (int64_t i = 0; i < 16; ++i) store(numbers + i * pitch + tap, square[i]);
    }
#else
    for (int tap = 0; tap < a.taps; ++tap) {
      const int32_t* from = a.numbers + tap * a.tap_stride + first;
      for (int64_t i = 0; i < rows; ++i) numbers[i * pitch + tap] = row_or_none(from[i], a.x_rows);
    }
#endif
    for (int64_t i = 0; i < rows; ++i) {
      counts[i] = compact(numbers + i * pitch, a.taps, 0, in + i * pitch, taps + i * pitch);
    }
  }
};

// Which columns a panel of `vectors` vectors has: `at(v)` is the first of a vector.
template <int vectors>
struct Panel {
  int first;
  int last;  // where the last vector begins
  [[gnu::always_inline]] int at(int v) const { return v + 1 < vectors ? first + v * lanes : last; }
};

// Whether rows are narrower than a vector.
template <bool part>
struct Part {};

// body(Part<>, Panel<>) for all columns.
template <class Body>
[[gnu::always_inline]] inline void for_panels(int n, const Body& body) {
  if (n < lanes) return body(Part<true>{}, Panel<1>{0, 0});
  const Cut panels((n + lanes - 1) / lanes, panel_most);
  for (int p = 0, first = 0; p < panels.pieces; ++p) {
    const int end = first + panels.size(p) * lanes;
    const int last = (end < n ? end : n) - lanes;
    const auto run = [&]<int vectors>() { body(Part<false>{}, Panel<vectors>{first, last}); };
    switch (panels.size(p)) {
      case 1:
        run.template operator()<1>();
        break;
      case 2:
        run.template operator()<2>();
        break;
      case 3:
        run.template operator()<3>();
        break;
      case 4:
        run.template operator()<4>();
        break;
      case 5:
        run.template operator()<5>();
        break;
      case 6:
        run.template operator()<6>();
        break;
      case 7:
        run.template operator()<7>();
        break;
      default:
        run.template operator()<8>();
    }
    first = end;
  }
}

template <bool part, class T>
[[gnu::always_inline]] inline F32s load_columns_of(const T* from, int n) {
  if constexpr (part) return load_part(from, n);
  return load_f32(from);
}

template <class T, bool part, int vectors>
void convolve_panel(
    const DepthwiseArgs& a, const TapLists& lists, int64_t first, int rows, Panel<vectors> panel) {
  const int n = a.from.n;
  const T* x = static_cast<const T*>(a.from.x);
  for (int64_t r = 0; r < rows; ++r) {
    const int32_t* in = lists.in + r * lists.pitch;
    const int32_t* taps = lists.taps + r * lists.pitch;
    F32s sum[vectors];
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) sum[v] = load<F32s>(a.start + panel.at(v));
    for (int i = 0; i < lists.counts[r]; ++i) {
      const T* row = x + in[i] * a.from.x_stride;
      const float* weights = a.weights + taps[i] * a.weight_stride;
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) {
        sum[v] = multiply_add(load_columns_of<part>(row + panel.at(v), n),
                              load<F32s>(weights + panel.at(v)), sum[v]);
      }
    }
    T* y = static_cast<T*>(a.y) + (first + r) * a.y_stride;
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      if constexpr (part) {
        store_part(y, sum[v], n);
      } else {
        store_f32(y + panel.at(v), sum[v]);
      }
    }
  }
}

template <class T>
void depthwise(const DepthwiseArgs& a) {
  TapLists lists(a.from.taps, a.scratch);
  for (int64_t first = a.from.first; first < a.from.last; first += gather_rows) {
    const int64_t rest = a.from.last - first;
    const int rows = rest < gather_rows ? static_cast<int>(rest) : gather_rows;
    lists.find(a.from, first, rows);
    for_panels(a.from.n, [&]<bool part>(Part<part>, auto panel) {
      convolve_panel<T, part>(a, lists, first, rows, panel);
    });
  }
}

// The pairs of a tap in a block of rows.
constexpr int pair_rows = 256;
struct TapPairs {
  int32_t in[pair_rows + 16];
  int32_t out[pair_rows + 16];
  int count;

  TapPairs(const DepthwiseRows& a, int tap, int64_t first, int rows) {
    const int32_t* from = a.numbers + tap * a.tap_stride + first;
    int32_t numbers[pair_rows];
    for (int i = 0; i < rows; ++i) numbers[i] = row_or_none(from[i], a.x_rows);
    count = compact(numbers, rows, 0, in, out);
  }
};

template <class T, bool part, int vectors>
void add_pairs(const DepthwiseOuterArgs& a,
               const TapPairs& pairs,
               int64_t first,
               float* dw,
               Panel<vectors> panel) {
  constexpr int sets = vectors == 1 ? 4 : vectors <= 4 ? 2 : 1;
  const int n = a.from.n;
  const T* x = static_cast<const T*>(a.from.x);
  const T* dy = static_cast<const T*>(a.dy) + first * a.dy_stride;
  F32s sum[sets][vectors] = {};
  const auto add = [&](int set, int pair) __attribute__((always_inline)) {
    const T* row = x + pairs.in[pair] * a.from.x_stride;
    const T* gradient = dy + pairs.out[pair] * a.dy_stride;
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      sum[set][v] = multiply_add(load_columns_of<part>(row + panel.at(v), n),
                                 load_columns_of<part>(gradient + panel.at(v), n), sum[set][v]);
    }
  };
  int pair = 0;
  for (; pair + sets <= pairs.count; pair += sets) {
#pragma GCC unroll 4
    for (int set = 0; set < sets; ++set) add(set, pair + set);
  }
  for (; pair < pairs.count; ++pair) add(0, pair);
    // Read before any is written: the last vector may begin inside the one before.
#pragma GCC unroll 8
  for (int v = 0; v < vectors; ++v) {
#pragma GCC unroll 4
    for (int set = 1; set < sets; ++set) sum[0][v] += sum[set][v];
    sum[0][v] += load<F32s>(dw + panel.at(v));
  }
#pragma GCC unroll 8
  for (int v = 0; v < vectors; ++v) store(dw + panel.at(v), sum[0][v]);
}

template <class T>
void depthwise_outer(const DepthwiseOuterArgs& a) {
  for (int64_t first = a.from.first; first < a.from.last; first += pair_rows) {
    const int64_t rest = a.from.last - first;
    const int rows = rest < pair_rows ? static_cast<int>(rest) : pair_rows;
    for (int tap = 0; tap < a.from.taps; ++tap) {
      const TapPairs pairs(a.from, tap, first, rows);
      float* dw = a.dw + tap * a.dw_stride;
      for_panels(a.from.n, [&]<bool part>(Part<part>, auto panel) {
        add_pairs<T, part>(a, pairs, first, dw, panel);
      });
    }
  }
}

}  // namespace
}  // namespace voxgemm::cpu::VOXGEMM_ISA
