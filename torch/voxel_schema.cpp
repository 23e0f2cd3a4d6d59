// SPDX-License-Identifier: Apache-2.0
#include "abi.h"

// The operators beside convolution; what schema.cpp says holds here too. Columns (codes, keys,
// values, row numbers) are int32 or int64 [n].
STABLE_TORCH_LIBRARY_FRAGMENT(voxgemm, m) {
  // clang-format off
  // curve: number of enum Curve, bits, three axes, three of the origin. wide: int64 codes.
  m.def("_curve_encode(Tensor coords, int[] curve, bool wide) -> Tensor");
  m.def("_curve_decode(Tensor codes, int[] curve) -> Tensor");
  m.def("_sort_codes(Tensor codes) -> (Tensor permutation, Tensor inverse)");

  // int64 [2]: distinct keys, the first row whose key is all ones or -1.
  m.def("_hash_insert(Tensor(a!) table_keys, Tensor(b!) table_values, Tensor keys, Tensor? values, bool skip_empty) -> Tensor");
  // Throws what went wrong, else gives int64 [1] of 0.
  m.def("_check_hash_insert(Tensor table_keys, Tensor table_values, Tensor status) -> Tensor");
  m.def("_hash_lookup(Tensor table_keys, Tensor table_values, Tensor keys) -> Tensor");
  m.def("_voxel_keys(Tensor coords, SymInt[] shape, bool wide) -> Tensor");

  // points: float32 or float64 [m, 3]; options: mode, rounding, and a spatial shape's three numbers or none.
  m.def("_sample_map(Tensor coords, Tensor points, Tensor? batch, SymInt points_per_batch, SymInt[] options) -> "
        "(Tensor rows, Tensor weights)");
  m.def("_sample_map_grad(Tensor points, Tensor rows, Tensor dweights) -> Tensor");
  // rows int32 [m, k] and weights [m, k], float32, or float64 where the features are.
  m.def("_weighted_sum(Tensor x, Tensor rows, Tensor weights) -> Tensor");
  m.def("_weighted_sum_grad_input(Tensor dy, Tensor rows, Tensor weights, SymInt n) -> Tensor");
  m.def("_weighted_sum_grad_weights(Tensor x, Tensor dy, Tensor rows) -> Tensor");

  // map, transposed and layer as in schema.cpp; reduction: number of enum Reduction. Winners int32, empty for sums and means.
  // dy: one tensor, and behind it the winners of max and min.
  m.def("_pool(Tensor x, Tensor[] map, SymInt[] layer, int reduction) -> (Tensor y, Tensor winners)");
  m.def("_pool_grad(Tensor[] dy, Tensor[] map, Tensor[] transposed, SymInt[] layer, int reduction) -> Tensor");
  m.def("_segment_reduce(Tensor x, Tensor segments, SymInt count, int reduction) -> (Tensor y, Tensor winners)");
  // weight [taps, c]
  m.def("_depthwise(Tensor x, Tensor weight, Tensor? bias, Tensor[] map, SymInt[] layer) -> Tensor");
  m.def("_depthwise_grad_input(Tensor dy, Tensor weight, Tensor[] map, Tensor[] transposed, SymInt[] layer) -> Tensor");
  m.def("_depthwise_grad_weight(Tensor x, Tensor dy, Tensor[] map, SymInt[] layer) -> Tensor");
  // clang-format on
}
