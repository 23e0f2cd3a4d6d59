// SPDX-License-Identifier: Apache-2.0
#include "abi.h"

// Every operator. They are not public (the leading underscore): they neither record gradients nor
// turn their errors into Python's types; voxgemm.functional does both. `map` is a kernel map's
// neighbours, pairs_per_tap, in_first and out_first; `layer` the numbers that struct Layer in
// convert.h lists. Text is a uint8 tensor.
STABLE_TORCH_LIBRARY(voxgemm, m) {
  // clang-format off
  // Fails or gives int32 [1] of 0, so that a traced graph can have a use for it.
  m.def("_check_coords(Tensor coords, int[]? spatial_shape, int? batch_size) -> Tensor");
  m.def("_unique(Tensor coords) -> (Tensor coords, Tensor first_row, Tensor inverse)");
  m.def("_output_coords(Tensor coords, int[] geometry, int rule, int[]? spatial_shape, int? max_voxels=None) -> Tensor");
  // answer: of kernel_map.h, the address of pinned memory, or 0. Whoever gives it keeps it until all is written. As a
  // tensor that is written it would be no operator that torch can trace.
  // owned: whoever asks has the map forgotten later. Of such a map the schedules are kept that operators build.
  m.def("_submanifold_map(Tensor coords, int[] geometry, int answer=0, bool owned=False) -> "
        "(Tensor neighbours, Tensor pairs_per_tap, Tensor first, Tensor masks)");
  m.def("_kernel_map(Tensor in_coords, Tensor out_coords, int[] geometry, int answer=0, bool owned=False) -> "
        "(Tensor neighbours, Tensor pairs_per_tap, Tensor in_first, Tensor out_first, Tensor masks)");
  m.def("_transpose(Tensor[] map, SymInt[] layer, bool owned=False) -> (Tensor neighbours, Tensor pairs_per_tap)");

  m.def("_pairs(Tensor[] map, SymInt[] layer) -> Tensor");

  // options: order, groups, tile_rows, chunk_rows. None for natural order, else the six tensors of ScheduleParts.
  // masks: that came with the map.
  m.def("_schedule(Tensor[] map, int[] layer, int[] options, Tensor? masks=None) -> Tensor[]");

  // Behind the map's tensors may stand those of its schedule, for the options in the layer's numbers.
  // y = conv + bias + residual, of which ReLU is taken where asked for.
  m.def("_forward(Tensor x, Tensor weight, Tensor? bias, Tensor[] map, SymInt[] layer, Tensor? residual=None, "
        "bool relu=False) -> Tensor");
  // transposed: the transposed map's tensors and schedule, or none: then the schedule is the map's.
  m.def("_grad_input(Tensor dy, Tensor weight, Tensor[] map, Tensor[] transposed, SymInt[] layer) -> Tensor");
  // A gradient that is not wanted is an empty tensor.
  m.def("_grad_weight(Tensor x, Tensor dy, Tensor[] map, SymInt[] layer, bool[] wanted) -> (Tensor dw, Tensor db)");

  // Calls that no graph is made of may give for `map` four host tensors of numbers instead, and empty lists behind it
  // (struct Maps), which saves 4 us a call. These are the views of a map's tensors, or of a schedule's: they hold
  // addresses, so that whoever keeps them keeps the tensors.
  m.def("_views(Tensor[] tensors) -> Tensor");

  // Of an owned map by its table: the tensors of the schedules that are kept, six each; the end.
  m.def("_kept(Tensor neighbours) -> Tensor[]");
  m.def("_forget(Tensor neighbours) -> ()");

  // The numbers are pass, dtype, precision, operation, geometry (12), c_in and c_out.
  m.def("_parse_problem(Tensor text) -> (Tensor numbers, Tensor cloud)");
  m.def("_info() -> Tensor");
  m.def("_cuda_info(bool has_device) -> Tensor");
  // clang-format on
}
