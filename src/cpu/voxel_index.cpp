// SPDX-License-Identifier: Apache-2.0
#include "cpu/voxel_index.h"

#include <limits>

#include "voxgemm/error.h"

namespace voxgemm::cpu {
namespace {

// The voxels of coordinates, one a row, none of padding.
struct Rows {
  const int32_t* coords;

  template <class Emit>
  void operator()(int64_t row, const Emit& emit) const {
    const int32_t* c = coords + 4 * row;
    if (c[0] != padding_batch) emit(c[0], c[1], c[2], c[3]);
  }
};

}  // namespace

Box bounds(const Context& ctx, const MatrixRef& coords) {
  if (coords.rows == 0) return {};
  const int64_t tasks = (coords.rows + rows_per_task - 1) / rows_per_task;
  std::vector<std::array<int32_t, 8>> parts(static_cast<size_t>(tasks));
  const auto* data = coords.as<int32_t>();
  parallel_for(ctx, tasks, [&](int64_t task, int) {
    const int32_t* row = data + 4 * task * rows_per_task;
    const int64_t rows = std::min(rows_per_task, coords.rows - task * rows_per_task);
    constexpr int32_t least = std::numeric_limits<int32_t>::min();
    constexpr int32_t most = std::numeric_limits<int32_t>::max();
    std::array<int32_t, 8> part = {most, most, most, most, least, least, least, least};
    for (int64_t r = 0; r < rows; ++r) {
      if (row[4 * r] == padding_batch) continue;
      for (int axis = 0; axis < 4; ++axis) {
        part[axis] = std::min(part[axis], row[4 * r + axis]);
        part[4 + axis] = std::max(part[4 + axis], row[4 * r + axis]);
      }
    }
    parts[static_cast<size_t>(task)] = part;
  });
  Box box;
  for (int axis = 0; axis < 4; ++axis) {
    box.low[axis] = parts[0][axis];
    box.high[axis] = parts[0][4 + axis];
    for (const auto& part : parts) {
      box.low[axis] = std::min<int64_t>(box.low[axis], part[axis]);
      box.high[axis] = std::max<int64_t>(box.high[axis], part[4 + axis]);
    }
  }
  return box.low[0] <= box.high[0] ? box : Box{};
}

BrickIndex::BrickIndex(const Context& ctx, const MatrixRef& coords)
    : State(coords.rows),
      bricks_(ctx, bounds(ctx, coords), coords.rows, Rows{coords.as<int32_t>()}),
      row_of_rank_(ctx, bricks_.voxels() + 1) {
  const Rows voxels{coords.as<int32_t>()};
  const bool distinct = unique_voxels() == rows;
  if (!distinct) {
    std::fill_n(row_of_rank_.data(), row_of_rank_.size(), std::numeric_limits<int32_t>::max());
  }
  row_of_rank_[0] = -1;
  for_pieces(ctx, rows, rows_per_task, [&](int64_t first, int64_t last) {
    bricks_.for_voxels(first, last, voxels, [&](int64_t r, const Brick& brick, int word, int bit) {
      int32_t& lowest = row_of_rank_[brick.rank_of(word, bit) + 1];
      const auto row = static_cast<int32_t>(r);
      if (distinct) {
        lowest = row;
        return;
      }
      const std::atomic_ref<int32_t> shared(lowest);
      int32_t seen = shared.load(std::memory_order_relaxed);
      while (row < seen && !shared.compare_exchange_weak(seen, row, std::memory_order_relaxed)) {
      }
    });
  });
}

int32_t BrickIndex::find(int32_t batch, int32_t x, int32_t y, int32_t z) const {
  const CellBox& box = bricks_.box();
  const Brick& brick = bricks_.at(box.key({static_cast<uint64_t>(batch - box.origin[0]),
                                           static_cast<uint64_t>((x - box.origin[1]) >> 3),
                                           static_cast<uint64_t>((y - box.origin[2]) >> 3),
                                           static_cast<uint64_t>((z - box.origin[3]) >> 3)}));
  const int bit = 8 * (y & 7) + (z & 7);
  return brick.has(x & 7, bit) ? row_of_rank_[brick.rank_of(x & 7, bit) + 1] : -1;
}

void BrickIndex::first_rows(const MatrixRef& coords,
                            int64_t first,
                            int64_t last,
                            int32_t* rows) const {
  bricks_.for_voxels(first, last, Rows{coords.as<int32_t>()},
                     [&](int64_t r, const Brick& brick, int word, int bit) {
                       rows[r] = row_of_rank_[brick.rank_of(word, bit) + 1];
                     });
}

Matrix BrickIndex::first_rows(const Context& ctx, const MatrixRef& coords) const {
  if (unique_voxels() == rows) return {};
  Matrix result = make_matrix(ctx, rows, 1, Dtype::i32);
  for_pieces(ctx, rows, rows_per_task, [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) {
      const auto* c = coords.row<int32_t>(r);
      const bool padding = c[0] == padding_batch;
      result.as<int32_t>()[r] = padding ? static_cast<int32_t>(r) : find(c[0], c[1], c[2], c[3]);
      check(result.as<int32_t>()[r] >= 0, "row ", r,
            " of the coordinates is not in the voxel index");
    }
  });
  return result;
}

std::unique_ptr<VoxelIndex::State> make_index(const Context& ctx, const MatrixRef& coords) {
  return std::make_unique<BrickIndex>(ctx, coords);
}

}  // namespace voxgemm::cpu
