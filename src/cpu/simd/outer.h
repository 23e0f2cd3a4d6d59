// SPDX-License-Identifier: Apache-2.0
#pragma once

// dw += sum over pairs of x row^T dy row. A tile of dw stays in registers while all pairs pass:
// rows of x are broadcast word by word, rows of dy loaded as vectors. Rows are read where they are
// if they are f32 and dy's are whole vectors, else copied to scratch as f32, dy's with zeros up to
// whole vectors.

#include "cpu/simd/multiply.h"

namespace voxgemm::cpu::VOXGEMM_ISA {
namespace {

// Rows of a register tile of dw by its vectors.
template <int vectors>
constexpr int tile_rows() {
  if constexpr (vector_registers == 32) {
    return vectors == 4 ? 6 : vectors == 3 ? 8 : vectors == 2 ? 12 : 16;
  }
  return vectors == 2 ? 6 : 8;
}

struct Outer {
  const char* x;     // at the first k of the tile
  int64_t x_stride;  // bytes
  const int32_t* x_rows;
  const char* dy;     // at the first column of the panel
  int64_t dy_stride;  // bytes
  const int32_t* dy_rows;
  int pairs;
  float* dw;
  int64_t dw_stride;
  int cols;  // of dw in the panel
};

template <class Dot, int vectors, int rows>
void outer_tile(const Outer& o) {
  F32s sum[rows][vectors];
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 4
    for (int64_t v = 0; v < vectors; ++v)
      sum[i][v] = load<F32s>(o.dw + i * o.dw_stride + v * lanes);
  }
  // The next tile's part of dw comes from a far cache while this one's pairs pass.
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 4
    for (int64_t v = 0; v < vectors; ++v)
      __builtin_prefetch(o.dw + (rows + i) * o.dw_stride + v * lanes, 1);
  }
  int p = 0;
  do {
    const char* x = o.x + o.x_rows[p] * o.x_stride;
    const char* dy = o.dy + o.dy_rows[p] * o.dy_stride;
    F32s b[vectors];
#pragma GCC unroll 4
    for (int64_t v = 0; v < vectors; ++v) b[v] = load<F32s>(dy + v * vector_bytes);
#pragma GCC unroll 16
    for (int64_t i = 0; i < rows; ++i) {
      const F32s a = broadcast(x + i * 4);
#pragma GCC unroll 4
      for (int64_t v = 0; v < vectors; ++v) sum[i][v] = Dot::add(a, b[v], sum[i][v]);
    }
  } while (++p < o.pairs);
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 4
    for (int64_t v = 0; v < vectors; ++v) store(o.dw + i * o.dw_stride + v * lanes, sum[i][v]);
  }
}

template <class Dot, int vectors, int... less_one>
void outer_panel(Outer o, int k, std::integer_sequence<int, less_one...>) {
  static constexpr void (*tile[])(const Outer&) = {outer_tile<Dot, vectors, less_one + 1>...};
  constexpr int most = sizeof...(less_one);
  constexpr int width = vectors * lanes;
  float whole[most][width];
  float* const dw = o.dw;
  const int64_t dw_stride = o.dw_stride;
  const Cut cut(k, most);
  for (int t = 0, first = 0; t < cut.pieces; first += cut.size(t++)) {
    const int rows = cut.size(t);
    o.dw = dw + first * dw_stride;
    if (o.cols == width) {
      tile[rows - 1](o);
    } else {
      // Tiles work on whole vectors; the caller's rows end inside one.
      float* const part = o.dw;
      o.dw = whole[0];
      o.dw_stride = width;
      for (int i = 0; i < rows; ++i)
        std::memcpy(whole[i], part + i * dw_stride, o.cols * sizeof(float));
      tile[rows - 1](o);
      for (int i = 0; i < rows; ++i)
        std::memcpy(part + i * dw_stride, whole[i], o.cols * sizeof(float));
    }
    o.x += int64_t{4} * rows;
  }
}

template <class Dot, int vectors>
void outer_panel(const Outer& o, int k) {
  outer_panel<Dot, vectors>(o, k, std::make_integer_sequence<int, tile_rows<vectors>()>{});
}

