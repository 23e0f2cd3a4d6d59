// SPDX-License-Identifier: Apache-2.0
#include "cuda/kernels/families.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "core/dispatch.h"
#include "cuda/aligned.h"
#include "cuda/kernels/families_sm90.h"
#include "cuda/kernels/grad_weight_sm90.cuh"
#include "cuda/launch.cuh"

namespace voxgemm::cuda {
namespace {

using grad_weight_sm90::add_pieces;
using grad_weight_sm90::add_threads;
using grad_weight_sm90::Config;
using grad_weight_sm90::Params;
using sm80::Math;

// Of the channel blocks: large teams read the same rows, but all multiprocessors should be busy.
int parts_of(int blocks, int multiprocessors) {
  int best = 1;
  double most = 0;
  for (int parts = 1; parts <= blocks && most <= 0.95; ++parts) {
    const auto teams = static_cast<double>(multiprocessors / ceil_div(blocks, parts));
    const double busy = teams * blocks / (static_cast<double>(multiprocessors) * parts);
    if (busy > most) best = parts;
    most = std::max(most, busy);
  }
  return best;
}

// x, dy: as the kernel reads them.
template <class C>
void run(const Context& ctx, const ConvArgs& args, const MatrixRef& x, const MatrixRef& dy) {
  Params p = {PassArgs(args)};
  p.pairs_per_tap = args.map->pairs_per_tap.as<long long>();
  p.x_rows = x.data;
  p.x_row_bytes = static_cast<uint32_t>(2 * x.stride);
  p.dy_rows = dy.data;
  p.dy_row_bytes = static_cast<uint32_t>(2 * dy.stride);
  p.groups = static_cast<int>(ceil_div(p.taps, C::taps));
  p.out_blocks = static_cast<int>(ceil_div(p.c_out, C::columns));
  p.blocks = static_cast<int>(ceil_div(p.c_in, C::ins)) * p.out_blocks;
  if (C::scheduled) {
    p.members = p.groups * p.blocks;
  } else {
    p.parts = std::min(parts_of(p.blocks, multiprocessors(ctx)), C::most_taps / p.taps);
    p.members = static_cast<int>(ceil_div(p.blocks, p.parts));
    p.entries = p.taps * p.parts;
  }
  const int64_t useful_teams = p.entries * ceil_div(p.rows, C::rows_per_team);
  p.teams = static_cast<int>(
      std::max<int64_t>(std::min<int64_t>(multiprocessors(ctx) / p.members, useful_teams), 1));
  const int64_t slots = p.teams + (C::scheduled ? 1 : p.teams);
  const size_t axis_bytes = sizeof(grad_weight_sm90::AxisPlace) * (p.entries + 1);
  const auto memory = make_room(ctx, Room{&p.partials, slots * p.members * C::piece_size});
  launch(ctx,
         {.blocks = int64_t{p.teams} * p.members,
          .threads = C::threads,
          .shared_bytes = C::fixed_bytes + axis_bytes},
         grad_weight_sm90::grad_weight<C>, p);
  launch(ctx,
         {.blocks = C::piece_size / 1024,
          .columns = int64_t{p.members} * std::min(p.entries, p.teams - 1),
          .threads = add_threads,
          .shared_bytes = axis_bytes,
          .overlaps = true},
         add_pieces<C>, p);
}

// Groups of a masked schedule have that many taps at most.
constexpr int most_scheduled_taps = 32;

// For f32 operands in terms: one tap where products are the limit, else with room for 3 stages.
template <int terms, class Body>
auto with_split_tile(const Sizes& size, const Body& body) {
  using T = __nv_bfloat16;
  constexpr int columns = terms == 2 ? 128 : 64;
  const bool wide = size.c_out > 64;
  if (size.c_in > 64 || size.taps > most_scheduled_taps || size.taps == 1) {
    if (wide) return body(Type<Config<T, 1, 128, columns, terms>>{});
    return body(Type<Config<T, 1, 128, 64, terms>>{});
  }
  if (size.c_in > 32 || wide) {
    if (wide) return body(Type<Config<T, 2, 64, columns, terms>>{});
    return body(Type<Config<T, 2, 64, 64, terms>>{});
  }
  if (size.c_in > 16) return body(Type<Config<T, 4, 32, 64, terms>>{});
  return body(Type<Config<T, 8, 16, 64, terms>>{});
}

// The tile that holds the channels, with as many taps as registers and shared memory have room for.
// Where arithmetic is the limit, and for long kernels, it is one tap, and no absent row is read; of
// a single tap, as in the product of a gathered block, rows stand in natural order.
template <class T, class Body>
auto with_tile(const Sizes& size, const Body& body) {
  const int c_in = size.c_in;
  const int c_out = size.c_out;
  const bool many_channels = c_in > 64 && (c_out > 128 || (c_out > 64 && c_in > 128));
  if (many_channels || size.taps > most_scheduled_taps || size.taps == 1) {
    return body(Type<Config<T, 1, 256, 128>>{});
  }
  if (c_out > 64) {
    if (c_in <= 64) return body(Type<Config<T, 4, 64, 128>>{});
    return body(Type<Config<T, 2, 128, 128>>{});
  }
  if (c_in > 64) return body(Type<Config<T, 4, 128, 64>>{});
  if (c_in > 32) return body(Type<Config<T, 8, 64, 64>>{});
  if (c_out > 32) return body(Type<Config<T, 8, 32, 64>>{});
  if (c_in > 16) return body(Type<Config<T, 8, 32, 32>>{});
  return body(Type<Config<T, 16, 16, 32>>{});
}

template <class Body>
auto with_tile(Math math, const Sizes& size, const Body& body) {
  switch (math) {
    case Math::f16:
      return with_tile<__half>(size, body);
    case Math::bf16:
      return with_tile<__nv_bfloat16>(size, body);
    case Math::bf16x6:
      return with_split_tile<3>(size, body);
    default:
      // tf32 operands would have to lie with their rows contiguous; bf16x3 is the more accurate.
      return with_split_tile<2>(size, body);
  }
}

Math math_of(const Kernel& kernel) { return *static_cast<const Math*>(kernel.family); }

std::string limits(const Kernel& kernel, const Problem& problem) {
  std::string reason = sm90::limits(math_of(kernel), problem);
  if (!reason.empty()) return reason;
  const int most_taps =
      with_tile(math_of(kernel), problem, []<class C>(Type<C>) { return C::most_taps; });
  if (problem.geometry.taps() > most_taps) {
    return join("takes at most ", most_taps, " taps, the kernel has ", problem.geometry.taps());
  }
  return "";
}

// The producer's time, or that of writing dw.
double cost(const Kernel& kernel, const Problem& problem) {
  const Sizes size(problem);
  return with_tile(math_of(kernel), size, [&]<class C>(Type<C>) {
    // Absent rows are copied, too: on shells a tenth of x, and dy for every row with a group's tap.
    const double any = std::pow(C::taps, -0.7);
    constexpr double x = C::taps == 1 ? 1 : C::block_taps == 1 ? 1.1 : 1.3;
    const double tiles = static_cast<double>(ceil_div(size.c_in, C::ins)) *
                         static_cast<double>(ceil_div(size.c_out, C::columns));
    const double blocks = x * C::x_blocks / C::taps + any * C::dy_blocks;
    const double copies = problem.expected_pairs() * C::terms * blocks / 4;
    // 132 multiprocessors at 1.75 GHz; clocks of four rows of a block when all read (measured).
    constexpr double clocks_of_copy = C::scheduled ? 22 : 16;
    // Terms make 3 or 6 products.
    const double products =
        problem.expected_pairs() * 2 * C::ins * C::columns * C::terms * (C::terms + 1) / 2 / 4096;
    const double clocks = tiles * std::max(clocks_of_copy * copies, products) / 132;
    // Two launches, the first rows' way to the tensor cores, the last sums' to memory.
    const double bytes = 4.0 * size.taps * size.c_in * size.c_out;
    const double splitting =
        C::terms == 1 ? 0 : 4e-6 + 8.0 * problem.n_out * (size.c_in + size.c_out) / 3.5e12;
    return 25e-6 + splitting + std::max(clocks / 1.75e9, bytes / 2e12);
  });
}

ScheduleOptions schedule(const Kernel& kernel, const Problem& problem) {
  const bool scheduled =
      with_tile(math_of(kernel), problem, []<class C>(Type<C>) { return C::scheduled; });
  if (!scheduled) return {};
  return {.order = ScheduleOptions::Order::by_mask,
          .tile_rows = grad_weight_sm90::tile_rows,
          .chunk_rows = sm90::chunk_rows(problem.n_out)};
}

void launch_pass(const Kernel& kernel, const Context& ctx, Pass, const ConvArgs& args) {
  check(args.w.dtype == args.x.dtype || args.w.dtype == Dtype::f32,
        "the weight gradient has dtype ", name(args.w.dtype), ", expected f32 or that of x, ",
        name(args.x.dtype));
  const Matrix x = aligned_input(ctx, args.x);
  const Matrix dy = aligned_input(ctx, args.y);
  with_tile(math_of(kernel), args, [&]<class C>(Type<C>) {
    if constexpr (C::terms == 1) {
      run<C>(ctx, args, x, dy);
    } else {
      const sm90::Operands split =
          sm90::split_operands(ctx, C::terms == 2 ? Math::bf16x3 : Math::bf16x6,
                               {sm90::as_weights(x), {C::width, C::terms * C::width}},
                               {sm90::as_weights(dy), {64, C::terms * 64}});
      run<C>(ctx, args, split.x, sm90::as_rows(split.w));
    }
  });
}

}  // namespace

void load_grad_weight_sm90() { load(grad_weight_sm90::grad_weight<Config<__half, 1, 256, 128>>); }

std::vector<Kernel> grad_weight_sm90_kernels() {
  static constexpr Math maths[] = {Math::f16, Math::bf16, Math::tf32, Math::bf16x3, Math::bf16x6};
  std::vector<Kernel> rows;
  for (const Math& math : maths) {
    rows.push_back({.name = join("grad_weight_sm90/", sm80::name(math)),
                    .algorithm = Algorithm::masked_implicit_gemm_splitk,
                    // Rows in natural order from the map's own table, absent pairs left out, the
                    // rows cut in slices of which one may be all: every way but gathering.
                    .also = {Algorithm::masked_implicit_gemm, Algorithm::implicit_gemm,
                             Algorithm::implicit_gemm_splitk},
                    .dtype = sm80::dtype_of(math),
                    .precision = sm80::precision_of(math),
                    .passes = Passes::weight_gradient,
                    .limits = limits,
                    .cost = cost,
                    .schedule = schedule,
                    .launch = launch_pass,
                    .family = &math});
  }
  return rows;
}

}  // namespace voxgemm::cuda
