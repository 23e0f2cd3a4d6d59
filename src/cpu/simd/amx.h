// SPDX-License-Identifier: Apache-2.0
#pragma once

// bf16 and f16 by AMX tiles: 16 x 16 f32 sums of products of 16 x 32 by 32 x 16 elements. Two tiles
// of rows times two of columns make four sums per step of 32 k, so each loaded tile is used twice.
//
// multiply: A = rows of x, copied together with zeros up to whole steps; B = the packed panel; sums
// go through memory, from where they are added to the scattered rows of acc.
//
// outer: A = x transposed (64 shuffles per 32 pairs x 16 columns), B = rows of dy, pairs
// interleaved in words of two; sums are tiles of dw.
//
// Tiles take subnormal operands for zeros.

#include "cpu/simd/dot_bf16.h"

namespace voxgemm::cpu::VOXGEMM_ISA {
namespace {

#if defined(__AMX_TILE__) || defined(__AMXTILE__)

// Tile numbers: sums 0 to 3 (row tile * 2 + column tile), A 4 and 5, B 6 and 7; all 16 rows of 64
// bytes.
struct TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
alignas(64) constexpr TileConfig tile_config;

constexpr int tile = 16;        // rows, and words of a row
constexpr int step = 2 * tile;  // elements of the reduction in one product
constexpr int line = 4 * tile;  // bytes of a tile's row

// The compiler does not know that tile loads read memory.
[[gnu::always_inline]] inline void memory_is_read() { asm volatile("" ::: "memory"); }

// 50 to 200 ns together: as long as 8 to 30 pairs of 16 channels take.
void begin_tiles() { _tile_loadconfig(&tile_config); }
// A thread without tile state is cheaper to switch.
void end_tiles() { _tile_release(); }

// Tile operations take their numbers as text, so each combination is written out.
template <class T, int row_tiles, int col_tiles>
[[gnu::always_inline]] inline void multiply_tiles() {
  if constexpr (std::is_same_v<T, Bf16>) {
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (col_tiles == 2) _tile_dpbf16ps(1, 4, 7);
    if constexpr (row_tiles == 2) _tile_dpbf16ps(2, 5, 6);
    if constexpr (row_tiles == 2 && col_tiles == 2) _tile_dpbf16ps(3, 5, 7);
  } else {
    // tdpfp16ps sum, A, B in bytes: compilers and assemblers of 2022 do not know AMX-FP16.
    asm volatile(".byte 0xc4, 0xe2, 0x4b, 0x5c, 0xc4");                                // 0, 4, 6
    if constexpr (col_tiles == 2) asm volatile(".byte 0xc4, 0xe2, 0x43, 0x5c, 0xcc");  // 1, 4, 7
    if constexpr (row_tiles == 2) asm volatile(".byte 0xc4, 0xe2, 0x4b, 0x5c, 0xd5");  // 2, 5, 6
    if constexpr (row_tiles == 2 && col_tiles == 2) {
      asm volatile(".byte 0xc4, 0xe2, 0x43, 0x5c, 0xdd");  // 3, 5, 7
    }
  }
}

template <int row_tiles, int col_tiles>
[[gnu::always_inline]] inline void clear_sums() {
  _tile_zero(0);
  if constexpr (col_tiles == 2) _tile_zero(1);
  if constexpr (row_tiles == 2) _tile_zero(2);
  if constexpr (row_tiles == 2 && col_tiles == 2) _tile_zero(3);
}

// Strides in bytes, of rows.
template <int row_tiles, int col_tiles>
[[gnu::always_inline]] inline void load_sums(const float* from, int64_t stride) {
  memory_is_read();
  _tile_loadd(0, from, stride);
  if constexpr (col_tiles == 2) _tile_loadd(1, from + tile, stride);
  if constexpr (row_tiles == 2) _tile_loadd(2, from + tile * stride / 4, stride);
  if constexpr (row_tiles == 2 && col_tiles == 2)
    _tile_loadd(3, from + tile * stride / 4 + tile, stride);
}

template <int row_tiles, int col_tiles>
[[gnu::always_inline]] inline void store_sums(float* to, int64_t stride) {
  _tile_stored(0, to, stride);
  if constexpr (col_tiles == 2) _tile_stored(1, to + tile, stride);
  if constexpr (row_tiles == 2) _tile_stored(2, to + tile * stride / 4, stride);
  if constexpr (row_tiles == 2 && col_tiles == 2)
    _tile_stored(3, to + tile * stride / 4 + tile, stride);
}

// The operands of a square of up to 2 x 2 sums.
struct Square {
  const char* a;
  int64_t a_stride;
  const char* b;
  int64_t b_stride;
  int steps;
  // Memory that is needed after this panel: each square fetches `next_step` bytes of it.
  const char* next = nullptr;
  int64_t next_step = 0;
};

template <class T, int row_tiles, int col_tiles>
[[gnu::always_inline]] inline void add_products(const Square& s) {
  const char* a = s.a;
  const char* b = s.b;
  const int64_t fetched = s.next_step / s.steps + line;
  memory_is_read();
  for (int i = 0; i < s.steps; ++i) {
    if (s.next_step > 0) {
      for (int64_t byte = 0; byte < fetched; byte += line)
        __builtin_prefetch(s.next + i * fetched + byte, 0, 2);
    }
    _tile_loadd(4, a, s.a_stride);
    _tile_loadd(6, b, s.b_stride);
    if constexpr (row_tiles == 2) _tile_loadd(5, a + tile * s.a_stride, s.a_stride);
    if constexpr (col_tiles == 2) _tile_loadd(7, b + line, s.b_stride);
    multiply_tiles<T, row_tiles, col_tiles>();
    a += line;
    b += tile * s.b_stride;
  }
}

// An odd number of cache lines per row spreads the rows of a tile over all sets of a cache.
constexpr int tile_row_bytes(int words) { return ((words + tile - 1) / tile | 1) * line; }

constexpr int height_of(int k) { return round_up((k + 1) / 2, tile); }

// The rows of acc that a square's sums are added to; distances in floats.
struct Target {
  const int32_t* acc_rows;
  int rows;
  float* acc;
  int64_t acc_stride;
};

// Adding the sums of all squares in a loop of its own, when their stores have left the core, was
// slower: 60 instead of 105 GFLOP/s at 16 channels, 960 instead of 1270 at 256 (96 pairs, Sapphire
// Rapids at 2.75 GHz).
template <class T, int row_tiles, int col_tiles>
void multiply_square(const Square& s, const Target& t) {
  alignas(64) float sums[row_tiles * tile][col_tiles * tile];
  clear_sums<row_tiles, col_tiles>();
  add_products<T, row_tiles, col_tiles>(s);
  store_sums<row_tiles, col_tiles>(sums[0], sizeof sums[0]);
  for (int i = 0; i < t.rows; ++i) {
    float* acc = t.acc + t.acc_rows[i] * t.acc_stride;
    for (int64_t v = 0; v < col_tiles; ++v) {
      store(acc + v * lanes, load<F32s>(acc + v * lanes) + load<F32s>(sums[i] + v * lanes));
    }
  }
}

template <class T>
void multiply_copied(const Rows& r, const MultiplyArgs& a, int rows) {
  const int height = height_of(a.k);
  const Cut panels(vectors_of(a.n), panel_vectors);
  const int row_blocks = Cut(rows, 2 * tile).pieces;
  // All taps of narrower weights stay in a second-level cache; fetching them again takes time (a
  // seventh at 128 channels).
  constexpr size_t fetch_from = size_t{64} << 10;
  const bool fetches = packed_size(height, a.n) > fetch_from;
  const char* panel = r.panel;
  float* acc = r.acc;
  for (int p = 0; p < panels.pieces; ++p) {
    const int vectors = panels.size(p);
    const int64_t bytes = static_cast<int64_t>(height) * vectors * line;
    const int squares = row_blocks * ((vectors + 1) / 2);
    Square s = {.a = r.x,
                .a_stride = r.x_stride,
                .b = panel,
                .b_stride = int64_t{vectors} * line,
                .steps = height / tile,
                .next = panel + bytes,
                .next_step = fetches ? round_up(static_cast<int>(bytes / squares), line) : 0};
    for (int row = 0; row < rows; row += 2 * tile) {
      const int rest = rows - row;
      s.a = r.x + row * r.x_stride;
      for (int64_t v = 0; v < vectors; v += 2) {
        s.b = panel + v * line;
        const Target t = {.acc_rows = r.acc_rows + row,
                          .rows = rest < 2 * tile ? rest : 2 * tile,
                          .acc = acc + v * lanes,
                          .acc_stride = r.acc_stride};
        if (rest > tile && v + 1 < vectors) multiply_square<T, 2, 2>(s, t);
        if (rest > tile && v + 1 == vectors) multiply_square<T, 2, 1>(s, t);
        if (rest <= tile && v + 1 < vectors) multiply_square<T, 1, 2>(s, t);
        if (rest <= tile && v + 1 == vectors) multiply_square<T, 1, 1>(s, t);
        s.next += s.next_step;
      }
    }
    panel += bytes;
    acc += int64_t{vectors} * lanes;
  }
}

template <class T>
void multiply_amx(const MultiplyArgs& a) {
  if (a.pairs == 0) return;
  if (!a.begun) begin_tiles();
  multiply_copies<T>(
      a, tile_row_bytes(height_of(a.k)),
      [&](const T* from, char* to) {
        for (int64_t i = 0; i < a.k; i += step) {
          const int64_t rest = a.k - i;
          const __mmask32 inside = rest >= step ? ~0U : (1U << rest) - 1;
          store(to + i * 2, _mm512_maskz_loadu_epi16(inside, from + i));
        }
      },
      [&](const Rows& r, int rows) { multiply_copied<T>(r, a, rows); });
  if (!a.begun) end_tiles();
}

// The operands of `outer` in scratch: words of two pairs, zeros past the last pair and column.
struct OuterTiles {
  static constexpr int most_words = 128;  // 8 steps: loading and storing sums is small beside them
  int k_rows;
  int x_bytes;   // of a row of x transposed, [k_rows, words]
  int dy_bytes;  // of a row of dy, [words, n]
  int words;     // pairs / 2 at a time
  char* x;
  char* dy;
  OuterTiles(int k, int n, void* scratch)
      : k_rows(round_up(k, wide_lanes)), dy_bytes(tile_row_bytes(n)) {
    // 512 KB of a second-level cache of 2 MB, which all CPUs with tiles have.
    words = most_words;
    while (words > tile && size(words) > size_t{512} << 10) words /= 2;
    x_bytes = tile_row_bytes(words);
    x = static_cast<char*>(scratch);
    dy = x + static_cast<size_t>(k_rows) * x_bytes;
  }
  size_t size(int count) const {
    return static_cast<size_t>(k_rows) * tile_row_bytes(count) +
           static_cast<size_t>(count) * dy_bytes;
  }
  size_t bytes() const { return size(words); }
};

// The pairs of one step from `first` on become words `word` to word + 15 of the operands.
template <bool all, class T>
void fill_x(const OuterTiles& o, const PairRows<T>& rows, int first, int word) {
  const T* x[step];
  for (int i = 0; i < step; ++i) x[i] = rows.at(first + i);
  for (int c = 0; c < rows.count; c += wide_lanes) {
    // Lane l of the interleaved words holds columns 8 l to 8 l + 3 in the first round, the next
    // four in the second.
    for (int half = 0; half < 2; ++half) {
      U32s square[tile];
#pragma GCC unroll 16
      for (int w = 0; w < tile; ++w) {
        const U16w low = load_columns<all>(x[2 * w], {c, rows.count});
        const U16w high = load_columns<all>(x[2 * w + 1], {c, rows.count});
        square[w] = half == 0 ? low_words(low, high) : high_words(low, high);
      }
      transpose(square);
      char* const to = o.x + (c + 4 * half) * static_cast<int64_t>(o.x_bytes) + int64_t{4} * word;
#pragma GCC unroll 16
      for (int i = 0; i < tile; ++i) {
        store(to + (i / 4 * 8 + i % 4) * static_cast<int64_t>(o.x_bytes), square[i]);
      }
    }
  }
}

// Fills the operands with pairs from `first` on and returns the number of steps.
template <class T>
int fill(const OuterTiles& o, const OuterArgs& a, int first) {
  const auto x = x_pairs<T>(a);
  const auto dy = dy_pairs<T>(a);
  int word = 0;
  for (; word < o.words && first < a.pairs; word += tile, first += step) {
    for (int i = first + step; i < first + 2 * step; ++i) {
      x.fetch(i);
      dy.fetch(i);
    }
    if (first + step <= a.pairs) {
      fill_x<true>(o, x, first, word);
    } else {
      fill_x<false>(o, x, first, word);
    }
    for (int w = 0; w < tile; ++w) {
      dy.interleave_to(first + 2 * w, o.dy + (word + w) * static_cast<int64_t>(o.dy_bytes));
    }
  }
  return word / tile;
}

// Up to 16 x 16 elements of dw f32 multiply-adds are faster: half of x's transpose would be
// padding.
constexpr int narrow_outer = tile * tile;

// A square of dw of up to 2 x 2 tiles, of which rows x cols exist.
struct OuterTarget {
  float* dw;
  int64_t dw_stride;
  int rows;
  int cols;
};

template <class T, int row_tiles, int col_tiles>
void outer_square(const Square& s, const OuterTarget& t) {
  if (t.rows == row_tiles * tile && t.cols == col_tiles * tile) {
    load_sums<row_tiles, col_tiles>(t.dw, t.dw_stride * 4);
    add_products<T, row_tiles, col_tiles>(s);
    store_sums<row_tiles, col_tiles>(t.dw, t.dw_stride * 4);
    return;
  }
  alignas(64) float sums[row_tiles * tile][col_tiles * tile] = {};
  for (int i = 0; i < t.rows; ++i)
    std::memcpy(sums[i], t.dw + i * t.dw_stride, t.cols * sizeof(float));
  load_sums<row_tiles, col_tiles>(sums[0], sizeof sums[0]);
  add_products<T, row_tiles, col_tiles>(s);
  store_sums<row_tiles, col_tiles>(sums[0], sizeof sums[0]);
  for (int i = 0; i < t.rows; ++i)
    std::memcpy(t.dw + i * t.dw_stride, sums[i], t.cols * sizeof(float));
}

template <class T>
void outer_amx(const OuterArgs& a) {
  if (a.pairs == 0) return;
  if (a.k * a.n <= narrow_outer) {
    outer<T>(a);
    return;
  }
  if (!a.begun) begin_tiles();
  const OuterTiles o(a.k, a.n, a.scratch);
  const auto at_most = [](int value) { return value < 2 * tile ? value : 2 * tile; };
  for (int first = 0; first < a.pairs; first += 2 * o.words) {
    const int steps = fill<T>(o, a, first);
    for (int n = 0; n < a.n; n += 2 * tile) {
      for (int k = 0; k < a.k; k += 2 * tile) {
        const Square s = {.a = o.x + k * static_cast<int64_t>(o.x_bytes),
                          .a_stride = o.x_bytes,
                          .b = o.dy + int64_t{4} * n,
                          .b_stride = o.dy_bytes,
                          .steps = steps};
        const OuterTarget t = {.dw = a.dw + k * a.dw_stride + n,
                               .dw_stride = a.dw_stride,
                               .rows = at_most(a.k - k),
                               .cols = at_most(a.n - n)};
        if (t.rows > tile && t.cols > tile) outer_square<T, 2, 2>(s, t);
        if (t.rows > tile && t.cols <= tile) outer_square<T, 2, 1>(s, t);
        if (t.rows <= tile && t.cols > tile) outer_square<T, 1, 2>(s, t);
        if (t.rows <= tile && t.cols <= tile) outer_square<T, 1, 1>(s, t);
      }
    }
  }
  if (!a.begun) end_tiles();
}

#endif

}  // namespace
}  // namespace voxgemm::cpu::VOXGEMM_ISA
