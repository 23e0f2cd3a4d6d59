// SPDX-License-Identifier: Apache-2.0
#pragma once

// acc[acc_rows[i]] += x[in_rows[i]] W by broadcasts. A block of rows keeps its sums of one panel in
// registers: loaded from acc, all of a stretch of k added in rising order, stored back. Rows of x
// are read where they are when their words are what the inner loop broadcasts (f32; pairs of bf16
// for dot instructions), else they are converted to f32 in scratch first. All rows pass over one
// stretch of a panel before the next, which keeps it in the first-level cache.

#include <type_traits>
#include <utility>

#include "cpu/simd/panels.h"

namespace voxgemm::cpu::VOXGEMM_ISA {
namespace {

constexpr int cache_line = 64;

// Rows of a block by the vectors of its panel: sums, one row of the panel and one broadcast fill
// the registers.
template <int vectors>
constexpr int block_rows() {
  if constexpr (vector_registers == 32) {
    return vectors == 4 ? 6 : vectors == 3 ? 8 : vectors == 2 ? 12 : 10;
  }
  return vectors == 2 ? 6 : 10;
}

// What the inner loop does with a broadcast word of x and a vector of words of the panel.
struct WideDot {
  [[gnu::always_inline]] static F32s add(F32s a, F32s b, F32s sum) {
    return multiply_add(a, b, sum);
  }
};

struct Rows {
  const char* x;
  int64_t x_stride;  // bytes
  const int32_t* in_rows;
  const int32_t* acc_rows;
  const char* panel;  // at the first unit of the stretch
  int units;
  float* acc;
  int64_t acc_stride;
  // What the panel's memory is followed by is needed next: each block fetches a part of it,
  // `next_step` bytes from where the one before began. Without this wide weights (256 channels)
  // wait for a third-level cache: 215 instead of 235 GFLOP/s on Zen 5.
  const char* next;
  int64_t next_step;
};

template <class Dot, int vectors, int rows>
void multiply_blocks(const Rows& r, int first, int blocks) {
  // Copies: the compiler must assume that stores to acc change what r holds.
  const char* const x_base = r.x;
  const int64_t x_stride = r.x_stride;
  float* const acc_base = r.acc;
  const int64_t acc_stride = r.acc_stride;
  const char* const panel = r.panel;
  const int64_t units = r.units;
  const int64_t next_step = r.next_step;
  const char* next = r.next + first / rows * next_step;
  const int32_t* in_rows = r.in_rows + first;
  const int32_t* acc_rows = r.acc_rows + first;
  for (; blocks > 0; --blocks, in_rows += rows, acc_rows += rows) {
    const char* x[rows];
    F32s sum[rows][vectors];
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i) {
      x[i] = x_base + in_rows[i] * x_stride;
      const float* acc = acc_base + acc_rows[i] * acc_stride;
#pragma GCC unroll 4
      for (int64_t v = 0; v < vectors; ++v) sum[i][v] = load<F32s>(acc + v * lanes);
    }
    // Far enough that the rows come from a third-level cache in time: narrow blocks are done
    // sooner.
    constexpr int ahead = vectors == 1 ? 3 : 1;
    if (blocks > ahead) {
      for (int i = 0; i < rows; ++i) {
        const char* row = x_base + in_rows[ahead * rows + i] * x_stride;
        for (int64_t byte = 0; byte < units * 4; byte += cache_line) __builtin_prefetch(row + byte);
      }
    }
    const char* w = panel;
    int64_t u = 0;
    do {
      F32s b[vectors];
      if constexpr (2 * vectors > panel_vectors) __builtin_prefetch(next + u * cache_line, 0, 2);
#pragma GCC unroll 4
      for (int64_t v = 0; v < vectors; ++v) b[v] = load<F32s>(w + v * vector_bytes);
#pragma GCC unroll 16
      for (int i = 0; i < rows; ++i) {
        const F32s a = broadcast(x[i] + u * 4);
#pragma GCC unroll 4
        for (int64_t v = 0; v < vectors; ++v) sum[i][v] = Dot::add(a, b[v], sum[i][v]);
      }
      w += int64_t{vectors} * vector_bytes;
    } while (++u < units);
    next += next_step;
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i) {
      float* acc = acc_base + acc_rows[i] * acc_stride;
#pragma GCC unroll 4
      for (int64_t v = 0; v < vectors; ++v) store(acc + v * lanes, sum[i][v]);
    }
  }
}

using Blocks = void (*)(const Rows&, int first, int blocks);

template <class Dot, int vectors, int... less_one>
void multiply_panel(const Rows& r, int pairs, std::integer_sequence<int, less_one...>) {
  static constexpr Blocks blocks[] = {multiply_blocks<Dot, vectors, less_one + 1>...};
  const Cut cut(pairs, sizeof...(less_one));
  if (cut.larger > 0) blocks[cut.small](r, 0, cut.larger);
  blocks[cut.small - 1](r, cut.larger * (cut.small + 1), cut.pieces - cut.larger);
}

