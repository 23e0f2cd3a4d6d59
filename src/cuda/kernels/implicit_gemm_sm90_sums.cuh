// SPDX-License-Identifier: Apache-2.0
#pragma once

// What becomes of the f32 sums of implicit_gemm_sm90.cuh: rounded rows of y, or partial sums for a
// later launch to add.
//
// A warpgroup's matrix instruction leaves two rows to every four lanes (a quad), and in both lane c
// columns 8 j + 2 c and the next for every j. Written like that, f32 sums and results are stored 8
// bytes at a time and 16-bit results 4, at a third of the speed of 16 bytes; so the lanes of a quad
// exchange what they hold first.
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

// Four lanes each hold four words, word q of lane c being entry (q, c); afterwards (c, q).
__device__ inline void transpose_quad(uint32_t (&v)[4], int c) {
#pragma unroll
  for (int bit = 1; bit <= 2; bit *= 2) {
    const bool high = (c & bit) != 0;
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      if ((q & bit) != 0) continue;
      const uint32_t got = __shfl_xor_sync(0xffffffff, high ? v[q] : v[q + bit], bit);
      if (high) {
        v[q] = got;
      } else {
        v[q + bit] = got;
      }
    }
  }
}

// Two lanes c and c ^ 1 each hold `low` and `high`, two columns of the eight that begin at 2 c and
// of the eight behind those. Afterwards the even one has four columns of the first eight and the
// odd one four of the second, from even_column(c) on. It is its own inverse.
__device__ inline float4 exchange_pair(float2 low, float2 high, int c) {
  const bool odd = (c & 1) != 0;
  float2 got;
  got.x = __shfl_xor_sync(0xffffffff, odd ? low.x : high.x, 1);
  got.y = __shfl_xor_sync(0xffffffff, odd ? low.y : high.y, 1);
  return odd ? make_float4(got.x, got.y, high.x, high.y) : make_float4(low.x, low.y, got.x, got.y);
}
__device__ inline int even_column(int c) { return (c & 1) != 0 ? 8 + 2 * (c - 1) : 2 * c; }

// A consumer's sums of an item: for each of its blocks of 64 rows those of two rows.
template <class C>
class Sums {
 public:
  __device__ explicit Sums(const ConvParams& p) : p_(p) {}

  float d[C::row_blocks][C::columns / 2];  // as wgmma.cuh has them

  // All zero, of another item.
  __device__ void clear(const Item& item) {
    column_ = item.column;
    for_rows([&](int b, int h) {
      const int at = place(b, h);
      row_[b][h] = at < item.rows ? __ldg(p_.order + item.first + at) : -1;
      unroll<C::columns / 4>([&](int i) { d[b][i * 2 + h] = 0; });
    });
  }

  // Partial sums, or the finished rows.
  __device__ void write(const Item& item) {
    if (p_.added > 0) for_rows([&](int b, int h) { add_partials(b, h); });
    if (p_.split || p_.group < p_.groups - 1) {
      const int buffer = p_.split ? item.group * p_.slices + item.slice : 0;
      return for_rows([&](int b, int h) {
        store_row(b, h, partial_row(buffer, row_[b][h]), p_.partial_stride);
      });
    }
    if (p_.bias != nullptr) add_bias();
    // All before the first store, which no load may pass; f32 results leave no registers for that.
    const bool added = p_.residual.data != nullptr;
    if (sizeof(T) == 2 && added) for_rows([&](int b, int h) { add_residual(b, h); });
    uint32_t broken = 0;
    for_rows([&](int b, int h) {
      if (sizeof(T) == 4 && added) add_residual(b, h);
      broken |= static_cast<uint32_t>(is_broken(b, h)) << (2 * b + h);
      if (p_.relu) rectify(b, h);
      store_row(b, h, static_cast<T*>(p_.y.data) + row_[b][h] * p_.y.stride, p_.c_out);
    });
    // Another lane of the quad stored the elements that this one repairs.
    __syncwarp();
    for (; broken != 0; broken &= broken - 1) {
      const int at = __ffs(broken) - 1;
      const int64_t row = p_.order[item.first + place(at / 2, at % 2)];
      for (int e = 0; e < C::columns / 4; ++e) {
        const int n = column_ + e / 2 * 8 + threadIdx.x % 4 * 2 + e % 2;
        if (n < p_.c_out) p_.repair<T>(row, n);
      }
    }
  }

 private:
  using T = typename C::Result;

  template <class Body>
  __device__ static void for_rows(const Body& body) {
    unroll<C::row_blocks>([&](int b) { unroll<2>([&](int h) { body(b, h); }); });
  }

  // In the tile, of row h of block b.
  __device__ static int place(int b, int h) {
    const int block = C::pingpong ? b : (threadIdx.x / 128 - 1) * C::row_blocks + b;
    return block * 64 + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4 + h * 8;
  }
  __device__ float* partial_row(int buffer, int row) const {
    return p_.partials + (buffer * p_.rows + row) * p_.partial_stride;
  }
  // Of columns 8 j on.
  __device__ float2 two(int b, int h, int j) const {
    return make_float2(d[b][j * 4 + h * 2], d[b][j * 4 + h * 2 + 1]);
  }
  __device__ void add_two(int b, int h, int j, const float2& v) {
    d[b][j * 4 + h * 2] += v.x;
    d[b][j * 4 + h * 2 + 1] += v.y;
  }

