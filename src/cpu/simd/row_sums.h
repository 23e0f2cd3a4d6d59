// SPDX-License-Identifier: Apache-2.0
#pragma once

// Rows that are made of lists of rows. Lists of a map come sixteen at a time, without a branch for
// each tap; then a row's sums stay in registers while its list passes. Fetching the rows of the
// next sixteen ahead was no faster, in raster order and in none.

#include "cpu/row_engine.h"
#include "cpu/simd/columns.h"
#include "cpu/simd/rows.h"
#include "cpu/simd/transpose.h"

namespace voxgemm::cpu::VOXGEMM_ISA {
namespace {

// Numbers of rows outside [0, rows) become -1.
[[gnu::always_inline]] inline int32_t row_or_none(int32_t row, int64_t rows) {
  return static_cast<uint32_t>(row) < static_cast<uint64_t>(rows) ? row : -1;
}

// Memory is numbers, rows and taps [list_rows, pitch]: compact() writes and reads up to 16 further
// than there are taps.
void list_taps(const MapRows& map, int64_t first, int rows, int32_t* memory, RowList* lists) {
  const int64_t pitch = list_memory(map.taps) / 3 / list_rows;
  int32_t* numbers = memory;
  int32_t* in = numbers + list_rows * pitch;
  int32_t* taps = in + list_rows * pitch;
#if defined(__AVX512F__)
  const __mmask16 inside = rows >= 16 ? 0xffff : (1U << rows) - 1;
  const __m512i none = _mm512_set1_epi32(-1);
  const __m512i limit = _mm512_set1_epi32(static_cast<int>(map.x_rows));
  for (int tap = 0; tap < map.taps; tap += 16) {
    U32s square[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
      if (tap + i >= map.taps) {
        square[i] = (U32s)none;
        continue;
      }
      const int32_t* from = map.numbers + (tap + i) * map.tap_stride + first;
      const __m512i row = _mm512_maskz_loadu_epi32(inside, from);
      const __mmask16 there = _mm512_mask_cmplt_epu32_mask(inside, row, limit);
      square[i] = (U32s)_mm512_mask_mov_epi32(none, there, row);
    }
    transpose(square);
#pragma GCC unroll 16
    for (int64_t i = 0; i < 16; ++i) store(numbers + i * pitch + tap, square[i]);
  }
#else
  for (int tap = 0; tap < map.taps; ++tap) {
    const int32_t* from = map.numbers + tap * map.tap_stride + first;
    for (int64_t i = 0; i < rows; ++i) numbers[i * pitch + tap] = row_or_none(from[i], map.x_rows);
  }
#endif
  for (int64_t i = 0; i < rows; ++i) {
    const int count = compact(numbers + i * pitch, map.taps, 0, in + i * pitch, taps + i * pitch);
    lists[i] = {.rows = in + i * pitch, .taps = taps + i * pitch, .count = count};
  }
}

// What a row of x adds to sums V: `entry` is made once for a row, `add` is called for its vectors.
template <class V>
struct Plain {
  struct Entry {};
  Entry entry(const RowList&, int64_t) const { return {}; }
  template <class P>
  V add(V sum, V x, Entry, const P&, int) const {
    return sum + x;
  }
};
// Times factor(list, i).
template <class V, class Factor>
struct Scaled {
  Factor factor;
  V entry(const RowList& list, int64_t i) const { return all<V>(factor(list, i)); }
  template <class P>
  V add(V sum, V x, V scale, const P&, int) const {
    return multiply_add(x, scale, sum);
  }
};
template <class V>
struct Products {
  using S = typename Of<V>::Element;
  const S* weights;
  int64_t stride;
  const S* entry(const RowList& list, int64_t i) const { return weights + list.taps[i] * stride; }
  template <class P>
  V add(V sum, V x, const S* row, const P& panel, int v) const {
    return multiply_add(x, panel.whole(row, v), sum);
  }
};

// start: null, or what sums begin with.
template <class T, class Out, class V, int vectors, bool part, class Terms>
void sum_panel(const RowArgs& a,
               const Panel<V, vectors, part>& panel,
               const Terms& terms,
               const typename Of<V>::Element* start,
               bool mean) {
  for (int64_t r = 0; r < a.rows; ++r) {
    const RowList& list = a.lists[r];
    V sum[vectors] = {};
    if (start != nullptr) {
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) sum[v] = panel.whole(start, v);
    }
    for (int64_t i = 0; i < list.count; ++i) {
      const T* x = static_cast<const T*>(a.x) + list.rows[i] * a.x_stride;
      const auto entry = terms.entry(list, i);
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) {
        sum[v] = terms.add(sum[v], panel.load_row(x, v), entry, panel, v);
      }
    }
    if (mean && list.count > 1) {
      const V divisor = all<V>(static_cast<typename Of<V>::Element>(list.count));
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) sum[v] /= divisor;
    }
    Out* y = static_cast<Out*>(a.y) + r * a.y_stride;
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) panel.store_row(y, v, sum[v]);
  }
}