template <class Dot, int vectors>
void multiply_panel(const Rows& r, int pairs) {
  multiply_panel<Dot, vectors>(r, pairs, std::make_integer_sequence<int, block_rows<vectors>()>{});
}

struct Panels {
  int n;
  int units;   // to multiply
  int height;  // units of a panel with those that pad it
};

// Rows whose words are broadcast as they are.
template <class Dot>
void multiply_rows(Rows r, const Panels& w, int pairs) {
  if (pairs == 0) return;
  // 24 KB of a panel leave room for the rows in a first-level cache of 32 KB.
  constexpr int stretch = 24 * 1024 / (panel_vectors * vector_bytes);
  const Cut panels(vectors_of(w.n), panel_vectors);
  const Cut stretches(w.units, stretch);
  const int blocks = Cut(pairs, block_rows<panel_vectors>()).pieces;
  const char* const x = r.x;
  const char* panel = r.panel;
  for (int p = 0; p < panels.pieces; ++p) {
    const int vectors = panels.size(p);
    r.x = x;
    r.panel = panel;
    for (int s = 0; s < stretches.pieces; ++s) {
      r.units = stretches.size(s);
      const int64_t bytes = static_cast<int64_t>(r.units) * vectors * vector_bytes;
      r.next = r.panel + bytes;
      r.next_step = bytes / blocks + cache_line;
      if (vectors == 1) multiply_panel<Dot, 1>(r, pairs);
      if (vectors == 2) multiply_panel<Dot, 2>(r, pairs);
      if constexpr (panel_vectors > 2) {
        if (vectors == 3) multiply_panel<Dot, 3>(r, pairs);
        if (vectors == 4) multiply_panel<Dot, 4>(r, pairs);
      }
      r.panel += bytes;
      r.x += static_cast<size_t>(r.units) * 4;
    }
    panel += static_cast<size_t>(w.height) * vectors * vector_bytes;
    r.acc += int64_t{vectors} * lanes;
  }
}

// Rows that are copied at a time: 256 KB of them stay in a second-level cache.
constexpr int most_copied = 128;
constexpr int copied_rows(int row_bytes) {
  const int rows = 256 * 1024 / row_bytes;
  return rows < 16 ? 16 : rows < most_copied ? rows : most_copied;
}

struct Counting {
  int32_t value[most_copied] = {};
  constexpr Counting() {
    for (int i = 0; i < most_copied; ++i) value[i] = i;
  }
};
constexpr Counting counting;

template <class T>
Rows rows_in_place(const MultiplyArgs& a) {
  return {.x = static_cast<const char*>(a.x),
          .x_stride = a.x_stride * static_cast<int64_t>(sizeof(T)),
          .in_rows = a.in_rows,
          .acc_rows = a.acc_rows,
          .panel = static_cast<const char*>(a.packed),
          .units = 0,
          .acc = a.acc,
          .acc_stride = a.acc_stride,
          .next = nullptr,
          .next_step = 0};
}

// Calls multiply_copies(rows, count) for scratch with `count` rows of row_bytes at a time, each
// filled by copy(x row, scratch row).
template <class T, class Copy, class Multiply>
void multiply_copies(const MultiplyArgs& a, int row_bytes, Copy copy, Multiply multiply) {
  Rows r = rows_in_place<T>(a);
  const int most = copied_rows(row_bytes);
  auto* copies = static_cast<char*>(a.scratch);
  r.x = copies;
  r.x_stride = row_bytes;
  r.in_rows = counting.value;
  for (int first = 0; first < a.pairs; first += most) {
    const int rows = a.pairs - first < most ? a.pairs - first : most;
    for (int i = 0; i < rows; ++i) {
      copy(static_cast<const T*>(a.x) + a.in_rows[first + i] * a.x_stride,
           copies + static_cast<size_t>(i) * row_bytes);
    }
    r.acc_rows = a.acc_rows + first;
    multiply(r, rows);
  }
}

template <class T>
void multiply(const MultiplyArgs& a) {
  const Panels w = {.n = a.n, .units = a.k, .height = a.k};
  if constexpr (sizeof(T) == 4) {
    multiply_rows<WideDot>(rows_in_place<T>(a), w, a.pairs);
  } else {
    multiply_copies<T>(
        a, round_up(a.k, lanes) * 4,
        [&](const T* from, char* to) { widen_row(from, a.k, reinterpret_cast<float*>(to)); },
        [&](const Rows& r, int rows) { multiply_rows<WideDot>(r, w, rows); });
  }
}

}  // namespace
}  // namespace voxgemm::cpu::VOXGEMM_ISA
