// SPDX-License-Identifier: Apache-2.0
//
// Results that are combinations of lists of rows of any length: y[r] = op over the places p with
// rows[p] = r, ascending. The places are sorted by row number, stable, and cut into pieces of
// `list_piece` places, wherever the lists begin and end. A thread owns `Op::width` columns of a
// piece. A list inside the piece is complete and written; of one that crosses a border the state is
// kept, and a second kernel combines those of a list in order: a warp each, whose lanes combine
// consecutive pieces and then, in pairs, each other's. So a list of a million places is as fast as
// a million lists (one thread a list: 3.5 ms, rows of 64 f16 on an H200), and sums have one order.
#pragma once

#include <cub/warp/warp_reduce.cuh>

#include "cuda/gather.cuh"

namespace voxgemm::cuda {

constexpr int list_piece = 256;

struct ListView {
  const uint32_t* rows;    // [places], ascending; those outside [0, count) are `count`
  const uint32_t* places;  // [places]
  const uint32_t* starts;  // [count + 1]: where each row's list begins
  uint32_t count;          // of lists
  int64_t length;          // of all lists together, absent ones too
};
struct RowLists : ListView {
  std::shared_ptr<void> memory;
};
// rows: i32, contiguous: of every place.
RowLists make_row_lists(const Context& ctx, const MatrixRef& rows, int64_t count);

// packs: of columns. ends: [pieces, 2, packs]: of the list that came into a piece, and of the one
// that leaves it. at_once: rows that are on their way together.
template <class Op, int at_once>
__global__ __launch_bounds__(gather_threads) void reduce_pieces(ListView lists,
                                                                int64_t packs,
                                                                typename Op::Arguments arguments,
                                                                typename Op::State* ends) {
  const int64_t item = thread_index();
  const int64_t piece = item / packs;
  const int64_t pack = item - piece * packs;
  const auto length = static_cast<uint32_t>(lists.length);
  const auto begin = static_cast<uint32_t>(piece * list_piece);
  if (piece * list_piece >= lists.length) return;
  const uint32_t end = begin + list_piece;
  const Op op{arguments, pack * Op::width};
  typename Op::State* const end_states = ends + 2 * piece * packs + pack;
  uint32_t row = lists.rows[begin];
  bool came_in = begin > 0 && lists.rows[begin - 1] == row;
  typename Op::State state = {};
  const auto put = [&](bool leaves) {
    if (row == lists.count) return;
    if (came_in) {
      end_states[0] = state;
    } else if (leaves) {
      end_states[packs] = state;
    } else {
      op.finish(state, row);
    }
  };
  for (uint32_t p = begin; p < end && row != lists.count; p += at_once) {
    uint32_t rows[at_once];
    Step steps[at_once];
    Pack<typename Op::Element, Op::width> values[at_once];
    unroll<at_once>([&](int k) {
      const uint32_t at = min(p + k, length - 1);
      rows[k] = p + k < length ? lists.rows[at] : lists.count;
      steps[k] = arguments.step(lists.places[at]);
      values[k] = load_pack<typename Op::Element, Op::width>(arguments.x.at(steps[k].in, op.col));
    });
    unroll<at_once>([&](int k) {
      if (rows[k] != row) {
        put(false);
        came_in = false;
        row = rows[k];
        state = {};
      }
      op.add(&state, values[k], 0, steps[k]);
    });
  }
  put(end < length && lists.rows[end] == row);
}

// The lists that begin in one piece and end in another. A warp owns a pack of columns of a piece.
template <class Op>
__global__ __launch_bounds__(gather_threads) void join_pieces(ListView lists,
                                                              int64_t packs,
                                                              typename Op::Arguments arguments,
                                                              const typename Op::State* ends) {
  using State = typename Op::State;
  using Reduce = cub::WarpReduce<State>;
  __shared__ typename Reduce::TempStorage storage;  // empty
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t pieces = (lists.length + list_piece - 1) / list_piece;
  const int64_t item = thread_index() / 32;
  if (item >= pieces * packs) return;
  const int64_t piece = item / packs;
  const int64_t pack = item - piece * packs;
  const int64_t end = (piece + 1) * list_piece;
  if (end >= lists.length) return;
  const uint32_t row = lists.rows[end];
  // Others have the lists that do not cross this piece's end, and those that came in.
  if (row == lists.count || lists.rows[end - 1] != row || lists.starts[row] < piece * list_piece) {
    return;
  }
  const Op op{arguments, pack * Op::width};
  const int64_t later = (lists.starts[row + 1] - 1) / list_piece - piece;
  State state = {};
  if (lane == 0) state = ends[(2 * piece + 1) * packs + pack];
  for (int64_t i = lane * later / 32; i < (lane + 1) * later / 32; ++i) {
    state.join(ends[2 * (piece + 1 + i) * packs + pack]);
  }
  state = Reduce(storage).Reduce(state, [](State sum, const State& later) {
    sum.join(later);
    return sum;
  });
  if (lane == 0) op.finish(state, row);
}

template <class Op, int at_once>
void reduce_lists(const Context& ctx,
                  const RowLists& lists,
                  int64_t cols,
                  const typename Op::Arguments& arguments) {
  const int64_t packs = ceil_div(cols, Op::width);
  const int64_t pieces = ceil_div(lists.length, list_piece);
  const auto memory = ctx.allocate(sizeof(typename Op::State) * 2 * pieces * packs);
  auto* ends = static_cast<typename Op::State*>(memory.get());
  const auto all = [](int64_t threads) {
    return Grid{.blocks = ceil_div(threads, gather_threads), .threads = gather_threads};
  };
  launch(ctx, all(pieces * packs), reduce_pieces<Op, at_once>, lists, packs, arguments, ends);
  launch(ctx, all(32 * pieces * packs), join_pieces<Op>, lists, packs, arguments, ends);
  const uint32_t* starts = lists.starts;
  for_each(ctx, lists.count * packs, [=] __device__(int64_t i) {
    const int64_t row = i / packs;
    if (starts[row] != starts[row + 1]) return;
    const Op op{arguments, (i - row * packs) * Op::width};
    op.finish({}, row);
  });
}

}  // namespace voxgemm::cuda
