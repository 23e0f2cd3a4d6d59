// SPDX-License-Identifier: Apache-2.0
#include <numeric>
#include <vector>

#include "conv/operators.h"
#include "core/dispatch.h"
#include "cpu/brick_set.h"
#include "cpu/row_lists.h"

namespace voxgemm::cpu {
namespace {

bool picks(Reduction reduction) {
  return reduction == Reduction::max || reduction == Reduction::min;
}

PickArgs pick_args(const RowArgs& rows, Reduction reduction, int32_t* winners) {
  return {.rows = rows, .smallest = reduction == Reduction::min, .winners = winners};
}

int32_t* winners_of(const Reduced& result, int64_t row) {
  return result.winners ? result.winners->row<int32_t>(row) : nullptr;
}

// Rows of a segment that are reduced by one task. What the slices of a longer one make is reduced
// in order: the same for any number of threads.
constexpr int64_t slice_rows = 4096;

int64_t slices_of(const RowList& list) { return (list.count + slice_rows - 1) / slice_rows; }

// body(lists of a slice, its number) for all slices of a list.
template <class Body>
void for_slices(const Context& ctx, const RowList& list, const Body& body) {
  for_row_pieces(ctx, list.count, slice_rows, [&](int64_t first, int64_t last) {
    const RowList slice = {.rows = list.rows + first, .count = last - first};
    body(std::span<const RowList>(&slice, 1), first / slice_rows);
  });
}

// One row of a result, of a list of several slices.
void sum_long(const Context& ctx,
              const RowList& list,
              const MatrixRef& x,
              Reduction reduction,
              const Reduced& result) {
  const RowEngine& engine = row_engine(x.dtype);
  const int64_t slices = slices_of(list);
  Matrix sums = make_matrix(ctx, slices, x.cols, Dtype::f64);
  for_slices(ctx, list, [&](std::span<const RowList> lists, int64_t slice) {
    engine.sum_to_double(row_args(x, lists, sums, slice));
  });
  const auto divisor = static_cast<double>(reduction == Reduction::mean ? list.count : 1);
  dispatch_float(x.dtype, [&]<class T>(Type<T>) {
    for (int64_t c = 0; c < x.cols; ++c) {
      double total = 0;
      for (int64_t slice = 0; slice < slices; ++slice) total += sums.row<double>(slice)[c];
      store(total / divisor, result.y.row<T>(0)[c]);
    }
  });
}

void pick_long(const Context& ctx,
               const RowList& list,
               const MatrixRef& x,
               Reduction reduction,
               const Reduced& result) {
  const RowEngine& engine = row_engine(x.dtype);
  const int64_t slices = slices_of(list);
  Matrix best = make_matrix(ctx, slices, x.cols, x.dtype);
  Matrix winners = make_matrix(ctx, slices, x.cols, Dtype::i32);
  for_slices(ctx, list, [&](std::span<const RowList> lists, int64_t slice) {
    engine.pick(pick_args(row_args(x, lists, best, slice), reduction, winners.row<int32_t>(slice)));
  });
  std::vector<int32_t> numbers(static_cast<size_t>(slices));
  std::iota(numbers.begin(), numbers.end(), 0);
  const RowList all = {.rows = numbers.data(), .count = slices};
  std::vector<int32_t> from(static_cast<size_t>(x.cols));
  engine.pick(pick_args(row_args(best, {&all, 1}, result.y, 0), reduction, from.data()));
  if (!result.winners) return;
  for (int64_t c = 0; c < x.cols; ++c) {
    result.winners->row<int32_t>(0)[c] = winners.row<int32_t>(from[c])[c];
  }
}

}  // namespace

void pool(const Context& ctx,
          const KernelMap& map,
          const MatrixRef& x,
          Reduction reduction,
          const Reduced& result) {
  const RowEngine& engine = row_engine(x.dtype);
  for_map_lists(ctx, engine, map, [&](std::span<const RowList> lists, int64_t first) {
    const RowArgs rows = row_args(x, lists, result.y, first);
    if (picks(reduction)) return engine.pick(pick_args(rows, reduction, winners_of(result, first)));
    engine.sum({.rows = rows, .mean = reduction == Reduction::mean});
  });
}

void pool_grad(const Context& ctx, const PoolBack& grad, const MatrixRef& dx) {
  const RowEngine& engine = row_engine(dx.dtype);
  dispatch_float(dx.dtype, [&]<class T>(Type<T>) {
    // Of a mean each row of dy is divided once, not for every row that gets a share.
    std::vector<Sum<T>> shares(static_cast<size_t>(grad.counts.rows));
    for (size_t r = 0; r < shares.size(); ++r) {
      shares[r] = Sum<T>{1} / static_cast<Sum<T>>(grad.counts.as<const int32_t>()[r]);
    }
    const void* scales = shares.empty() ? nullptr : shares.data();
    for_map_lists(
        ctx, engine, *grad.transposed, [&](std::span<const RowList> lists, int64_t first) {
          const RowArgs rows = row_args(grad.dy, lists, dx, first);
          if (!grad.winners) return engine.sum({.rows = rows, .scales = scales});
          engine.sum_won(
              {.rows = rows, .winners = grad.winners->as<const int32_t>(), .first = first});
        });
  });
}

void segment_reduce(const Context& ctx,
                    const MatrixRef& x,
                    const MatrixRef& segments,
                    Reduction reduction,
                    const Reduced& result) {
  const RowEngine& engine = row_engine(x.dtype);
  const RowLists<float> list_of(segments, result.y.rows);
  const auto short_list = [&](int64_t segment) {
    const RowList list = list_of(segment);
    return list.count > slice_rows ? RowList{} : list;
  };
  for_row_pieces(ctx, result.y.rows, list_rows, [&](int64_t first, int64_t last) {
    for_lists(first, last, short_list, [&](std::span<const RowList> lists, int64_t segment) {
      const RowArgs rows = row_args(x, lists, result.y, segment);
      if (picks(reduction)) {
        return engine.pick(pick_args(rows, reduction, winners_of(result, segment)));
      }
      engine.sum_in_double({.rows = rows, .mean = reduction == Reduction::mean});
    });
  });
  for (int64_t segment = 0; segment < result.y.rows; ++segment) {
    const RowList list = list_of(segment);
    if (list.count <= slice_rows) continue;
    Reduced row = {rows_from(result.y, segment)};
    if (result.winners) row.winners = rows_from(*result.winners, segment);
    (picks(reduction) ? pick_long : sum_long)(ctx, list, x, reduction, row);
  }
}

}  // namespace voxgemm::cpu