  __device__ void add_partials(int b, int h) {
    const int row = row_[b][h];
    const int c = threadIdx.x % 4;
    const int first = column_ + even_column(c);
    for (int buffer = 0; buffer < p_.added; ++buffer) {
      const float* part = partial_row(buffer, max(row, 0));
      // Eight loads are under way at a time.
      constexpr int batch = C::columns / 16 < 8 ? C::columns / 16 : 8;
#pragma unroll
      for (int j0 = 0; j0 < C::columns / 8; j0 += 2 * batch) {
        float4 v[batch];
        unroll<batch>([&](int i) {
          const int n = first + (j0 + 2 * i) * 8;
          v[i] = row >= 0 && n < p_.partial_stride
                     ? __ldcg(reinterpret_cast<const float4*>(part + n))
                     : make_float4(0, 0, 0, 0);
        });
        unroll<batch>([&](int i) {
          const float4 own =
              exchange_pair(make_float2(v[i].x, v[i].y), make_float2(v[i].z, v[i].w), c);
          add_two(b, h, j0 + 2 * i, make_float2(own.x, own.y));
          add_two(b, h, j0 + 2 * i + 1, make_float2(own.z, own.w));
        });
      }
    }
  }

  // To all sums at once, since the stores of them are one long stretch without a branch, in which
  // the exchanges of lanes wait for each other as little as they can.
  __device__ void add_bias() {
    unroll<C::columns / 8>([&](int j) {
      const int n = column_ + j * 8 + threadIdx.x % 4 * 2;
      float bias[2];
      load_bias<T>(p_, n, bias);
      for_rows([&](int b, int h) { add_two(b, h, j, make_float2(bias[0], bias[1])); });
    });
  }

  // 16-bit ones as store_row() leaves them: a quarter of the loads, and whole sectors. f32 ones two
  // columns at a time, as the sums lie: 16 bytes and exchanges take more registers than there are.
  __device__ void add_residual(int b, int h) {
    const bool exists = row_[b][h] >= 0;
    const T* from = static_cast<const T*>(p_.residual.data) + row_[b][h] * p_.residual.stride;
    const int c = threadIdx.x % 4;
    struct alignas(2 * sizeof(T)) Two {
      T x, y;
    };
    if constexpr (sizeof(T) == 2) {
      unroll<C::columns / 32>([&](int j4) {
        const int n = column_ + j4 * 32 + c * 8;
        const uint4 v =
            exists && n < p_.c_out ? __ldcg(reinterpret_cast<const uint4*>(from + n)) : uint4{};
        uint32_t word[4] = {v.x, v.y, v.z, v.w};
        transpose_quad(word, c);
        unroll<4>([&](int q) {
          const Two two = reinterpret_cast<const Two&>(word[q]);
          add_two(b, h, j4 * 4 + q, make_float2(widen(two.x), widen(two.y)));
        });
      });
    } else {
#pragma unroll
      for (int j = 0; j < C::columns / 8; ++j) {
        const int n = column_ + j * 8 + c * 2;
        if (!exists || n >= p_.c_out) break;
        const Two two = *reinterpret_cast<const Two*>(from + n);
        add_two(b, h, j, make_float2(widen(two.x), widen(two.y)));
      }
    }
  }
  __device__ void rectify(int b, int h) {
    unroll<C::columns / 8>([&](int j) {
      d[b][j * 4 + h * 2] = p_.rectified(d[b][j * 4 + h * 2]);
      d[b][j * 4 + h * 2 + 1] = p_.rectified(d[b][j * 4 + h * 2 + 1]);
    });
  }

  // Whether one is NaN.
  __device__ bool is_broken(int b, int h) const {
    bool broken = false;
    unroll<C::columns / 8>([&](int j) {
      const float2 sum = two(b, h, j);
      broken |= !(sum.x < sum.y || sum.x >= sum.y);  // neither where one is: one instruction
    });
    return broken && row_[b][h] >= 0;
  }

  // To columns [0, end) of a row of f32.
  __device__ void store_row(int b, int h, float* to, int end) const {
    const int c = threadIdx.x % 4;
#pragma unroll
    for (int j = 0; j < C::columns / 8; j += 2) {
      const float4 v = exchange_pair(two(b, h, j), two(b, h, j + 1), c);
      const int n = column_ + j * 8 + even_column(c);
      if (row_[b][h] >= 0 && n < end) *reinterpret_cast<float4*>(to + n) = v;
    }
  }
  // Rounded.
  template <class Half>
  __device__ void store_row(int b, int h, Half* to, int end) const {
    const int c = threadIdx.x % 4;
    unroll<C::columns / 32>([&](int j4) {
      uint32_t word[4];
      unroll<4>([&](int q) {
        const float2 sum = two(b, h, j4 * 4 + q);
        alignas(4) const Half both[] = {Half(sum.x), Half(sum.y)};
        word[q] = reinterpret_cast<const uint32_t&>(both);
      });
      transpose_quad(word, c);
      const int n = column_ + j4 * 32 + c * 8;
      if (row_[b][h] >= 0 && n < end) {
        *reinterpret_cast<uint4*>(to + n) = make_uint4(word[0], word[1], word[2], word[3]);
      }
    });
  }

  const ConvParams& p_;
  int column_ = 0;
  int row_[C::row_blocks][2];  // -1 past the tile's end
};

}  // namespace voxgemm::cuda::sm90
