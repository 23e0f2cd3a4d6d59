// SPDX-License-Identifier: Apache-2.0
#pragma once

// What becomes of the f32 sums of implicit_gemm_sm90.cuh: rounded rows of y, or partial sums.
//
// A warpgroup's matrix instruction leaves two rows to every four lanes (a quad), and in both lane c
// columns 8 j + 2 c and the next for every j. Written like that, f32 sums and results are stored 8
// bytes at a time and 16-bit results 4, at a third of the speed of 16 bytes; so the lanes of a quad
// exchange words first, and what is read to be added comes the other way.
//
// Partial sums lie in buffers [rows, partial_stride], which are added in one order, so the bits do
// not depend on timing: the launch of a group adds those of the group before it from the only
// buffer, or finish() those of all groups and slices.
//
// Sums that come out NaN are computed once more over present rows only (pass.cuh), which also puts
// right what splitting f32 operands makes of infinite ones.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/kernels/implicit_gemm_sm90_items.cuh"
#include "cuda/ptx/copy.cuh"

namespace voxgemm::cuda::sm90 {

// A consumer's sums of an item: for each of its blocks of 64 rows those of two rows.
template <class C>
class Sums {
 public:
  __device__ explicit Sums(const ConvParams& p) : p_(p) {}

  float d[C::row_blocks][C::columns / 2];  // as wgmma.cuh has them

  // All zero, of another item.
  __device__ void clear(const Item& item) {
    column_ = item.column;
    unroll<C::row_blocks * 2>([&](int r) {
      row_[r] = place(r) < item.rows ? __ldg(p_.order + item.first + place(r)) : -1;
    });
    unroll<C::row_blocks * C::columns / 2>([&](int i) { d[0][i] = 0; });
  }

  // Partial sums, or the finished rows.
  __device__ void write(const Item& item) {
    const bool unfinished = p_.split || p_.group < p_.groups - 1;
    const int buffer = p_.split ? item.group * p_.slices + item.slice : 0;
    const auto partials = [&](int row) {
      return p_.partials + (buffer * p_.rows + row) * p_.partial_stride;
    };
    if (unfinished) {
      return for_sums([&](int first, float(&v)[at_once]) {
        if (p_.added > 0) add<float>(first, partials, p_.partial_stride, v);
        store_rounded<float>(first, partials, p_.partial_stride, v);
      });
    }
    if (p_.bias != nullptr) add_bias();
    const float least = p_.relu ? 0 : -INFINITY;
    const auto y = [&](int row) { return static_cast<T*>(p_.y.data) + row * p_.y.stride; };
    const auto* const added = static_cast<const T*>(p_.residual.data);
    const auto residual = [&](int row) { return added + row * p_.residual.stride; };
    uint32_t broken = 0;  // rows
    const auto finish = [&](int first, float(&v)[at_once]) {
      unroll<at_once / 2>([&](int i) {
        // Neither where one of two is NaN: one instruction.
        const bool fine = v[2 * i] < v[2 * i + 1] || v[2 * i] >= v[2 * i + 1];
        if (!fine) broken |= 1U << (first + 2 * i) / row_sums;
      });
      unroll<at_once>([&](int i) { v[i] = fmaxf(v[i], least); });
      store_rounded<T>(first, y, p_.c_out, v);
    };
    // Exchanges with a test between them wait for each other.
    if (p_.added == 0 && added == nullptr) {
      for_sums(finish);
    } else {
      for_sums([&](int first, float(&v)[at_once]) {
        if (p_.added > 0) add<float>(first, partials, p_.partial_stride, v);
        if (added != nullptr) add<T>(first, residual, p_.c_out, v);
        finish(first, v);
      });
    }
    // Another lane of the quad stored the elements that this one repairs.
    __syncwarp();
    for (; broken != 0; broken &= broken - 1) {
      const int r = __ffs(broken) - 1;
      if (place(r) >= item.rows) continue;
      const int64_t row = p_.order[item.first + place(r)];
      for (int e = 0; e < row_sums; ++e) {
        const int n = column_ + e / 2 * 8 + threadIdx.x % 4 * 2 + e % 2;
        if (n < p_.c_out) p_.compute<T>(row, n);
      }
    }
  }

 private:
  using T = typename C::Result;

