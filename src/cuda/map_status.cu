// SPDX-License-Identifier: Apache-2.0
#include "conv/coords.h"
#include "cuda/launch.cuh"
#include "cuda/voxel_index.cuh"

namespace voxgemm::cuda {
namespace {

// Rows of one side with their voxel's lowest row, or none.
struct FirstRows {
  const int32_t* data;
  int64_t rows;
  explicit FirstRows(const Matrix& first) : data(first.as<int32_t>()), rows(first.rows) {}
};

__global__ void write_status(FirstRows in,
                             FirstRows out,
                             const long long* pairs_per_tap,
                             unsigned long long* status) {
  unsigned repeated[2] = {};
  for (int64_t r = thread_index(); r < max(in.rows, out.rows); r += thread_count()) {
    if (r < in.rows && in.data[r] != r) ++repeated[0];
    if (r < out.rows && out.data[r] != r) ++repeated[1];
  }
  // Sums of integers: the order does not matter.
  for (int side = 0; side < 2; ++side) {
    if (repeated[side] != 0) atomicAdd(status + 1 + side, repeated[side]);
  }
  if (thread_index() == 0) status[0] = static_cast<unsigned long long>(pairs_per_tap[0]);
}

}  // namespace

Matrix map_status(const Context& ctx, const KernelMap& map) {
  const DeviceGuard guard(ctx.device);
  Matrix status = make_matrix(ctx, 1, 3, Dtype::i64);
  fill_bytes(ctx, status.data, 0, 3 * sizeof(int64_t));
  Grid grid = over(ctx, std::max(map.in_first.rows, map.out_first.rows));
  grid.blocks = std::max<int64_t>(grid.blocks, 1);
  launch(ctx, grid, write_status, FirstRows(map.in_first), FirstRows(map.out_first),
         map.pairs_per_tap.as<long long>(), status.as<unsigned long long>());
  return status;
}

std::array<int64_t, 3> read_status(const Context& ctx, const MatrixRef& status) {
  const DeviceGuard guard(ctx.device);
  return read_back(ctx, status.as<const std::array<int64_t, 3>>());
}

}  // namespace voxgemm::cuda
