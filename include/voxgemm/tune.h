// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "voxgemm/plan.h"

namespace voxgemm {

// Measured times. Without them the cost models choose, and nothing is ever timed; what is measured
// is kept by device model in a file of the cache folder, every candidate's time, and counts from
// then on in this process, and in others from their start (see Candidate for how).
//
// The folder is VOXGEMM_CACHE_DIR, else voxgemm in XDG_CACHE_HOME or ~/.cache. Behind it, after
// colons, may stand files or folders that are only read, e.g. one that a product ships. Nothing
// fails because of these files: what cannot be read or is no record is passed over.

struct TuneOptions {
  double budget_seconds = 1;  // of timing; the model's favourite is timed even if it takes longer
  bool exhaustive = false;    // everything inside the filter, not only what the model may misjudge
  bool again = false;         // also what has been measured before
  bool judged = true;         // results are compared with the reference's before anything is timed
};
struct Tuning {
  int measured = 0;     // candidates
  double seconds = 0;   // spent on timing
  std::string records;  // lines for learn_times() of other processes
  // Kernels whose results differed from the reference's; their time is set to 1e9 s. Not judged is
  // what the reference kernel would compute for long.
  std::vector<std::string> wrong;
  std::string not_written;  // why other processes will not know; empty: they will
};
// Times the candidates of a pass of a plan on operands of random numbers, in interleaved rounds, by
// what a plan runs: the median of each is kept. Waits for a CUDA device; throws during a capture.
// Schedules are built for it and not timed. With a filter that names a kernel, nothing.
VOXGEMM_EXPORT Tuning tune(const Context& ctx,
                           const KernelMap& map,
                           const PlanOptions& options,
                           Pass pass,
                           const TuneOptions& how = {});

// Whether tune() without further options would find anything to measure.
VOXGEMM_EXPORT bool is_tuned(const Problem& problem, const Filter& filter);

// Measured over predicted times of every kernel of a device, on small made-up problems, for about
// this long: its records correct the cost models of kernels that were fitted on another device.
VOXGEMM_EXPORT Tuning calibrate(const Context& ctx, double budget_seconds = 20);

// Takes over records of another process, in this process only. Throws if a line is no record.
VOXGEMM_EXPORT void learn_times(const Device& device, std::string_view records);

// The files of a folder (empty: the cache folder); no file is a problem.
struct TimesFile {
  std::string path;
  std::string device;   // empty: of several or none
  int64_t records = 0;  // the last of each problem and kernel
  int64_t problems = 0;
  int64_t superseded = 0;  // records that a later one replaces
  int64_t foreign = 0;     // lines that are none
};
VOXGEMM_EXPORT std::string times_folder();
VOXGEMM_EXPORT std::vector<TimesFile> times_files(const std::string& folder = {});
// The records that count, of all devices or one, as lines in a fixed order.
VOXGEMM_EXPORT std::string export_times(const std::string& device = {},
                                        const std::string& folder = {});
// Appends the records of a text to the folder's files. Returns their number. Throws where it cannot
// write, or if a line is no record.
VOXGEMM_EXPORT int64_t import_times(std::string_view text, const std::string& folder = {});
// Removes the files. This process keeps what it has read. Returns their number.
VOXGEMM_EXPORT int64_t clear_times(const std::string& folder = {});

}  // namespace voxgemm