template <class T, class Out, class V, class Terms>
void sum_rows(const RowArgs& a,
              const Terms& terms,
              const typename Of<V>::Element* start = nullptr,
              bool mean = false) {
  for_panels<V>(a.n, [&](const auto& panel) { sum_panel<T, Out>(a, panel, terms, start, mean); });
}

template <class T>
using SumsOf = std::conditional_t<sizeof(T) == sizeof(double), F64s, F32s>;

template <class T, class V>
void sum_weighted(const RowArgs& a) {
  const auto factor = [](const RowList& list, int64_t i) __attribute__((always_inline)) {
    return static_cast<const typename Of<SumsOf<T>>::Element*>(list.factors)[i];
  };
  sum_rows<T, T, V>(a, Scaled<V, decltype(factor)>{factor});
}

template <class T>
void sum(const SumArgs& a) {
  using V = SumsOf<T>;
  if (a.weighted) return sum_weighted<T, V>(a.rows);
  if (a.scales == nullptr) return sum_rows<T, T, V>(a.rows, Plain<V>{}, nullptr, a.mean);
  const auto* scales = static_cast<const typename Of<V>::Element*>(a.scales);
  const auto factor = [=](const RowList& list, int64_t i) __attribute__((always_inline)) {
    return scales[list.rows[i]];
  };
  sum_rows<T, T, V>(a.rows, Scaled<V, decltype(factor)>{factor});
}

template <class T>
void sum_in_double(const SumArgs& a) {
  if (a.weighted) return sum_weighted<T, F64s>(a.rows);
  sum_rows<T, T, F64s>(a.rows, Plain<F64s>{}, nullptr, a.mean);
}

template <class T>
void sum_to_double(const RowArgs& a) {
  sum_rows<T, double, F64s>(a, Plain<F64s>{});
}

template <class T>
void convolve(const ConvolveArgs& a) {
  using V = SumsOf<T>;
  using S = typename Of<V>::Element;
  const Products<V> products = {static_cast<const S*>(a.weights), a.weight_stride};
  sum_rows<T, T, V>(a.rows, products, static_cast<const S*>(a.start));
}

// Elements with their sign turned are the largest where the smallest are asked for.
template <class T, class V, int vectors, bool part>
void pick_panel(const PickArgs& a, const Panel<V, vectors, part>& panel) {
  using Ints = typename Of<V>::Ints;
  const V zero = all<V>(a.smallest ? -0.0F : 0.0F);
  const auto turned = [&](V v) __attribute__((always_inline)) { return (V)((Ints)v ^ (Ints)zero); };
  for (int64_t r = 0; r < a.rows.rows; ++r) {
    const RowList& list = a.rows.lists[r];
    const auto row_of = [&](int64_t i) {
      return static_cast<const T*>(a.rows.x) + list.rows[i] * a.rows.x_stride;
    };
    const bool some = list.count > 0;
    V held[vectors];
    Ints won[vectors];
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      held[v] = some ? turned(panel.load_row(row_of(0), v)) : zero;
      won[v] = (some ? list.rows[0] : -1) - Ints{};
    }
    for (int64_t i = 1; i < list.count; ++i) {
      const T* x = row_of(i);
      const Ints row = list.rows[i] - Ints{};
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) {
        const V value = turned(panel.load_row(x, v));
        // Better than any but NaN.
        const Ints wins = ~(value <= held[v]) & (held[v] == held[v]);
        held[v] = wins ? value : held[v];
        won[v] = wins ? row : won[v];
      }
    }
    T* y = static_cast<T*>(a.rows.y) + r * a.rows.y_stride;
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      panel.store_row(y, v, turned(held[v]));
      if (a.winners != nullptr) panel.store_row_ints(a.winners + r * a.rows.n, v, won[v]);
    }
  }
}

template <class T>
void pick(const PickArgs& a) {
  for_panels<SumsOf<T>>(a.rows.n, [&](const auto& panel) { pick_panel<T>(a, panel); });
}

template <class V>
struct Won {
  using Ints = typename Of<V>::Ints;
  const int32_t* winners;
  int n;
  Ints row;
  const int32_t* entry(const RowList& list, int64_t i) const {
    return winners + int64_t{list.rows[i]} * n;
  }
  template <class P>
  V add(V sum, V x, const int32_t* entry, const P& panel, int v) const {
    return sum + (panel.load_row_ints(entry, v) == row ? x : V{});
  }
};

