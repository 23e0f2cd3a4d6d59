// SPDX-License-Identifier: Apache-2.0
//
// y[o] = bias + sum over taps of x[in(o, t)] W[t], and dW[t] = sum over pairs of x[i]^T dy[o], as
// loops.
//
// Forward: a warp owns 4 rows and 32 columns, a lane one column; a weight is read once for the 4
// rows, and a row's operand by all lanes at once. Taps and channels go up, one fused multiply-add
// each, in f32 (f64 for f64); the bias comes last, then one rounding. A tap that a row lacks is
// passed over: an infinite weight of an absent neighbour does not count.
//
// Weight gradient: a warp owns 4 input channels and 32 output channels of one tap and one slice of
// the rows, and adds the pairs of its rows in rising order. With more than one slice the partial
// sums go to memory and are added in order by add_slices(). Slices depend on the problem alone, so
// the bits do too.
//
// Nothing is in shared memory and nothing is synchronised.
#include <algorithm>

#include "cuda/kernels/families.h"
#include "cuda/kernels/pass.cuh"
#include "cuda/voxel_index.cuh"

namespace voxgemm::cuda {
namespace {

constexpr int warps = 8;
constexpr int rows_of_warp = 4;
constexpr int columns_of_warp = 32;
constexpr int inputs_of_warp = 4;  // input channels, in the weight gradient

template <class T>
__global__ void __launch_bounds__(32 * warps) naive_forward(PassArgs p) {
  const int warp = threadIdx.x / 32;
  const int column = blockIdx.y * columns_of_warp + threadIdx.x % 32;
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * warps + warp) * rows_of_warp;
  if (column >= p.c_out) return;
  Sum<T> sums[rows_of_warp] = {};
  for (int tap = 0; tap < p.taps; ++tap) {
    const T* x[rows_of_warp];
    bool any = false;
    for (int r = 0; r < rows_of_warp; ++r) {
      const int32_t in = first + r < p.rows ? p.neighbours[tap * p.rows + first + r] : -1;
      x[r] = in >= 0 ? static_cast<const T*>(p.x) + in * p.x_stride : nullptr;
      any = any || in >= 0;
    }
    if (!any) continue;
    const T* w = static_cast<const T*>(p.w) + p.place_of({p.weight_tap(tap), 0, column});
    for (int k = 0; k < p.c_in; ++k) {
      const Sum<T> weight = widen(w[k * p.in_stride]);
      for (int r = 0; r < rows_of_warp; ++r) {
        if (x[r] != nullptr) sums[r] = fma(static_cast<Sum<T>>(widen(x[r][k])), weight, sums[r]);
      }
    }
  }
  T* y = static_cast<T*>(p.y) + first * p.y_stride + column;
  for (int r = 0; r < rows_of_warp && first + r < p.rows; ++r) {
    store(p.with_bias<T>(column, sums[r]), y + r * p.y_stride);
  }
}

// partial: [slices, taps, c_in, c_out], or null with one slice.
template <class T>
__global__ void __launch_bounds__(32 * warps)
    naive_grad_weight(PassArgs p, int slices, Sum<T>* partial) {
  const int lane = threadIdx.x % 32;
  const int inputs = warps * inputs_of_warp;
  const int blocks_in = (p.c_in + inputs - 1) / inputs;
  const int64_t block = blockIdx.x / blocks_in;
  const int tap = static_cast<int>(block % p.taps);
  const int64_t slice = block / p.taps;
  const int k0 = (blockIdx.x % blocks_in) * inputs + threadIdx.x / 32 * inputs_of_warp;
  const int column = blockIdx.y * columns_of_warp + lane;
  if (k0 >= p.c_in) return;
  const int64_t end = (slice + 1) * p.rows / slices;
  const int32_t* neighbours = p.neighbours + tap * p.rows;
  Sum<T> sums[inputs_of_warp] = {};
  for (int64_t first = slice * p.rows / slices; first < end; first += 32) {
    const int32_t mine = first + lane < end ? neighbours[first + lane] : -1;
    unsigned present = __ballot_sync(0xffffffff, mine >= 0);
    for (; present != 0; present &= present - 1) {
      const int r = __ffs(present) - 1;
      const int32_t in = __shfl_sync(0xffffffff, mine, r);
      const T* x = static_cast<const T*>(p.x) + in * p.x_stride + k0;
      const T* of_row = static_cast<const T*>(p.y) + (first + r) * p.y_stride;
      const Sum<T> dy = column < p.c_out ? widen(of_row[column]) : Sum<T>(0);
      for (int k = 0; k < inputs_of_warp; ++k) {
        if (k0 + k < p.c_in) sums[k] = fma(static_cast<Sum<T>>(widen(x[k])), dy, sums[k]);
      }
    }
  }
  if (column >= p.c_out) return;
  for (int k = 0; k < inputs_of_warp && k0 + k < p.c_in; ++k) {
    if (partial != nullptr) {
      partial[((slice * p.taps + tap) * p.c_in + k0 + k) * p.c_out + column] = sums[k];
    } else {
      p.store_gradient<T>({tap, k0 + k, column}, sums[k]);
    }
  }
}

template <class T>
void grad_weight(const Context& ctx, const PassArgs& p) {
  // Shorter slices do not pay for their partial sums, and those must not take more memory than
  // this.
  constexpr int64_t rows_per_slice = 1024;
  constexpr int64_t most_partial_bytes = int64_t{32} << 20;
  const int64_t slice_bytes = static_cast<int64_t>(sizeof(Sum<T>)) * p.w_size();
  const auto slices = static_cast<int>(std::max<int64_t>(
      1, std::min({p.rows / rows_per_slice, int64_t{64}, most_partial_bytes / slice_bytes})));
  std::shared_ptr<void> memory;
  if (slices > 1) memory = ctx.allocate(slice_bytes * slices);
  auto* partial = static_cast<Sum<T>*>(memory.get());
  launch(ctx,
         {.blocks = int64_t{slices} * p.taps * ceil_div(p.c_in, warps * inputs_of_warp),
          .columns = ceil_div(p.c_out, columns_of_warp),
          .threads = 32 * warps},
         naive_grad_weight<T>, p, slices, partial);
  if (slices > 1) launch(ctx, over(ctx, p.w_size()), add_slices<T>, p, partial, slices, false);
}

std::string why_not(const Kernel& kernel, const Problem& problem) {
  const auto& dtype = *static_cast<const Dtype*>(kernel.family);
  return dtype == problem.dtype ? "" : join("takes ", name(dtype));
}

// About 2 TFLOP/s, whatever the device: it is the last choice.
double cost(const Kernel&, const Problem& problem) { return 5e-6 + problem.useful_flops() / 2e12; }

ScheduleOptions schedule(const Kernel&, const Problem&) {
  return {.tile_rows = 128, .chunk_rows = 128};
}

void launch_pass(const Kernel&, const Context& ctx, Pass pass, const ConvArgs& args) {
  const DeviceGuard guard(ctx.device);
  const PassArgs p(args);
  dispatch_device_float(args.x.dtype, [&]<class T>(Type<T>) {
    if (pass == Pass::grad_weight) return grad_weight<T>(ctx, p);
    launch(ctx,
           {.blocks = ceil_div(p.rows, warps * rows_of_warp),
            .columns = ceil_div(p.c_out, columns_of_warp),
            .threads = 32 * warps},
           naive_forward<T>, p);
  });
}

}  // namespace

std::vector<Kernel> naive_kernels() {
  static constexpr Dtype dtypes[] = {Dtype::f16, Dtype::bf16, Dtype::f32, Dtype::f64};
  std::vector<Kernel> rows;
  for (const Dtype& dtype : dtypes) {
    rows.push_back({.name = join("naive_cuda/", name(dtype)),
                    .reference = true,
                    .why_not = why_not,
                    .cost = cost,
                    .schedule = schedule,
                    .launch = launch_pass,
                    .family = &dtype});
  }
  return rows;
}

}  // namespace voxgemm::cuda
