// SPDX-License-Identifier: Apache-2.0
#include "core/environment.h"

#include <algorithm>
#include <cstdlib>

namespace voxgemm {
namespace {

std::string variable(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? "" : value;
}

std::string default_folder() {
  const std::string cache = variable("XDG_CACHE_HOME");
  const std::string home = variable("HOME");
  if (!cache.empty()) return cache + "/voxgemm";
  return home.empty() ? "" : home + "/.cache/voxgemm";
}

Environment read_environment() {
  Environment found = {.algorithm = variable("VOXGEMM_ALGORITHM"),
                       .cache_folder = default_folder(),
                       .priors = {},
                       .tune = variable("VOXGEMM_TUNE")};
  const std::string places = variable("VOXGEMM_CACHE_DIR");
  for (size_t at = 0; at < places.size();) {
    const size_t end = std::min(places.find(':', at), places.size());
    const std::string place = places.substr(at, end - at);
    if (at == 0 && !place.empty()) found.cache_folder = place;
    if (at > 0 && !place.empty()) found.priors.push_back(place);
    at = end + 1;
  }
  return found;
}

}  // namespace

const Environment& environment() {
  static const Environment found = read_environment();
  return found;
}

}  // namespace voxgemm