template <class T>
void sum_won(const WonArgs& a) {
  using V = SumsOf<T>;
  RowArgs one = a.rows;
  one.rows = 1;
  for (int64_t r = 0; r < a.rows.rows; ++r) {
    one.lists = a.rows.lists + r;
    one.y = static_cast<T*>(a.rows.y) + r * a.rows.y_stride;
    const auto row = static_cast<int32_t>(a.first + r) - typename Of<V>::Ints{};
    const Won<V> won = {a.winners, one.n, row};
    sum_rows<T, T, V>(one, won);
  }
}

// In lanes, which are added by halves.
template <class V>
[[gnu::always_inline]] inline auto total(V v) {
  using S = std::remove_cvref_t<decltype(v[0])>;
  if constexpr (sizeof v == 2 * sizeof(S)) {
    return v[0] + v[1];
  } else {
    using Half [[gnu::vector_size(sizeof v / 2)]] = S;
    Half halves[2];
    std::memcpy(halves, &v, sizeof v);
    return total<Half>(halves[0] + halves[1]);
  }
}

template <class T>
void dot(const DotArgs& a) {
  using V = SumsOf<T>;
  using S = typename Of<V>::Element;
  constexpr int width = lanes_of<V>;
  for (int64_t r = a.first; r < a.last; ++r) {
    const T* dy = static_cast<const T*>(a.dy) + r * a.dy_stride;
    for (int64_t place = r * a.taps; place < (r + 1) * a.taps; ++place) {
      const int32_t row = row_or_none(a.numbers[place], a.x_rows);
      const int n = row < 0 ? 0 : a.n;
      const T* x = static_cast<const T*>(a.x) + (row < 0 ? 0 : row) * a.x_stride;
      V sum = {};
      int c = 0;
      for (; c + width <= n; c += width) {
        sum = multiply_add(load_as<V>(x + c), load_as<V>(dy + c), sum);
      }
      if (c < n) {
        const Panel<V, 1, true> rest = {0, 0, n - c};
        sum = multiply_add(rest.load_row(x + c, 0), rest.load_row(dy + c, 0), sum);
      }
      static_cast<S*>(a.dots)[place] = total(sum);
    }
  }
}

// The pairs of a tap in a block of rows.
constexpr int pair_rows = 256;
struct TapPairs {
  int32_t in[pair_rows + 16];
  int32_t out[pair_rows + 16];
  int count;

  TapPairs(const MapRows& map, int tap, int64_t first, int rows) {
    const int32_t* from = map.numbers + tap * map.tap_stride + first;
    int32_t numbers[pair_rows];
    for (int i = 0; i < rows; ++i) numbers[i] = row_or_none(from[i], map.x_rows);
    count = compact(numbers, rows, 0, in, out);
  }
};

template <class T, class V, int vectors, bool part>
void add_pairs(const OuterRowsArgs& a,
               const TapPairs& pairs,
               int64_t first,
               typename Of<V>::Element* dw,
               const Panel<V, vectors, part>& panel) {
  // Several sets of sums where each multiply-add would wait for the one before.
  constexpr int sets = vectors == 1 ? 4 : vectors <= 4 ? 2 : 1;
  const T* dy = static_cast<const T*>(a.dy) + first * a.dy_stride;
  V sum[sets][vectors] = {};
  const auto add = [&](int set, int pair) __attribute__((always_inline)) {
    const T* row = static_cast<const T*>(a.x) + pairs.in[pair] * a.x_stride;
    const T* gradient = dy + pairs.out[pair] * a.dy_stride;
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      sum[set][v] = multiply_add(panel.load_row(row, v), panel.load_row(gradient, v), sum[set][v]);
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
    sum[0][v] = panel.own(v, sum[0][v]) + panel.whole(dw, v);
  }
#pragma GCC unroll 8
  for (int v = 0; v < vectors; ++v) store(dw + panel.at(v), sum[0][v]);
}

// A tap at a time of a block of rows: its sums stay in registers while its pairs pass.
template <class T>
void outer_rows(const OuterRowsArgs& a) {
  using V = SumsOf<T>;
  for (int64_t first = a.first; first < a.last; first += pair_rows) {
    const int64_t rest = a.last - first;
    const int rows = rest < pair_rows ? static_cast<int>(rest) : pair_rows;
    for (int tap = 0; tap < a.map.taps; ++tap) {
      const TapPairs pairs(a.map, tap, first, rows);
      auto* dw = static_cast<typename Of<V>::Element*>(a.dw) + tap * a.dw_stride;
      for_panels<V>(a.n, [&](const auto& panel) { add_pairs<T>(a, pairs, first, dw, panel); });
    }
  }
}

}  // namespace
}  // namespace voxgemm::cpu::VOXGEMM_ISA
