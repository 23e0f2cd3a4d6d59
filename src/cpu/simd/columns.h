// SPDX-License-Identifier: Apache-2.0
#pragma once

// Columns of a row as vectors of float or double sums, and the cut of a row into panels of vectors
// that stay in registers.
//
// The last vector of a row ends with the row, and so may begin inside the one before: both have the
// same sums. Rows narrower than a vector are read in part.

#include <utility>

#include "cpu/simd/vector.h"

namespace voxgemm::cpu::VOXGEMM_ISA {
namespace {

using F64s [[gnu::vector_size(vector_bytes)]] = double;
using I64s [[gnu::vector_size(vector_bytes)]] = int64_t;
using U64s [[gnu::vector_size(vector_bytes)]] = uint64_t;

// What belongs to sums V: their element, as many whole numbers, and half a vector's bytes.
template <class V>
struct Of;
template <>
struct Of<F32s> {
  using Element = float;
  using Ints = I32s;
};
template <>
struct Of<F64s> {
  using Element = double;
  using Ints = I64s;
};
using F32Half [[gnu::vector_size(vector_bytes / 2)]] = float;
using I32Half [[gnu::vector_size(vector_bytes / 2)]] = int32_t;
using U32Half [[gnu::vector_size(vector_bytes / 2)]] = uint32_t;
using U16Quarter [[gnu::vector_size(vector_bytes / 4)]] = uint16_t;

template <class V>
constexpr int lanes_of = vector_bytes / static_cast<int>(sizeof(typename Of<V>::Element));

template <class V>
[[gnu::always_inline]] inline V all(typename Of<V>::Element value) {
  if constexpr (lanes_of<V> == lanes) {
    return broadcast(&value);
  } else {
#if defined(__AVX512F__)
    return _mm512_set1_pd(value);
#else
    return value - V{};
#endif
  }
}

[[gnu::always_inline]] inline F64s multiply_add(F64s a, F64s b, F64s sum) {
#if defined(__AVX512F__)
  return _mm512_fmadd_pd(a, b, sum);
#elif defined(__FMA__)
  return _mm256_fmadd_pd(a, b, sum);
#else
  return a * b + sum;
#endif
}

// The first lanes of v, or v again and again.
template <class To, class From>
[[gnu::always_inline]] inline To resized(From v) {
  constexpr size_t from = sizeof(From) / sizeof(v[0]);
  constexpr size_t to = sizeof(To) / sizeof(v[0]);
  return [&]<size_t... i>(std::index_sequence<i...>) __attribute__((always_inline)) {
    return __builtin_shufflevector(v, v, (i % from)...);
  }
  (std::make_index_sequence<to>());
}

// lanes_of<V> elements.
template <class V, class T>
[[gnu::always_inline]] inline V load_as(const T* from) {
  if constexpr (lanes_of<V> == lanes) {
    return load_f32(from);
  } else if constexpr (sizeof(T) == sizeof(double)) {
    return load<V>(from);
  } else if constexpr (sizeof(T) == sizeof(float)) {
    return __builtin_convertvector(load<F32Half>(from), V);
  } else {
    const F32s wide = widen(resized<U16s>(load<U16Quarter>(from)), T{});
    return __builtin_convertvector(resized<F32Half>(wide), V);
  }
}
template <class V>
[[gnu::always_inline]] inline typename Of<V>::Ints load_ints(const int32_t* from) {
  if constexpr (lanes_of<V> == lanes) {
    return load<I32s>(from);
  } else {
    return __builtin_convertvector(load<I32Half>(from), I64s);
  }
}

// To f32 with what is lost kept as an odd last bit, so that rounding on to 16 bits is as of the
// double: round_to_odd() of core/half.h.
[[gnu::always_inline]] inline F32Half to_odd(F64s value) {
  const F32Half nearest = __builtin_convertvector(value, F32Half);
  const F64s back = __builtin_convertvector(nearest, F64s);
  const I64s infinite = back - back != 0;  // and NaN
  const I64s magnitude = (I64s)back & INT64_MAX;
  const I64s wanted = (I64s)value & INT64_MAX;
  const I64s lost = (magnitude != wanted) & ~infinite;
  const U32Half away = (U32Half) __builtin_convertvector(lost & (magnitude > wanted), I32Half);
  const U32Half odd = (U32Half) __builtin_convertvector(lost, I32Half) & 1;
  return (F32Half)(((U32Half)nearest + away) | odd);
}

template <class V, class T>
[[gnu::always_inline]] inline void store_as(T* to, V v) {
  if constexpr (lanes_of<V> == lanes) {
    store_f32(to, v);
  } else if constexpr (sizeof(T) == sizeof(double)) {
    store(to, v);
  } else if constexpr (sizeof(T) == sizeof(float)) {
    store(to, __builtin_convertvector(v, F32Half));
  } else {
    store(to, resized<U16Quarter>(narrow(resized<F32s>(to_odd(v)), T{})));
  }
}
template <class Ints>
[[gnu::always_inline]] inline void store_ints(int32_t* to, Ints v) {
  if constexpr (sizeof(v[0]) == sizeof(int32_t)) {
    store(to, v);
  } else {
    store(to, __builtin_convertvector(v, I32Half));
  }
}

// Which columns a panel of `vectors` vectors V has; all `n` < a vector of a row in part.
template <class V, int vectors, bool part>
struct Panel {
  static constexpr int width = lanes_of<V>;
  using Ints = typename Of<V>::Ints;
  int first;
  int last;  // where the last vector begins
  int n;

