// SPDX-License-Identifier: Apache-2.0
//
// y[o] = bias + sum over taps of x[in(o, t)] W[t], and dW[t] = sum over pairs of x[i]^T dy[o], as
// loops, in f32 (f64 for f64). Nothing is in shared memory and nothing is synchronised.
//
// A thread has one column of 4 rows of y, or one output and 4 input channels of a tap of dw over
// one slice of the rows, ascending; its neighbours have the next columns. add_slices() adds the
// slices, which depend on the problem alone, in order.
#include <algorithm>

#include "cuda/kernels/families.h"
#include "cuda/kernels/pass.cuh"

namespace voxgemm::cuda {
namespace {

constexpr int at_once = 4;  // rows or input channels of a thread

template <class T>
void forward(const Context& ctx, const PassArgs& p) {
  for_each(ctx, ceil_div(p.rows, at_once) * p.c_out, [=] __device__(int64_t i) {
    p.compute<T, at_once>(i / p.c_out * at_once, static_cast<int>(i % p.c_out));
  });
}

template <class T>
void grad_weight(const Context& ctx, const PassArgs& p) {
  // Shorter slices do not pay for their partial sums, which must not take more memory than this.
  constexpr int64_t rows_per_slice = 1024;
  constexpr int64_t most_bytes = int64_t{32} << 20;
  const int64_t slice_bytes = static_cast<int64_t>(sizeof(Sum<T>)) * p.w_size();
  const auto slices = static_cast<int>(std::max<int64_t>(
      1, std::min({p.rows / rows_per_slice, int64_t{64}, most_bytes / slice_bytes})));
  const std::shared_ptr<void> memory = ctx.allocate(slice_bytes * slices);
  auto* partial = static_cast<Sum<T>*>(memory.get());  // [slices, c_out, taps, c_in]
  const int64_t blocks = ceil_div(p.c_in, at_once);
  for_each(ctx, slices * p.taps * blocks * p.c_out, [=] __device__(int64_t i) {
    const int64_t line = i / p.c_out;
    const int64_t slice = line / blocks / p.taps;
    const WeightPlace at = {static_cast<int>(line / blocks % p.taps),
                            static_cast<int>(line % blocks) * at_once,
                            static_cast<int>(i % p.c_out)};
    Sum<T> sums[at_once] = {};
    p.add_gradient<T>(at, slice * p.rows / slices, (slice + 1) * p.rows / slices, sums);
    Sum<T>* to = partial + slice * p.w_size() + (int64_t{at.out} * p.taps + at.tap) * p.c_in;
    for (int k = at.in; k < min(p.c_in, at.in + at_once); ++k) to[k] = sums[k - at.in];
  });
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
