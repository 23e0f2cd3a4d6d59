// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <string>
#include <string_view>
#include <vector>

#include "voxgemm/problem.h"
#include "voxgemm/schedule.h"

namespace voxgemm {

// The search space of a choice. Empty means everything.
struct VOXGEMM_EXPORT Filter {
  std::vector<Algorithm> algorithms = {};
  std::string kernel = {};  // one kernel by its name
  // Whether times that were measured (tune.h) count. Without them a choice is a function of the
  // problem and the device's model alone.
  bool measured = true;

  // "auto" (everything), an algorithm's name, several in any order joined by commas, with or
  // without square brackets around them, or a kernel's full name. Case and blanks around names do
  // not matter. Throws with the legal names.
  static Filter parse(std::string_view text);
};
using Filters = std::array<Filter, 3>;  // by Pass

// One filter for every pass, or by pass, joined by semicolons: "forward=implicit_gemm;
// backward=auto". backward is grad_input and grad_weight; a pass that is not named has everything.
VOXGEMM_EXPORT Filters parse_filters(std::string_view text);
// Those of the variable VOXGEMM_ALGORITHM, as parse_filters() reads it, algorithms only; without it
// everything. Read once. Throws with the variable's name and value.
VOXGEMM_EXPORT const Filters& environment_filters();

// Whether plans measure what they choose among when they first do: VOXGEMM_TUNE is off (the
// default) or first_use. Throws if it is anything else.
VOXGEMM_EXPORT bool tunes_at_first_use();
// Every kernel of this build for a kind of device.
VOXGEMM_EXPORT std::vector<std::string> kernel_names(DeviceKind kind);

// Who made a choice: the filter, which left one kernel; measured times; the cost model.
enum class Chooser { filter, store, model };
VOXGEMM_EXPORT std::string_view name(Chooser chooser);

// Every kernel of the registry for this problem: its predicted seconds or the reason why it cannot
// run, and which one is picked. Of what has been measured the fastest is picked, if the model's
// favourite among what the filter admits is part of it; else that favourite. So times that were
// measured inside another filter neither bind a choice nor are lost to it.
struct Candidate {
  std::string kernel;
  std::string reason;   // empty: it can run
  double seconds = 0;   // predicted, if it can run
  double measured = 0;  // seconds; 0: not measured
  bool picked = false;
  Chooser by = Chooser::model;  // who picked it
};
// The pick alone, and how it wants its map cut. Throws Error(unsupported) with the table of
// explain() if none can run.
struct Choice {
  std::string kernel;
  ScheduleOptions schedule;
};
VOXGEMM_EXPORT Choice choice(const Problem& problem, const Filter& filter);
VOXGEMM_EXPORT std::vector<Candidate> candidates(const Problem& problem, const Filter& filter);
VOXGEMM_EXPORT std::string explain(const Problem& problem, const Filter& filter = {});
// The same as one JSON object: problem, rows_in, rows_out, pairs (null: not known), device,
// candidates as a list of kernel, predicted_ms, measured_ms (null: not known), reason (null: it can
// run), and picked and picked_by (null: none).
VOXGEMM_EXPORT std::string explain_json(const Problem& problem, const Filter& filter = {});

}  // namespace voxgemm