  [[gnu::always_inline]] int at(int v) const { return v + 1 < vectors ? first + v * width : last; }
  // Of memory with a whole vector's columns, and of rows.
  template <class S>
  [[gnu::always_inline]] V whole(const S* row, int v) const {
    return load<V>(row + at(v));
  }
  template <class T>
  [[gnu::always_inline]] V load_row(const T* row, int v) const {
    if constexpr (!part) return load_as<V>(row + at(v));
    T some[width] = {};
    for (int i = 0; i < n; ++i) some[i] = row[i];
    return load_as<V>(some);
  }
  [[gnu::always_inline]] Ints load_row_ints(const int32_t* row, int v) const {
    if constexpr (!part) return load_ints<V>(row + at(v));
    int32_t some[width] = {};
    for (int i = 0; i < n; ++i) some[i] = row[i];
    return load_ints<V>(some);
  }
  // Zeros for columns of the panel before, into which the only vector of a panel may reach.
  [[gnu::always_inline]] V own(int v, V value) const {
    if (part || at(v) >= first) return value;
    Ints columns;
    for (int i = 0; i < width; ++i) columns[i] = at(v) + i;
    return columns >= first ? value : V{};
  }
  template <class T>
  [[gnu::always_inline]] void store_row(T* row, int v, V value) const {
    if constexpr (!part) return store_as(row + at(v), value);
    T some[width];
    store_as(some, value);
    for (int i = 0; i < n; ++i) row[i] = some[i];
  }
  [[gnu::always_inline]] void store_row_ints(int32_t* row, int v, Ints value) const {
    if constexpr (!part) return store_ints(row + at(v), value);
    int32_t some[width];
    store_ints(some, value);
    for (int i = 0; i < n; ++i) row[i] = some[i];
  }
};

// body(Panel) for all columns, in panels of as many vectors as registers hold, or of what is left.
constexpr int panel_most = vector_registers / 4;
template <class V, int vectors, class Body>
[[gnu::always_inline]] inline void run_panels(int n, int left, int first, const Body& body) {
  for (; left >= vectors; left -= vectors) {
    const int end = first + vectors * lanes_of<V>;
    body(Panel<V, vectors, false>{first, (end < n ? end : n) - lanes_of<V>, n});
    first = end;
  }
  constexpr int fewer = vectors > 4 ? vectors - 2 : vectors - 1;  // 8, 6, 4, 3, 2, 1
  if constexpr (fewer > 0) run_panels<V, fewer>(n, left, first, body);
}
template <class V, class Body>
[[gnu::always_inline]] inline void for_panels(int n, const Body& body) {
  if (n < lanes_of<V>) return body(Panel<V, 1, true>{0, 0, n});
  run_panels<V, panel_most>(n, (n + lanes_of<V> - 1) / lanes_of<V>, 0, body);
}

}  // namespace
}  // namespace voxgemm::cpu::VOXGEMM_ISA
