// SPDX-License-Identifier: Apache-2.0
#pragma once

// Packed weights: the columns are cut into vectors, the vectors into panels of at most
// `panel_vectors`, as equal as can be. A panel is [units, vectors * lanes] words of 32 bits: one
// f32, or two consecutive rows of a 16-bit matrix (the operand of dot instructions). Panels follow
// each other.

#include "cpu/engine.h"
#include "cpu/simd/transpose.h"

namespace voxgemm::cpu::VOXGEMM_ISA {
namespace {

// Wide enough that loads are far fewer than multiply-adds, narrow enough for several rows' sums in
// registers.
constexpr int panel_vectors = vector_registers == 32 ? 4 : 2;

constexpr int vectors_of(int n) { return (n + lanes - 1) / lanes; }
constexpr size_t packed_size(int units, int n) {
  return static_cast<size_t>(units) * vectors_of(n) * vector_bytes;
}

// The balanced cut of `total` things into pieces of at most `most`: sizes differ by one, larger
// ones first.
struct Cut {
  int pieces;
  int small;   // size of the later pieces
  int larger;  // number of pieces of size small + 1
  Cut(int total, int most) {
    pieces = (total + most - 1) / most;
    small = pieces > 0 ? total / pieces : 0;
    larger = total - small * pieces;
  }
  int size(int piece) const { return small + (piece < larger ? 1 : 0); }
};

// A unit of a panel is one row of W as f32.
struct WideUnit {
  static constexpr int rows = 1;
  template <class T>
  [[gnu::always_inline]] static uint32_t word(const T* from, int64_t, bool) {
    float value;
    if constexpr (sizeof(T) == 4) {
      value = *from;
    } else {
      U16s bits = {};
      bits[0] = from->bits;
      value = widen(bits, T{})[0];
    }
    return load<uint32_t>(&value);
  }
  template <class T>
  [[gnu::always_inline]] static U32s words(const T* from) {
    return as_u32(load_f32(from));
  }
};

// A unit is rows r and r + 1 of a 16-bit W, r in the low half.
struct PairUnit {
  static constexpr int rows = 2;
  template <class T>
  [[gnu::always_inline]] static uint32_t word(const T* from, int64_t k_stride, bool has_second) {
    const uint32_t second = has_second ? from[k_stride].bits : 0;
    return from->bits | second << 16;
  }
  template <class T>
  [[gnu::always_inline]] static U32s words(const T* from) {
    return load<U32s>(from);
  }
};

// Words [first, end) x cols of a panel.
struct PanelPart {
  uint32_t* to;  // the panel
  int width;
  int first_col;  // of W
  int first;
  int end;
};

constexpr int square = 16;

// `cols` columns from `col` of the panel on.
template <class T, class Unit>
void pack_square(const PackArgs& a, const PanelPart& p, int col, int cols) {
  const T* from = static_cast<const T*>(a.weights) + Unit::rows * p.first * a.k_stride +
                  (p.first_col + col) * a.n_stride;
  uint32_t* to = p.to + static_cast<int64_t>(p.first) * p.width + col;
#if defined(__AVX512F__)
  if (a.k_stride == 1 && cols == square && p.end - p.first == square && Unit::rows * p.end <= a.k) {
    U32s words[square];
#pragma GCC unroll 16
    for (int c = 0; c < square; ++c) words[c] = Unit::words(from + c * a.n_stride);
    transpose(words);
#pragma GCC unroll 16
    for (int64_t u = 0; u < square; ++u) store(to + u * p.width, words[u]);
    return;
  }
#endif
  for (int c = 0; c < cols; ++c) {
    for (int u = p.first; u < p.end; ++u) {
      const int r = Unit::rows * (u - p.first);
      to[(u - p.first) * p.width + c] =
          Unit::word(from + r * a.k_stride + c * a.n_stride, a.k_stride, Unit::rows * u + 1 < a.k);
    }
  }
}

// Units of which rows of W are contiguous.
template <class T, class Unit>
void pack_rows(const PackArgs& a, const PanelPart& p, int cols) {
  for (int u = p.first; u < p.end; ++u) {
    const T* from = static_cast<const T*>(a.weights) + Unit::rows * u * a.k_stride + p.first_col;
    uint32_t* to = p.to + static_cast<int64_t>(u) * p.width;
    const bool has_second = Unit::rows * u + 1 < a.k;
    if constexpr (Unit::rows == 1) {
      widen_row(from, cols, reinterpret_cast<float*>(to));
    } else if (has_second) {
      for (int c = 0; c < cols; ++c) to[c] = Unit::word(from + c, a.k_stride, true);
    } else {
      for (int c = 0; c < cols; ++c) to[c] = Unit::word(from + c, 0, false);
    }
  }
}

// `units` counts the rows of a panel with those that pad it.
template <class T, class Unit>
void pack_panels(const PackArgs& a, int units) {
  const int filled = (a.k + Unit::rows - 1) / Unit::rows;
  const Cut panels(vectors_of(a.n), panel_vectors);
  auto* to = static_cast<uint32_t*>(a.packed);
  for (int p = 0, first_col = 0; p < panels.pieces; ++p) {
    const int width = panels.size(p) * lanes;
    const int cols = first_col + width <= a.n ? width : a.n - first_col;
    // Squares keep the lines of W in cache where its columns are contiguous.
    for (int u = 0; u < filled; u += square) {
      const PanelPart part = {.to = to,
                              .width = width,
                              .first_col = first_col,
                              .first = u,
                              .end = u + square < filled ? u + square : filled};
      if (a.n_stride == 1) {
        pack_rows<T, Unit>(a, part, cols);
      } else {
        for (int c = 0; c < cols; c += square) {
          pack_square<T, Unit>(a, part, c, cols - c < square ? cols - c : square);
        }
      }
      for (int row = u; row < part.end && cols < width; ++row) {
        std::memset(to + static_cast<int64_t>(row) * width + cols, 0,
                    (width - cols) * sizeof(uint32_t));
      }
    }
    std::memset(to + static_cast<int64_t>(filled) * width, 0,
                static_cast<size_t>(units - filled) * width * sizeof(uint32_t));
    to += static_cast<int64_t>(units) * width;
    first_col += width;
  }
}

}  // namespace
}  // namespace voxgemm::cpu::VOXGEMM_ISA
