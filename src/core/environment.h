// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>
#include <vector>

namespace voxgemm {

// What the process's environment says, as it was when first asked.
struct Environment {
  // VOXGEMM_ALGORITHM: see parse_filters(). Empty: everything.
  std::string algorithm;
  // VOXGEMM_CACHE_DIR: the folder of measured times, and after colons files or folders of more
  // that are only read. Without it voxgemm in XDG_CACHE_HOME or ~/.cache; empty if there is no home
  // either.
  std::string cache_folder;
  std::vector<std::string> priors;
  // VOXGEMM_TUNE: off or first_use, as given.
  std::string tune;
};
const Environment& environment();

}  // namespace voxgemm
