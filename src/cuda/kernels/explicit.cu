// SPDX-License-Identifier: Apache-2.0
//
// The textbook's way: a block G [rows, taps * c_in] with G[o, t] = x[in(o, t)], zero where absent,
// and one dense product, y = G W or dW = G^T dy. The product is a convolution with a single tap,
// which the other families compute (whichever the registry picks for it among those in natural
// order), so it has their precision and their bits are as repeatable. Rows are taken in chunks, so
// that G stays below 64 MiB; weight gradients of the chunks are added in order, in f32 (f64 for
// f64).
//
// An absent row is multiplied as zeros here, which an infinite weight or gradient turns into NaN;
// elements that come out NaN are computed again over present rows only. Finite operands never get
// there.
#include <algorithm>

#include "cuda/aligned.h"
#include "cuda/launch.cuh"
#include "cuda/kernels/families.h"
#include "cuda/kernels/pass.cuh"
#include "voxgemm/choose.h"

namespace voxgemm::cuda {
namespace {

struct Mode {
  Dtype dtype;
  Precision precision;
};

constexpr int64_t most_block_bytes = int64_t{64} << 20;

// Rows of G from row `first` of the pass on. Unit: whatever divides rows of x and their distances,
// per_unit elements.
template <class Unit>
__global__ void gather_rows(PassArgs p, int per_unit, int64_t first, int64_t rows, Unit* block) {
  const auto* x = static_cast<const Unit*>(p.x);
  const int64_t stride = p.x_stride / per_unit;
  const int64_t units = p.c_in / per_unit;
  const int64_t count = rows * p.taps * units;
  for (int64_t i = thread_index(); i < count; i += thread_count()) {
    const int64_t unit = i % units;
    const int tap = static_cast<int>(i / units % p.taps);
    const int64_t row = i / units / p.taps;
    const int32_t in = p.neighbours[tap * p.rows + first + row];
    block[(row * p.taps + p.weight_tap(tap)) * units + unit] =
        in >= 0 ? x[in * stride + unit] : Unit{};
  }
}

// Elements that came out NaN once more, over present rows.
template <class T>
__global__ void repair_rows(PassArgs p) {
  for (int64_t i = thread_index(); i < p.rows * p.c_out; i += thread_count()) {
    const int64_t row = i / p.c_out;
    const int n = static_cast<int>(i % p.c_out);
    if (isnan(widen(static_cast<const T*>(p.y)[row * p.y_stride + n]))) p.repair<T>(row, n);
  }
}

// sums: [2, size]; the second is added to the first.
template <class S>
__global__ void add_part(S* sums, int64_t size) {
  for (int64_t i = thread_index(); i < size; i += thread_count()) sums[i] += sums[size + i];
}

// What a product is made of.
struct Size {
  int64_t rows;
  int c_in;  // taps * c_in, of the pass's own sides
  int c_out;
};
// The problem of one tap that is that product, on the device of `problem` and in its arithmetic.
Problem product_of(Problem problem, const Size& size) {
  if (problem.pass == Pass::grad_input) problem.pass = Pass::forward;
  problem.operation = Operation::submanifold;
  problem.geometry = Geometry::submanifold({1, 1, 1});
  problem.c_in = size.c_in;
  problem.c_out = size.c_out;
  problem.n_in = problem.n_out = problem.pairs = size.rows;
  return problem;
}

const Kernel& product_kernel(const Problem& product) {
  return choose(product, {.algorithms = {Algorithm::implicit_gemm}, .measured = false});
}

int64_t chunk_rows(int taps, int c_in, Dtype dtype) {
  const int64_t row_bytes = static_cast<int64_t>(taps) * c_in * size_of(dtype);
  return std::max<int64_t>(128, most_block_bytes / row_bytes / 128 * 128);
}

// The gathered block, the map with one tap that reads it, and the kernel that does.
struct Product {
  Matrix block;  // [chunk, taps * c_in]
  KernelMap map;
  const Kernel* kernel = nullptr;
  ScheduleOptions schedule;
};

Product make_product(const Context& ctx, const Mode& mode, Pass pass, const ConvArgs& args) {
  const WeightsRef& w = args.w;
  const int64_t rows = std::min(args.y.rows, chunk_rows(w.taps, w.c_in, mode.dtype));
  Product product;
  product.block = make_matrix(ctx, rows, int64_t{w.taps} * w.c_in, mode.dtype);
  product.map.geometry = Geometry::submanifold({1, 1, 1});
  product.map.neighbours = make_matrix(ctx, 1, rows, Dtype::i32);
  product.map.pairs_per_tap = make_matrix(ctx, 1, 1, Dtype::i64);
  // Every row has the tap.
  auto* list = product.map.neighbours.as<int32_t>();
  auto* pairs = product.map.pairs_per_tap.as<int64_t>();
  for_each(ctx, rows, [=] __device__(int64_t i) {
    if (i == 0) *pairs = rows;
    list[i] = static_cast<int32_t>(i);
  });
  Problem problem;
  problem.pass = pass;
  problem.dtype = mode.dtype;
  problem.precision = mode.precision;
  problem.place(ctx);
  problem = product_of(problem, {rows, static_cast<int>(product.block.cols), w.c_out});
  product.kernel = &product_kernel(problem);
  product.schedule = product.kernel->schedule(*product.kernel, problem);
  check(product.schedule.order == ScheduleOptions::Order::natural, product.kernel->name,
        " wants another order of rows for the product of a gathered block than the natural one");
  return product;
}

// G of the rows from `first` on; the map then has that many rows.
MatrixRef gather(const Context& ctx, const ConvArgs& args, int64_t first, Product* product) {
  MatrixRef block = product->block;
  block.rows = std::min(block.rows, args.y.rows - first);
  KernelMap& map = product->map;
  map.n_in = map.n_out = block.rows;
  map.neighbours.cols = map.neighbours.stride = block.rows;
  const auto run = [&]<class Unit>(Unit) {
    const auto elements = static_cast<int>(sizeof(Unit) / size_of(block.dtype));
    launch(ctx, over(ctx, block.rows * block.cols / elements), gather_rows<Unit>, PassArgs(args),
           elements, first, block.rows, static_cast<Unit*>(block.data));
  };
  is_wide(args.x) ? run(uint4{}) : dispatch_size(block.dtype, run);
  return block;
}

void multiply(const Context& ctx, Pass pass, const Product& product, ConvArgs args) {
  const Schedule schedule = Schedule::from_parts(product.map, product.schedule, {});
  args.schedule = &schedule;
  args.map = &product.map;
  product.kernel->launch(*product.kernel, ctx, pass, args);
}

MatrixRef rows_from(MatrixRef m, int64_t first, int64_t rows) {
  m.data = m.row<char>(0) + first * m.stride * static_cast<int64_t>(size_of(m.dtype));
  m.rows = rows;
  return m;
}

// w as it is, if [taps, c_in] are one axis of it, or as [c_out, taps, c_in].
AlignedWeights joined_taps(const Context& ctx, const WeightsRef& w) {
  if (w.tap_stride == w.c_in * w.in_stride) return {w, nullptr};
  AlignedWeights copied{w, ctx.allocate(size_of(w.dtype) * w.taps * w.c_in * w.c_out)};
  copied.weights.data = copied.memory.get();
  copied.weights.tap_stride = w.c_in;
  copied.weights.in_stride = 1;
  copied.weights.out_stride = static_cast<int64_t>(w.taps) * w.c_in;
  copy_weights(ctx, w, copied.weights);
  return copied;
}

// Sums of a gradient, [2, taps, c_in, c_out]: of the chunks so far, and of one.
AlignedWeights gradient_sums(const Context& ctx, Dtype dtype, WeightsRef w) {
  w.dtype = dtype == Dtype::f64 ? Dtype::f64 : Dtype::f32;
  w.tap_stride = int64_t{w.c_in} * w.c_out;
  w.in_stride = w.c_out;
  w.out_stride = 1;
  AlignedWeights sums{w, ctx.allocate(2 * size_of(w.dtype) * w.taps * w.tap_stride)};
  sums.weights.data = sums.memory.get();
  return sums;
}

const Mode& mode_of(const Kernel& kernel) { return *static_cast<const Mode*>(kernel.family); }

std::string why_not(const Kernel& kernel, const Problem& problem) {
  const Mode& mode = mode_of(kernel);
  if (mode.dtype != problem.dtype) return join("takes ", name(mode.dtype));
  if (mode.precision != problem.precision) return join("computes in ", name(mode.precision));
  return "";
}

// The product with every tap of every row, and the block written and read.
double cost(const Kernel&, const Problem& problem) {
  const bool backward = problem.pass == Pass::grad_input;
  const int c_in = backward ? problem.c_out : problem.c_in;
  const int c_out = backward ? problem.c_in : problem.c_out;
  const Problem product =
      product_of(problem, {problem.n_out, problem.geometry.taps() * c_in, c_out});
  const Kernel& kernel = product_kernel(product);
  const double bytes = 2.0 * static_cast<double>(problem.n_out) * problem.geometry.taps() * c_in *
                       static_cast<double>(size_of(problem.dtype));
  // The sums of every chunk are added to those before, and written at the end.
  const double sums = problem.pass == Pass::grad_weight
                          ? 80.0 * problem.geometry.taps() * problem.c_in * problem.c_out
                          : 0.0;
  // Half of what an H100's memory copies.
  return 10e-6 + kernel.cost(kernel, product) + bytes / 1.5e12 + sums / 4.4e12;
}

ScheduleOptions schedule(const Kernel&, const Problem&) {
  return {.tile_rows = 128, .chunk_rows = 128};
}

void launch_pass(const Kernel& kernel, const Context& ctx, Pass pass, const ConvArgs& args) {
  const DeviceGuard guard(ctx.device);
  const Mode& mode = mode_of(kernel);
  const PassArgs p(args);
  const bool is_gradient = pass == Pass::grad_weight;
  const AlignedWeights w =
      is_gradient ? gradient_sums(ctx, mode.dtype, args.w) : joined_taps(ctx, args.w);
  WeightsRef joined = w.weights;
  joined.taps = 1;
  joined.c_in = args.w.taps * args.w.c_in;
  Product product = make_product(ctx, mode, pass, args);
  dispatch_device_float(mode.dtype, [&]<class T>(Type<T>) {
    auto* sums = static_cast<Sum<T>*>(w.memory.get());
    for (int64_t first = 0; first < p.rows; first += product.block.rows) {
      const MatrixRef block = gather(ctx, args, first, &product);
      multiply(
          ctx, is_gradient ? pass : Pass::forward, product,
          {.x = block, .w = joined, .bias = args.bias, .y = rows_from(args.y, first, block.rows)});
      if (!is_gradient) continue;
      if (first > 0) launch(ctx, over(ctx, p.w_size()), add_part<Sum<T>>, sums, p.w_size());
      joined.data = sums + p.w_size();
    }
    if (is_gradient) return launch(ctx, over(ctx, p.w_size()), add_slices<T>, p, sums, 1, false);
    launch(ctx, over(ctx, p.rows * p.c_out), repair_rows<T>, p);
  });
}

}  // namespace

std::vector<Kernel> explicit_kernels() {
  static constexpr Mode modes[] = {
      {Dtype::f16, Precision::ieee},   {Dtype::bf16, Precision::ieee},
      {Dtype::f32, Precision::ieee},   {Dtype::f32, Precision::tf32},
      {Dtype::f32, Precision::bf16x3}, {Dtype::f32, Precision::bf16x6},
      {Dtype::f64, Precision::ieee},
  };
  std::vector<Kernel> rows;
  for (const Mode& mode : modes) {
    const bool is_mode = mode.precision != Precision::ieee;
    rows.push_back(
        {.name = join("explicit_gemm_cuda/", is_mode ? name(mode.precision) : name(mode.dtype)),
         .algorithm = Algorithm::explicit_gemm,
         .why_not = why_not,
         .cost = cost,
         .schedule = schedule,
         .launch = launch_pass,
         .family = &mode});
  }
  return rows;
}

}  // namespace voxgemm::cuda
