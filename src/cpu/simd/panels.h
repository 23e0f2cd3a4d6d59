// SPDX-License-Identifier: Apache-2.0
#pragma once

// Packed weights: the columns are cut into vectors, the vectors into panels of at most
// `panel_vectors`, as equal as can be. A panel is [units, vectors * lanes] words of 32 bits: one
// f32, or two consecutive rows of a 16-bit matrix (the operand of dot instructions). Panels follow
// each other.

#include "cpu/engine.h"
#include "cpu/simd/vector.h"

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

// One unit of the reduction: W(r, c) as f32.
struct WideUnit {
  static constexpr int rows = 1;
};
// Rows r and r + 1 of a 16-bit matrix, r in the low half.
struct PairUnit {
  static constexpr int rows = 2;
};

template <class T>
[[gnu::always_inline]] inline uint32_t packed_word(const PackArgs& a, int unit, int col, WideUnit) {
  const T* from = static_cast<const T*>(a.weights) + unit * a.k_stride + col * a.n_stride;
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
[[gnu::always_inline]] inline uint32_t packed_word(const PackArgs& a, int unit, int col, PairUnit) {
  const T* from = static_cast<const T*>(a.weights) + 2 * unit * a.k_stride + col * a.n_stride;
  const uint32_t high = 2 * unit + 1 < a.k ? from[a.k_stride].bits : 0;
  return from->bits | high << 16;
}

// `units` counts the rows of a panel with those that pad it.
template <class T, class Unit>
void pack_panels(const PackArgs& a, int units) {
  const int filled = (a.k + Unit::rows - 1) / Unit::rows;
  const int vectors = vectors_of(a.n);
  const Cut panels(vectors, panel_vectors);
  auto* to = static_cast<uint32_t*>(a.packed);
  int first = 0;
  for (int p = 0; p < panels.pieces; ++p) {
    const int width = panels.size(p) * lanes;
    const int cols = first + width <= a.n ? width : a.n - first;
    // Squares of 16 x 16 keep the lines of the source in cache, whichever of its strides is 1.
    constexpr int square = 16;
    for (int u0 = 0; u0 < filled; u0 += square) {
      const int u1 = u0 + square < filled ? u0 + square : filled;
      for (int c0 = 0; c0 < cols; c0 += square) {
        const int c1 = c0 + square < cols ? c0 + square : cols;
        for (int c = c0; c < c1; ++c) {
          for (int u = u0; u < u1; ++u) {
            to[u * width + c] = packed_word<T>(a, u, first + c, Unit{});
          }
        }
      }
      for (int u = u0; u < u1 && cols < width; ++u) {
        std::memset(to + u * width + cols, 0, (width - cols) * sizeof(uint32_t));
      }
    }
    std::memset(to + filled * width, 0,
                static_cast<size_t>(units - filled) * width * sizeof(uint32_t));
    to += static_cast<size_t>(units) * width;
    first += width;
  }
}

}  // namespace
}  // namespace voxgemm::cpu::VOXGEMM_ISA
