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
#include "cuda/kernels/families.h"

#include <algorithm>

#include "cuda/aligned.h"
#include "cuda/float.cuh"
#include "cuda/launch.cuh"
#include "cuda/voxel_index.cuh"
#include "voxgemm/choose.h"

namespace voxgemm::cuda {
namespace {

struct Mode {
  Dtype dtype;
  Precision precision;
};

constexpr int64_t most_block_bytes = int64_t{64} << 20;

struct Gather {
  const int32_t* neighbours;  // [taps, all_rows], at the chunk's first row
  int64_t all_rows;
  int taps;
  bool mirror_taps;
  int64_t units;         // of a row of x
  int64_t stride;        // from row to row of x, in units
  int64_t block_stride;  // of G
};

// Unit: whatever divides rows and their distances.
template <class Unit>
__global__ void gather_rows(Gather g, const Unit* x, int64_t rows, Unit* block) {
  const int64_t count = rows * g.taps * g.units;
  for (int64_t i = thread_index(); i < count; i += thread_count()) {
    const int64_t unit = i % g.units;
    const int tap = static_cast<int>(i / g.units % g.taps);
    const int64_t row = i / g.units / g.taps;
    const int32_t in = g.neighbours[tap * g.all_rows + row];
    const int place = g.mirror_taps ? g.taps - 1 - tap : tap;
    block[row * g.block_stride + place * g.units + unit] =
        in >= 0 ? x[in * g.stride + unit] : Unit{};
  }
}

// The map of one tap that every row has: list is its neighbours.
__global__ void count_up(int32_t* list, int64_t* pairs_per_tap, int64_t count) {
  if (thread_index() == 0) *pairs_per_tap = count;
  for (int64_t i = thread_index(); i < count; i += thread_count()) {
    list[i] = static_cast<int32_t>(i);
  }
}

// What repair needs of a pass; rows are those of the whole map.
template <class T>
struct Repair {
  const int32_t* neighbours;  // [taps, rows]
  int64_t rows;
  int taps;
  bool mirror_taps;
  int c_in;
  int c_out;
  const T* x;
  int64_t x_stride;
};

template <class T>
struct Placed {
  T* data;
  int64_t tap_stride;
  int64_t in_stride;
  int64_t out_stride;
  __device__ T& at(int tap, int k, int n) const {
    return data[tap * tap_stride + k * in_stride + n * out_stride];
  }
};

template <class T>
__global__ void repair_rows(Repair<T> r, Placed<const T> w, const T* bias, T* y, int64_t stride) {
  for (int64_t i = thread_index(); i < r.rows * r.c_out; i += thread_count()) {
    const int64_t row = i / r.c_out;
    const int n = static_cast<int>(i % r.c_out);
    T& result = y[row * stride + n];
    if (!isnan(widen(result))) continue;
    Sum<T> sum = 0;
    for (int tap = 0; tap < r.taps; ++tap) {
      const int32_t in = r.neighbours[tap * r.rows + row];
      const int of_tap = r.mirror_taps ? r.taps - 1 - tap : tap;
      for (int k = 0; in >= 0 && k < r.c_in; ++k) {
        sum += Sum<T>(widen(r.x[in * r.x_stride + k])) * Sum<T>(widen(w.at(of_tap, k, n)));
      }
    }
    store(bias != nullptr ? sum + Sum<T>(widen(bias[n])) : sum, &result);
  }
}

// total (+)= part, both [taps, c_in, c_out].
template <class S>
__global__ void add_part(const S* part, S* total, int64_t size, bool is_first) {
  for (int64_t i = thread_index(); i < size; i += thread_count()) {
    total[i] = is_first ? part[i] : total[i] + part[i];
  }
}

// Rounds the sums to dw, those that are NaN once more over present pairs.
template <class T, class Result>
__global__ void write_gradient(
    Repair<T> r, const Sum<T>* sums, const T* dy, int64_t dy_stride, Placed<Result> dw) {
  const int64_t size = int64_t{r.taps} * r.c_in * r.c_out;
  for (int64_t i = thread_index(); i < size; i += thread_count()) {
    const int n = static_cast<int>(i % r.c_out);
    const int k = static_cast<int>(i / r.c_out % r.c_in);
    const int tap = static_cast<int>(i / r.c_out / r.c_in);
    Sum<T> sum = sums[i];
    if (isnan(sum)) {
      sum = 0;
      for (int64_t row = 0; row < r.rows; ++row) {
        const int32_t in = r.neighbours[tap * r.rows + row];
        if (in < 0) continue;
        sum += Sum<T>(widen(r.x[in * r.x_stride + k])) * Sum<T>(widen(dy[row * dy_stride + n]));
      }
    }
    store(sum, &dw.at(tap, k, n));
  }
}

// The single-tap problem of a chunk: c_in is taps * c_in, of the pass's own sides.
Problem product_of(const Problem& problem, int64_t rows) {
  const bool backward = problem.pass == Pass::grad_input;
  Problem product = problem;
  if (backward) product.pass = Pass::forward;
  product.operation = Operation::submanifold;
  product.geometry = Geometry::submanifold({1, 1, 1});
  product.c_in = problem.geometry.taps() * (backward ? problem.c_out : problem.c_in);
  product.c_out = backward ? problem.c_in : problem.c_out;
  product.n_in = product.n_out = product.pairs = rows;
  return product;
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
  launch(ctx, over(ctx, rows), count_up, product.map.neighbours.as<int32_t>(),
         product.map.pairs_per_tap.as<int64_t>(), rows);
  Problem problem;
  problem.pass = pass == Pass::grad_weight ? pass : Pass::forward;
  problem.dtype = mode.dtype;
  problem.precision = mode.precision;
  problem.geometry = product.map.geometry;
  problem.c_in = static_cast<int>(product.block.cols);
  problem.c_out = w.c_out;
  problem.n_in = problem.n_out = problem.pairs = rows;
  problem.place(ctx);
  product.kernel = &product_kernel(problem);
  product.schedule = product.kernel->schedule(*product.kernel, problem);
  check(product.schedule.order == ScheduleOptions::Order::natural, product.kernel->name,
        " wants another order of rows for the product of a gathered block than the natural one");
  return product;
}

// G of the rows from `first` on; the map then has that many rows.
MatrixRef gather(const Context& ctx, const ConvArgs& args, int64_t first, Product* product) {
  const WeightsRef& w = args.w;
  MatrixRef block = product->block;
  block.rows = std::min(block.rows, args.y.rows - first);
  KernelMap& map = product->map;
  map.n_in = map.n_out = block.rows;
  map.neighbours.cols = map.neighbours.stride = block.rows;
  const auto run = [&]<class Unit>(Unit) {
    const auto per_unit = static_cast<int64_t>(sizeof(Unit) / size_of(block.dtype));
    const Gather plan = {.neighbours = args.map->neighbours.as<int32_t>() + first,
                         .all_rows = args.y.rows,
                         .taps = w.taps,
                         .mirror_taps = args.mirror_taps,
                         .units = w.c_in / per_unit,
                         .stride = args.x.stride / per_unit,
                         .block_stride = block.stride / per_unit};
    launch(ctx, over(ctx, block.rows * w.taps * plan.units), gather_rows<Unit>, plan,
           static_cast<const Unit*>(args.x.data), block.rows, static_cast<Unit*>(block.data));
  };
  const int64_t elements = static_cast<int64_t>(16 / size_of(block.dtype));
  const bool whole = w.c_in % elements == 0 && args.x.stride % elements == 0 &&
                     reinterpret_cast<uintptr_t>(args.x.data) % 16 == 0;
  if (whole) {
    run(uint4{});
  } else if (size_of(block.dtype) == 2) {
    run(uint16_t{});
  } else if (size_of(block.dtype) == 4) {
    run(uint32_t{});
  } else {
    run(uint64_t{});
  }
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

template <class T>
Repair<T> repair_of(const ConvArgs& args) {
  return {args.map->neighbours.as<int32_t>(),
          args.y.rows,
          args.w.taps,
          args.mirror_taps,
          args.w.c_in,
          args.w.c_out,
          args.x.as<T>(),
          args.x.stride};
}

template <class T>
Placed<T> placed(const WeightsRef& w) {
  return {static_cast<T*>(w.data), w.tap_stride, w.in_stride, w.out_stride};
}

// The weights [taps, c_in] of an output channel as one axis: themselves, or a copy.
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

void convolve(const Context& ctx, const Mode& mode, Pass pass, const ConvArgs& args) {
  const AlignedWeights w = joined_taps(ctx, args.w);
  WeightsRef joined = w.weights;
  joined.taps = 1;
  joined.c_in = args.w.taps * args.w.c_in;
  Product product = make_product(ctx, mode, pass, args);
  const int64_t step = product.block.rows;
  for (int64_t first = 0; first < args.y.rows; first += step) {
    const MatrixRef block = gather(ctx, args, first, &product);
    multiply(
        ctx, Pass::forward, product,
        {.x = block, .w = joined, .bias = args.bias, .y = rows_from(args.y, first, block.rows)});
  }
  dispatch_device_float(mode.dtype, [&]<class T>(Type<T>) {
    launch(ctx, over(ctx, args.y.rows * args.y.cols), repair_rows<T>, repair_of<T>(args),
           placed<const T>(args.w), static_cast<const T*>(args.bias), args.y.as<T>(),
           args.y.stride);
  });
}

void grad_weight(const Context& ctx, const Mode& mode, const ConvArgs& args) {
  const WeightsRef& w = args.w;
  const int64_t size = int64_t{w.taps} * w.c_in * w.c_out;
  const Dtype sums = mode.dtype == Dtype::f64 ? Dtype::f64 : Dtype::f32;
  const Matrix part = make_matrix(ctx, int64_t{w.taps} * w.c_in, w.c_out, sums);
  const Matrix total = make_matrix(ctx, part.rows, part.cols, sums);
  const WeightsRef of_part = {.data = part.data,
                              .taps = 1,
                              .c_in = static_cast<int>(part.rows),
                              .c_out = w.c_out,
                              .tap_stride = size,
                              .in_stride = w.c_out,
                              .out_stride = 1,
                              .dtype = sums,
                              .device = w.device};
  Product product = make_product(ctx, mode, Pass::grad_weight, args);
  const int64_t step = product.block.rows;
  dispatch_device_float(mode.dtype, [&]<class T>(Type<T>) {
    for (int64_t first = 0; first < args.y.rows; first += step) {
      const MatrixRef block = gather(ctx, args, first, &product);
      multiply(ctx, Pass::grad_weight, product,
               {.x = block, .w = of_part, .y = rows_from(args.y, first, block.rows)});
      launch(ctx, over(ctx, size), add_part<Sum<T>>, part.as<Sum<T>>(), total.as<Sum<T>>(), size,
             first == 0);
    }
    const auto write = [&]<class Result>(Result) {
      launch(ctx, over(ctx, size), write_gradient<T, Result>, repair_of<T>(args),
             total.as<Sum<T>>(), args.y.as<T>(), args.y.stride, placed<Result>(w));
    };
    if (w.dtype == mode.dtype) {
      write(T{});
    } else {
      write(float{});
    }
  });
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
  const int c_in = problem.pass == Pass::grad_input ? problem.c_out : problem.c_in;
  const Problem product = product_of(problem, problem.n_out);
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
  if (pass == Pass::grad_weight) return grad_weight(ctx, mode_of(kernel), args);
  convolve(ctx, mode_of(kernel), pass, args);
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
