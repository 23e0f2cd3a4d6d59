// SPDX-License-Identifier: Apache-2.0
#include <limits>
#include <numeric>

#include "conv/reach.h"
#include "cpu/voxel_index.h"
#include "voxgemm/error.h"

namespace voxgemm::cpu {
namespace {

using PlacedBrick = BrickSet::PlacedBrick;

// The voxels of a slab, the bricks with the same batch item and the same x, in ascending order.
void write_slab(const PlacedBrick* first, const PlacedBrick* last, int32_t* row) {
  const int64_t batch = first->corner[0];
  const int64_t x = first->corner[1];
  for (int word = 0; word < 8; ++word) {
    // A line: the bricks of the slab with the same y.
    for (const PlacedBrick* line = first; line != last;) {
      const PlacedBrick* end = line;
      uint64_t used = 0;
      for (; end != last && end->corner[2] == line->corner[2]; ++end)
        used |= end->brick->mask[word];
      for (int y = 0; y < 8 && used != 0; ++y) {
        for (const PlacedBrick* b = line; b != end; ++b) {
          uint64_t voxels = b->brick->mask[word] >> (8 * y) & 0xff;
          for (; voxels != 0; voxels &= voxels - 1) {
            row[0] = static_cast<int32_t>(batch);
            row[1] = static_cast<int32_t>(x + word);
            row[2] = static_cast<int32_t>(line->corner[2] + y);
            row[3] = static_cast<int32_t>(b->corner[3] + std::countr_zero(voxels));
            row += 4;
          }
        }
      }
      line = end;
    }
  }
}

// The voxels of a set in ascending (batch, x, y, z) order.
Matrix ascending(const Context& ctx, const BrickSet& set) {
  const std::vector<PlacedBrick> bricks = set.sorted();
  Matrix coords = make_matrix(ctx, set.voxels(), 4, Dtype::i32);
  struct Slab {
    const PlacedBrick* first;
    int64_t row;
  };
  std::vector<Slab> slabs;
  int64_t rows = 0;
  for (const PlacedBrick& b : bricks) {
    // The ends of int32 are multiples of 8, so a brick fits as a whole or not at all.
    const auto fits = [](int64_t value) { return value == static_cast<int32_t>(value); };
    check(fits(b.corner[1]) && fits(b.corner[2]) && fits(b.corner[3]),
          "an output voxel would be near x ", b.corner[1], ", y ", b.corner[2], ", z ", b.corner[3],
          ", expected coordinates of 32 bits");
    if (slabs.empty() || slabs.back().first->corner[0] != b.corner[0] ||
        slabs.back().first->corner[1] != b.corner[1]) {
      slabs.push_back({&b, rows});
    }
    for (const uint64_t mask : b.brick->mask) rows += std::popcount(mask);
  }
  const auto count = static_cast<int64_t>(slabs.size());
  slabs.push_back({bricks.data() + bricks.size(), rows});
  parallel_for(ctx, count, [&](int64_t task, int) {
    const Slab* slab = slabs.data() + task;
    write_slab(slab[0].first, slab[1].first, coords.row<int32_t>(slab->row));
  });
  return coords;
}

}  // namespace

Matrix output_coords(const Context& ctx,
                     const MatrixRef& coords,
                     const Geometry& geometry,
                     const OutputOptions& options) {
  const Reach reach(geometry, options);
  Box box = bounds(ctx, coords);
  bool empty = box.low[0] > box.high[0];
  for (int axis = 0; axis < 3 && !empty; ++axis) {
    box.low[axis + 1] = reach.axes[axis].low(box.low[axis + 1]);
    box.high[axis + 1] = reach.axes[axis].high(box.high[axis + 1]);
    empty = box.low[axis + 1] > box.high[axis + 1];
  }
  if (empty) return make_matrix(ctx, 0, 4, Dtype::i32);
  const auto* data = coords.as<int32_t>();
  const auto reached = [&]<bool single>(std::bool_constant<single>) {
    const BrickSet set(ctx, box, coords.rows, [&](int64_t row, const auto& emit) {
      const int32_t* c = data + 4 * row;
      if (c[0] == padding_batch) return;
      const auto add = [&](int64_t x, int64_t y, int64_t z) { emit(c[0], x, y, z); };
      reach.walk<single>(add, c[1], c[2], c[3]);
    });
    return ascending(ctx, set);
  };
  return reach.single ? reached(std::true_type{}) : reached(std::false_type{});
}

Matrix first_rows(const Context& ctx, const VoxelIndex::State& index, const MatrixRef& coords) {
  Matrix result = make_matrix(ctx, coords.rows, 1, Dtype::i32);
  for_pieces(ctx, coords.rows, rows_per_task, [&](int64_t first, int64_t last) {
    static_cast<const BrickIndex&>(index).first_rows(coords, first, last, result.as<int32_t>());
  });
  return result;
}

void exclusive_sums(const Context&, uint32_t* sums, int64_t count) {
  std::exclusive_scan(sums, sums + count, sums, 0U);
}

int64_t first_row_outside(const Context& ctx,
                          const MatrixRef& coords,
                          const std::array<int64_t, 4>& limits) {
  std::atomic<int64_t> lowest = coords.rows;
  parallel_for(ctx, (coords.rows + rows_per_task - 1) / rows_per_task, [&](int64_t task, int) {
    const int64_t last = std::min(coords.rows, (task + 1) * rows_per_task);
    for (int64_t r = task * rows_per_task; r < last; ++r) {
      if (coords.as<int32_t>()[4 * r] == padding_batch) continue;
      for (int axis = 0; axis < 4; ++axis) {
        if (coords.as<uint32_t>()[4 * r + axis] < limits[axis]) continue;
        int64_t seen = lowest;
        while (r < seen && !lowest.compare_exchange_weak(seen, r)) {
        }
        return;
      }
    }
  });
  return lowest;
}

}  // namespace voxgemm::cpu