  // Row r of a lane is the half r % 2 of block r / 2. This is its place in the tile.
  __device__ static int place(int r) {
    const int block = C::pingpong ? r / 2 : (threadIdx.x / 128 - 1) * C::row_blocks + r / 2;
    return block * 64 + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4 + r % 2 * 8;
  }

  // Sums are numbered row by row, of which each has so many in a lane.
  static constexpr int row_sums = C::columns / 4;
  static constexpr int sums = C::row_blocks * 2 * row_sums;

  // So many are taken at a time, their loads under way together: more have not the registers.
  static constexpr int at_once = 32;
  // Calls body(the first's number, values) for all.
  template <class Body>
  __device__ void for_sums(const Body& body) const {
    unroll<sums / at_once>([&](int i) {
      float v[at_once];
      unroll<at_once>([&](int e) {
        const int number = i * at_once + e;
        const int r = number / row_sums;
        v[e] = d[r / 2][number % row_sums / 2 * 4 + r % 2 * 2 + e % 2];
      });
      body(i * at_once, v);
    });
  }

  // Exchanges the words of elements in a quad: from pairs of columns to 16 bytes of memory, and
  // back. A step swaps half of a lane's words for those of the lane whose number differs in a bit.
  template <class R, int count>
  __device__ static void exchange(uint32_t (&v)[count]) {
    constexpr int of_word = 4 / sizeof(R);
    unroll<of_word>([&](int step) {
      const int half = of_word == 1 ? 2 : 1 << step;
      const bool high = (threadIdx.x >> step & 1) != 0;
      unroll<count / 2>([&](int i) {
        uint32_t& low = v[i / half * 2 * half + i % half];
        uint32_t& other = v[i / half * 2 * half + i % half + half];
        (high ? low : other) = __shfl_xor_sync(0xffffffff, high ? low : other, 1 << step);
      });
    });
  }
  // Calls body(whether it exists, pointer, words) for the 16 bytes each that a lane has of elements
  // from `first` on once they are exchanged; row(r) is where row r of the matrix begins.
  template <class R, int count, class Row, class Body>
  __device__ void for_pieces(
      int first, const Row& row, int end, uint32_t (&words)[count], const Body& body) const {
    constexpr int elements = 16 / sizeof(R);
    const int c = threadIdx.x % 4;
    const int column = column_ + (elements == 8 ? 8 * c : c / 2 * 4 + c % 2 * 8);
    unroll<count / 4>([&](int piece) {
      const int number = first + piece * elements;
      const int r = row_[number / row_sums];
      const int n = column + number % row_sums * 4;
      body(r >= 0 && n < end, row(r) + n, &words[4 * piece]);
    });
  }
  template <class R, class Row>
  __device__ void add(int first, const Row& row, int end, float (&v)[at_once]) const {
    uint32_t words[at_once * sizeof(R) / 4];
    for_pieces<R>(first, row, end, words, [&](bool exists, const R* from, uint32_t* words) {
      const uint4 loaded = ptx::load_16(from, exists);
      unroll<4>([&](int i) { words[i] = (&loaded.x)[i]; });
    });
    exchange<R>(words);
    unroll<at_once>([&](int e) { v[e] += widen(reinterpret_cast<const R*>(words)[e]); });
  }
  template <class R, class Row>
  __device__ void store_rounded(int first, const Row& row, int end, float (&v)[at_once]) const {
    alignas(4) R out[at_once];
    unroll<at_once>([&](int e) { store(v[e], &out[e]); });
    auto& words = reinterpret_cast<uint32_t(&)[at_once * sizeof(R) / 4]>(out);
    exchange<R>(words);
    for_pieces<R>(first, row, end, words, [&](bool exists, R* to, const uint32_t* words) {
      ptx::store_16(to, make_uint4(words[0], words[1], words[2], words[3]), exists);
    });
  }

  // As the sums lie before any exchange.
  __device__ void add_bias() {
    unroll<C::columns / 8>([&](int j) {
      float bias[2];
      load_bias<T>(p_, column_ + j * 8 + threadIdx.x % 4 * 2, bias);
      unroll<C::row_blocks * 4>([&](int i) { d[i / 4][j * 4 + i % 4] += bias[i % 2]; });
    });
  }

  const ConvParams& p_;
  int column_ = 0;
  int row_[C::row_blocks * 2];  // -1 past the tile's end
};

}  // namespace voxgemm::cuda::sm90
