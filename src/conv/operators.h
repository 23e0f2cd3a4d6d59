// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "voxgemm/depthwise.h"
#include "voxgemm/hash_table.h"
#include "voxgemm/pooling.h"
#include "voxgemm/sampling.h"
#include "voxgemm/serialize.h"

// The public functions beside convolution, once per backend and without their argument checks; what
// they take and do is written where they are public. Integer results are the same bits on both.
// Nothing here waits for a CUDA device unless it says so.
namespace voxgemm {

// What pool_grad() takes back, with dy's repeated rows merged; rows of dx that repeat a voxel are
// left to the caller.
struct PoolBack {
  MatrixRef dy;
  std::optional<MatrixRef> winners;
  MatrixRef counts;             // i32 [rows of dy, 1] of a mean: rows that each is of; else empty
  const KernelMap* transposed;  // the map itself where that is symmetric
};

namespace cpu {

// Fills in a permutation and its inverse.
void sort_codes(const Context& ctx, const MatrixRef& codes, const SortedCodes& sorted);
decltype(voxgemm::hash_insert) hash_insert;
// Fills in a map that has its shape.
void fill_sample_map(const Context& ctx,
                     const VoxelIndex::State& index,
                     const PointsRef& points,
                     const SampleOptions& options,
                     const SampleMap& map);
decltype(voxgemm::weighted_sum) weighted_sum;
decltype(voxgemm::weighted_sum_grad_input) weighted_sum_grad_input;
decltype(voxgemm::weighted_sum_grad_weights) weighted_sum_grad_weights;
decltype(voxgemm::pool) pool;
void pool_grad(const Context& ctx, const PoolBack& grad, const MatrixRef& dx);
decltype(voxgemm::segment_reduce) segment_reduce;
decltype(voxgemm::depthwise_forward) depthwise_forward;
// `transposed` is given (the map itself where it is symmetric), dy has its repeated rows merged,
// and dx of repeated rows is left to the caller.
decltype(voxgemm::depthwise_grad_input) depthwise_grad_input;
decltype(voxgemm::depthwise_grad_weight) depthwise_grad_weight;

}  // namespace cpu
namespace cuda {

decltype(cpu::sort_codes) sort_codes;
decltype(cpu::hash_insert) hash_insert;
decltype(cpu::fill_sample_map) fill_sample_map;
decltype(cpu::weighted_sum) weighted_sum;
decltype(cpu::weighted_sum_grad_input) weighted_sum_grad_input;
decltype(cpu::weighted_sum_grad_weights) weighted_sum_grad_weights;
decltype(cpu::pool) pool;
decltype(cpu::pool_grad) pool_grad;
decltype(cpu::segment_reduce) segment_reduce;
decltype(cpu::depthwise_forward) depthwise_forward;
decltype(cpu::depthwise_grad_input) depthwise_grad_input;
decltype(cpu::depthwise_grad_weight) depthwise_grad_weight;

}  // namespace cuda
}  // namespace voxgemm
