// SPDX-License-Identifier: Apache-2.0
#include "conv/coords.h"
#include "conv/backend.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <vector>

#include "conv/items.h"
#include "conv/passes.h"
#include "conv/validate.h"
#include "voxgemm/error.h"

namespace voxgemm {
namespace {

constexpr int64_t most_rows = std::numeric_limits<int32_t>::max();

// The rows and padding behind them.
Matrix padded(const Context& ctx, const MatrixRef& coords, int64_t rows) {
  check(coords.rows <= rows, "output_coords found ", coords.rows, " voxels, max_voxels is ", rows);
  Matrix result = make_matrix(ctx, rows, 4, Dtype::i32);
  auto* end = std::copy_n(coords.as<int32_t>(), 4 * coords.rows, result.as<int32_t>());
  for (int64_t row = coords.rows; row < rows; ++row) {
    *end++ = padding_batch;
    end = std::fill_n(end, 3, 0);
  }
  return result;
}

// A map without its tables' contents.
KernelMap shaped_map(const Context& ctx, const Geometry& geometry, int64_t n_in, int64_t n_out) {
  KernelMap map;
  map.geometry = geometry;
  map.n_in = n_in;
  map.n_out = n_out;
  map.neighbours = make_matrix(ctx, map.taps(), n_out, Dtype::i32);
  // A CUDA device counts more than pairs.
  map.pairs_per_tap = make_matrix(ctx, 1, map.taps() + (on_device(ctx) ? 3 : 0), Dtype::i64);
  map.pairs_per_tap.cols = map.pairs_per_tap.stride = map.taps();
  return map;
}

void validate_answer(const Context& ctx, const int64_t* answer) {
  check(answer == nullptr || on_device(ctx),
        "an answer is of a CUDA map, but the context is on the CPU");
}

KernelMap submanifold_map(const Context& ctx,
                          const VoxelIndex* index,
                          const MatrixRef& coords,
                          const Geometry& geometry,
                          int64_t* answer) {
  geometry.validate();
  check(geometry.stride == Int3{1, 1, 1}, "the geometry of a submanifold map is ", geometry.text(),
        ", expected stride 1");
  validate_coords(ctx, coords, std::nullopt, std::nullopt);
  validate_answer(ctx, answer);
  check(index == nullptr || index->rows() == coords.rows, "the voxel index has ",
        index == nullptr ? 0 : index->rows(), " rows, the coordinates have ", coords.rows);
  KernelMap map = shaped_map(ctx, geometry, coords.rows, coords.rows);
  map.symmetric = geometry.mirrors();
  const VoxelIndex::State* const state = index == nullptr ? nullptr : &index->state();
  run(ctx, cuda::fill_submanifold_map, cpu::fill_submanifold_map, state, coords, &map, answer);
  return map;
}

}  // namespace

void validate_coords(const Context& ctx,
                     const MatrixRef& coords,
                     const std::optional<Int3>& spatial_shape,
                     std::optional<int64_t> batch_size) {
  validate_enumerator(ctx.device.kind, DeviceKind::cuda, "the context's kind of device");
  check(coords.device == ctx.device, "coordinates and context are on different devices");
  check(coords.dtype == Dtype::i32, "coordinates are ", name(coords.dtype), ", expected i32");
  check(coords.cols == 4, "coordinates have ", coords.cols, " columns, expected 4: batch, x, y, z");
  check(coords.rows >= 0 && coords.rows <= most_rows, "coordinates have ", coords.rows,
        " rows, expected 0 to ", most_rows);
  check(coords.rows <= 1 || coords.stride == 4, "rows of coordinates are ", coords.stride,
        " elements apart, expected 4: contiguous");
  check(coords.rows == 0 || coords.data != nullptr, "coordinates have ", coords.rows,
        " rows but no data");
  if (!spatial_shape && !batch_size) return;
  if (spatial_shape) validate_shape(*spatial_shape);
  check(!batch_size || *batch_size >= 0, "batch_size is ", batch_size.value_or(0),
        ", expected 0 or more");
  // Negative numbers are large unsigned ones.
  constexpr int64_t any = int64_t{1} << 32;
  const auto limit = [](int64_t extent) { return std::clamp<int64_t>(extent, 0, any / 2); };
  std::array<int64_t, 4> limits = {any, any, any, any};
  if (batch_size) limits[0] = limit(*batch_size);
  for (int axis = 0; spatial_shape && axis < 3; ++axis) {
    limits[axis + 1] = limit((*spatial_shape)[axis]);
  }
  const int64_t row = run(ctx, cuda::first_row_outside, cpu::first_row_outside, coords, limits);
  if (row == coords.rows) return;
  std::array<int32_t, 4> c{};
  if (on_device(ctx)) {
    cuda::read_back(ctx, coords.row<int32_t>(row), c.data(), sizeof(c));
  } else {
    std::copy_n(coords.row<int32_t>(row), 4, c.begin());
  }
  const std::string expected_batch = !batch_size       ? std::string("any batch")
                                     : *batch_size > 0 ? join("batch 0 to ", *batch_size - 1)
                                                       : std::string("no batch");
  const std::string expected_shape = spatial_shape
                                         ? join("spatial shape (", (*spatial_shape)[0], ", ",
                                                (*spatial_shape)[1], ", ", (*spatial_shape)[2], ")")
                                         : std::string("any x, y, z");
  check(false, "row ", row, " of the coordinates is (batch ", c[0], ", x ", c[1], ", y ", c[2],
        ", z ", c[3], "), expected ", expected_batch, " and ", expected_shape);
}

VoxelIndex::VoxelIndex(const Context& ctx, const MatrixRef& coords) {
  validate_coords(ctx, coords, std::nullopt, std::nullopt);
  state_ = run(ctx, cuda::make_index, cpu::make_index, coords);
}
VoxelIndex::~VoxelIndex() = default;
VoxelIndex::VoxelIndex(VoxelIndex&&) noexcept = default;
VoxelIndex& VoxelIndex::operator=(VoxelIndex&&) noexcept = default;

int64_t VoxelIndex::rows() const { return state_->rows; }
int64_t VoxelIndex::unique_voxels() const { return state_->unique_voxels(); }
int32_t VoxelIndex::find(int32_t batch, int32_t x, int32_t y, int32_t z) const {
  return state_->find(batch, x, y, z);
}

UniqueCoords unique(const Context& ctx, const MatrixRef& coords) {
  const VoxelIndex index(ctx, coords);
  const Matrix first = run(ctx, cuda::first_rows, cpu::first_rows, index.state(), coords);
  const Matrix numbers = make_matrix(ctx, coords.rows, 1, Dtype::i32);
  for_items(ctx, coords.rows, DistinctMarks(coords, first, numbers));
  run(ctx, cuda::exclusive_sums, cpu::exclusive_sums, numbers.as<uint32_t>(), coords.rows);
  const int64_t distinct = index.unique_voxels();
  UniqueCoords result;
  result.coords = make_matrix(ctx, distinct, 4, Dtype::i32);
  result.first_row = make_matrix(ctx, distinct, 1, Dtype::i32);
  result.inverse = make_matrix(ctx, coords.rows, 1, Dtype::i32);
  for_items(ctx, coords.rows, DistinctRows(coords, first, numbers, result));
  return result;
}

Matrix output_coords(const Context& ctx,
                     const MatrixRef& coords,
                     const Geometry& geometry,
                     const OutputOptions& options) {
  geometry.validate();
  validate_coords(ctx, coords, std::nullopt, std::nullopt);
  validate_enumerator(options.rule, OutputRule::floor, "the output rule");
  if (options.spatial_shape) validate_shape(*options.spatial_shape);
  if (options.max_voxels) {
    check(*options.max_voxels >= 1 && *options.max_voxels <= most_rows, "max_voxels is ",
          *options.max_voxels, ", expected 1 to ", most_rows);
  }
  const Matrix voxels =
      run(ctx, cuda::output_coords, cpu::output_coords, coords, geometry, options);
  const bool is_padded = on_device(ctx) || !options.max_voxels;
  return is_padded ? voxels : padded(ctx, voxels, *options.max_voxels);
}

KernelMap build_submanifold_map(const Context& ctx,
                                const MatrixRef& coords,
                                const Geometry& geometry,
                                int64_t* answer) {
  return submanifold_map(ctx, nullptr, coords, geometry, answer);
}

KernelMap build_submanifold_map(const Context& ctx,
                                const VoxelIndex& index,
                                const MatrixRef& coords,
                                const Geometry& geometry,
                                int64_t* answer) {
  return submanifold_map(ctx, &index, coords, geometry, answer);
}

KernelMap build_kernel_map(const Context& ctx,
                           const MatrixRef& in_coords,
                           const MatrixRef& out_coords,
                           const Geometry& geometry,
                           int64_t* answer) {
  geometry.validate();
  validate_coords(ctx, in_coords, std::nullopt, std::nullopt);
  validate_coords(ctx, out_coords, std::nullopt, std::nullopt);
  validate_answer(ctx, answer);
  KernelMap map = shaped_map(ctx, geometry, in_coords.rows, out_coords.rows);
  run(ctx, cuda::fill_kernel_map, cpu::fill_kernel_map, in_coords, out_coords, &map, answer);
  return map;
}

KernelMap transpose(const Context& ctx, const KernelMap& map) {
  check(map.neighbours.device == ctx.device, "map and context are on different devices");
  KernelMap result = shaped_map(ctx, map.geometry, map.n_out, map.n_in);
  result.symmetric = map.symmetric;
  result.is_transposed = !map.is_transposed;
  result.in_first = map.out_first;
  result.out_first = map.in_first;
  result.in_repeats = map.out_repeats;
  result.out_repeats = map.in_repeats;
  run(ctx, cuda::fill_transposed, cpu::fill_transposed, map, &result);
  return result;
}

int64_t KernelMap::pairs(const Context& ctx) const {
  check(pairs_per_tap.device == ctx.device, "map and context are on different devices");
  check(pairs_per_tap.cols == taps(), "the map counts pairs of ", pairs_per_tap.cols,
        " taps, expected ", taps());
  std::vector<int64_t> counts(static_cast<size_t>(taps()));
  if (on_device(ctx)) {
    cuda::read_back(ctx, pairs_per_tap.data, counts.data(), sizeof(int64_t) * counts.size());
    cuda::check_built(*this, counts[0]);
  } else {
    std::copy_n(pairs_per_tap.as<int64_t>(), counts.size(), counts.begin());
  }
  return std::accumulate(counts.begin(), counts.end(), int64_t{0});
}

void settle(const Context& ctx, KernelMap* map) {
  if (!on_device(ctx)) return;
  const auto number_in = [&](const MatrixRef& matrix) {
    int64_t number = 0;
    cuda::read_back(ctx, matrix.data, &number, sizeof(number));
    return number;
  };
  cuda::check_built(*map, number_in(map->pairs_per_tap));
  if (number_in(map->in_repeats) == 0) map->in_first = {};
  if (number_in(map->out_repeats) == 0) map->out_first = {};
}

}  // namespace voxgemm
