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
  // clang-format on
}
