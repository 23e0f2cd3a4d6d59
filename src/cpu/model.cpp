// SPDX-License-Identifier: Apache-2.0
#include <sys/utsname.h>

#include <fstream>
#include <string>

#include "conv/passes.h"

namespace voxgemm::cpu {

std::string model() {
  std::ifstream facts("/proc/cpuinfo");
  std::string implementer;
  for (std::string line; std::getline(facts, line);) {
    const size_t colon = line.find(':');
    if (colon == std::string::npos) continue;
    const size_t first = line.find_first_not_of(" \t", colon + 1);
    std::string value = first == std::string::npos ? "" : line.substr(first);
    if (line.starts_with("model name") && !value.empty()) return value;
    // Of Arm's there are numbers only.
    if (line.starts_with("CPU implementer")) implementer = value;
    if (line.starts_with("CPU part"))
      return implementer.insert(0, "CPU ").append(" ").append(value);
  }
  utsname system = {};
  return uname(&system) == 0 ? std::string("CPU ") + system.machine : "CPU";
}

}  // namespace voxgemm::cpu