template <class Dot>
void outer_block(Outer o, int k, int n) {
  const Cut panels(vectors_of(n), panel_vectors);
  for (int p = 0; p < panels.pieces; ++p) {
    const int vectors = panels.size(p);
    const int width = vectors * lanes;
    o.cols = n < width ? n : width;
    if (vectors == 1) outer_panel<Dot, 1>(o, k);
    if (vectors == 2) outer_panel<Dot, 2>(o, k);
    if constexpr (panel_vectors > 2) {
      if (vectors == 3) outer_panel<Dot, 3>(o, k);
      if (vectors == 4) outer_panel<Dot, 4>(o, k);
    }
    o.dy += int64_t{vectors} * vector_bytes;
    o.dw += width;
    n -= width;
  }
}

// Pairs that pass over all tiles before the next: their rows of x and dy stay in cache between
// tiles.
constexpr int block_pairs = 128;

template <class Dot>
void outer_rows(Outer o, int k, int n) {
  const Cut blocks(o.pairs, block_pairs);
  for (int b = 0; b < blocks.pieces; ++b) {
    o.pairs = blocks.size(b);
    outer_block<Dot>(o, k, n);
    o.x_rows += o.pairs;
    o.dy_rows += o.pairs;
  }
}

template <class T>
Outer outer_in_place(const OuterArgs& a) {
  return {.x = static_cast<const char*>(a.x),
          .x_stride = a.x_stride * static_cast<int64_t>(sizeof(T)),
          .x_rows = a.x_rows,
          .dy = static_cast<const char*>(a.dy),
          .dy_stride = a.dy_stride * static_cast<int64_t>(sizeof(T)),
          .dy_rows = a.dy_rows,
          .pairs = a.pairs,
          .dw = a.dw,
          .dw_stride = a.dw_stride,
          .cols = 0};
}

// Words of a row so that rows that follow each other lie in different sets of a cache: an odd
// number of lines.
constexpr int spread(int words) {
  constexpr int line = 16;
  return words % (2 * line) == 0 ? words + line : words;
}

// Copies of rows of x and dy in scratch, as whole vectors of words.
struct OuterCopies {
  int x_words;
  int dy_words;
  int rows;
  float* x;
  float* dy;
  OuterCopies(int k, int n, void* scratch)
      : x_words(spread(round_up(k, lanes))),
        dy_words(spread(round_up(n, lanes))),
        rows(copied_rows(4 * (x_words + dy_words))),
        x(static_cast<float*>(scratch)),
        dy(x + static_cast<size_t>(rows) * x_words) {}
  size_t bytes() const { return static_cast<size_t>(rows) * (x_words + dy_words) * 4; }
  float* x_row(int i) const { return x + static_cast<size_t>(i) * x_words; }
  float* dy_row(int i) const { return dy + static_cast<size_t>(i) * dy_words; }
  void use(Outer& o) const {
    o.x = reinterpret_cast<const char*>(x);
    o.dy = reinterpret_cast<const char*>(dy);
    o.x_stride = int64_t{4} * x_words;
    o.dy_stride = int64_t{4} * dy_words;
    o.x_rows = o.dy_rows = counting.value;
  }
};

template <class T>
void outer(const OuterArgs& a) {
  Outer o = outer_in_place<T>(a);
  // Wide rows fall into few sets of the first-level cache and would evict each other: with 256 +
  // 256 columns copies make up for their cost (198 instead of 167 GFLOP/s on Zen 5), with 128 + 128
  // they do not.
  constexpr int wide = 512;
  if (sizeof(T) == 4 && a.n % lanes == 0 && a.k + a.n < wide) {
    outer_rows<WideDot>(o, a.k, a.n);
    return;
  }
  const OuterCopies copies(a.k, a.n, a.scratch);
  copies.use(o);
  for (int first = 0; first < a.pairs; first += copies.rows) {
    o.pairs = a.pairs - first < copies.rows ? a.pairs - first : copies.rows;
    for (int p = 0; p < o.pairs; ++p) {
      widen_row(static_cast<const T*>(a.x) + a.x_rows[first + p] * a.x_stride, a.k,
                copies.x_row(p));
      widen_row(static_cast<const T*>(a.dy) + a.dy_rows[first + p] * a.dy_stride, a.n,
                copies.dy_row(p));
    }
    outer_rows<WideDot>(o, a.k, a.n);
  }
}

}  // namespace
}  // namespace voxgemm::cpu::VOXGEMM_ISA
