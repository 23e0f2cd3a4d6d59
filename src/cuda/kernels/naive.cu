// SPDX-License-Identifier: Apache-2.0
//
// y[o] = bias + sum over taps of x[in(o, t)] W[t], and dW[t] = sum over pairs of x[i]^T dy[o], as
// loops, in f32 (f64 for f64). Nothing is in shared memory and nothing is synchronised.
//
// Forward: a thread has one column of 4 rows, for which it reads a weight once; its neighbours have
// the next columns; the bias comes last, then one rounding.
//
// Weight gradient: a warp owns 4 input channels and 32 output channels of one tap and one slice of
// the rows, and adds the pairs of its rows in rising order; add_slices() adds the slices in order.
// Slices depend on the problem alone, so the bits do too.
#include <algorithm>

#include "cuda/kernels/families.h"
#include "cuda/kernels/pass.cuh"

namespace voxgemm::cuda {
namespace {

constexpr int at_once = 4;  // rows of a thread; input channels of a warp
constexpr int warps = 8;

template <class T>
void forward(const Context& ctx, const PassArgs& p) {
  for_each(ctx, ceil_div(p.rows, at_once) * p.c_out, [p] __device__(int64_t i) {
    const auto n = static_cast<int>(i % p.c_out);
    const int64_t first = i / p.c_out * at_once;
    Sum<T> sums[at_once] = {};
    p.add_products<T>(first, n, sums);
    for (int r = 0; r < at_once && first + r < p.rows; ++r) p.finish<T>(first + r, n, sums[r]);
  });
}

// partial: [slices, c_out, taps, c_in].
template <class T>
__global__ void __launch_bounds__(32 * warps)
    naive_grad_weight(PassArgs p, int slices, Sum<T>* partial) {
  const int lane = threadIdx.x % 32;
  const int blocks_in = (p.c_in + warps * at_once - 1) / (warps * at_once);
  const int64_t block = blockIdx.x / blocks_in;
  const int tap = static_cast<int>(block % p.taps);
  const int64_t slice = block / p.taps;
  const int k0 = (blockIdx.x % blocks_in * warps + threadIdx.x / 32) * at_once;
  const int column = blockIdx.y * 32 + lane;
  if (k0 >= p.c_in) return;
  const int64_t end = (slice + 1) * p.rows / slices;
  const int32_t* neighbours = p.neighbours + tap * p.rows;
  Sum<T> sums[at_once] = {};
  for (int64_t first = slice * p.rows / slices; first < end; first += 32) {
    const int32_t mine = first + lane < end ? neighbours[first + lane] : -1;
    unsigned present = __ballot_sync(0xffffffff, mine >= 0);
    for (; present != 0; present &= present - 1) {
      const int r = __ffs(present) - 1;
      const int32_t in = __shfl_sync(0xffffffff, mine, r);
      const T* x = static_cast<const T*>(p.x.data) + in * p.x.stride + k0;
      const T* of_row = static_cast<const T*>(p.y.data) + (first + r) * p.y.stride;
      const Sum<T> dy = column < p.c_out ? widen(of_row[column]) : Sum<T>(0);
      for (int k = 0; k < at_once; ++k) {
        if (k0 + k < p.c_in) sums[k] = fma(static_cast<Sum<T>>(widen(x[k])), dy, sums[k]);
      }
    }
  }
  if (column >= p.c_out) return;
  Sum<T>* to = partial + slice * p.w_size() + (int64_t{column} * p.taps + tap) * p.c_in + k0;
  for (int k = 0; k < at_once && k0 + k < p.c_in; ++k) to[k] = sums[k];
}

template <class T>
void grad_weight(const Context& ctx, const PassArgs& p) {
  // Shorter slices do not pay for their partial sums, and those must not take more memory than
  // this.
  constexpr int64_t rows_per_slice = 1024;
  constexpr int64_t most_bytes = int64_t{32} << 20;
  const int64_t slice_bytes = static_cast<int64_t>(sizeof(Sum<T>)) * p.w_size();
  const auto slices = static_cast<int>(std::max<int64_t>(
      1, std::min({p.rows / rows_per_slice, int64_t{64}, most_bytes / slice_bytes})));
  const std::shared_ptr<void> memory = ctx.allocate(slice_bytes * slices);
  auto* partial = static_cast<Sum<T>*>(memory.get());
  launch(ctx,
         {.blocks = int64_t{slices} * p.taps * ceil_div(p.c_in, warps * at_once),
          .columns = ceil_div(p.c_out, 32),
          .threads = 32 * warps},
         naive_grad_weight<T>, p, slices, partial);
  launch(ctx, over(ctx, p.w_size()), add_slices<T>, p, partial, slices);
}

void launch_pass(const Kernel&, const Context& ctx, Pass pass, const ConvArgs& args) {
  const PassArgs p(args);
  dispatch_device_float(args.x.dtype, [&]<class T>(Type<T>) {
    pass == Pass::grad_weight ? grad_weight<T>(ctx, p) : forward<T>(ctx, p);
  });
}

}  // namespace

std::vector<Kernel> naive_kernels() {
  std::vector<Kernel> rows;
  for (const Dtype dtype : {Dtype::f16, Dtype::bf16, Dtype::f32, Dtype::f64}) {
    rows.push_back(
        {.name = join("naive_cuda/", name(dtype)),
         .dtype = dtype,
         .reference = true,
         // About 2 TFLOP/s, whatever the device: it is the last choice.
         .cost = [](const Kernel&, const Problem& p) { return 5e-6 + p.useful_flops() / 2e12; },
         .schedule = [](const Kernel&, const Problem&) { return ScheduleOptions(); },
         .launch = launch_pass});
  }
  return rows;
}

}  // namespace voxgemm::cuda
