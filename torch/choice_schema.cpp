// SPDX-License-Identifier: Apache-2.0
#include "abi.h"

// The operators of choosing a kernel and of measured times (voxgemm/tune.h); see schema.cpp. A
// problem is the numbers pass, dtype, c_in, c_out. `on` says where.
STABLE_TORCH_LIBRARY_FRAGMENT(voxgemm, m) {
  // clang-format off
  // Of each problem the layer's numbers with the schedule and the kernel that were chosen. Here a problem's numbers
  // stand behind how many they are, and before those of its filter; the layer has none. Where it builds, the parts of
  // the map's schedules stand behind, those of each once, as they are first wanted; masks: see _schedule.
  m.def("_choice(Tensor[] map, int[] layer, int[] problems, Tensor? masks=None, bool builds=False) -> Tensor[]");
  m.def("_explain(Tensor[] map, int[] layer, int[] problem, bool as_json) -> Tensor");
  // how: budget in microseconds, exhaustive, again. Text: see choice_ops.cpp.
  m.def("_tune(Tensor[] map, Tensor[] transposed, int[] layer, int[] problem, int[] how) -> Tensor");
  m.def("_is_tuned(Tensor[] map, int[] layer, int[] problem) -> Tensor");
  m.def("_calibrate(Tensor on, int budget) -> Tensor");
  m.def("_learn(Tensor on, int[] records) -> Tensor");

  m.def("_environment_filter(int of_pass) -> Tensor");
  m.def("_tunes_at_first_use() -> Tensor");
  m.def("_times_folder() -> Tensor");
  m.def("_times_files() -> Tensor");
  m.def("_export_times(Tensor device) -> Tensor");
  m.def("_import_times(Tensor text) -> Tensor");
  m.def("_clear_times() -> Tensor");
  // clang-format on
}
