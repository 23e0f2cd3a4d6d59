// SPDX-License-Identifier: Apache-2.0
//
// What the formulas of the cost models say of problems on any device, for bench/choice.py: lines of
//   cpu|cuda ARCHITECTURE THREADS ROWS_IN ROWS_OUT PAIRS PROBLEM
// (pairs -1: not known to the host) become lines of JSON: the sizes that corrections are made of,
// and by kernel the formula's seconds and those that the library predicts, with what corrects them.
#include <iomanip>
#include <iostream>
#include <sstream>
#include <string>

#include "conv/known.h"
#include "voxgemm/error.h"

int main() {
  using namespace voxgemm;
  std::cout << std::setprecision(9);
  for (std::string line; std::getline(std::cin, line);) {
    std::istringstream words(line);
    std::string kind;
    int architecture = 0;
    int threads = 1;
    int64_t n_in = 0;
    int64_t n_out = 0;
    int64_t pairs = -1;
    words >> kind >> architecture >> threads >> n_in >> n_out >> pairs >> std::ws;
    std::string text;
    std::getline(words, text);
    Problem problem = Problem::parse(text);
    problem.n_in = n_in;
    problem.n_out = n_out;
    problem.pairs = pairs;
    problem.threads = threads;
    problem.architecture = architecture;
    if (kind == "cuda") problem.device.kind = DeviceKind::cuda;
    problem.pairs = static_cast<int64_t>(likely_pairs(problem));
    std::cout << R"({"sizes":[)";
    const Correction sizes = sizes_for_correction(problem);
    for (size_t term = 0; term < sizes.size(); ++term) {
      std::cout << (term == 0 ? "" : ",") << sizes[term];
    }
    const Known known(problem, false);
    std::ostringstream corrected;
    corrected << std::setprecision(9);
    std::cout << R"(],"kernels":{)";
    const char* comma = "";
    for (const Kernel& kernel : registry(problem.device.kind)) {
      const std::string reason = kernel.why_not(kernel, problem);
      // One that this machine lacks may have been timed on another.
      if (kernel.reference || (!reason.empty() && reason != kernel.unavailable)) continue;
      const std::string key = join(comma, json_string(kernel.name), ":");
      std::cout << key << kernel.cost(kernel, problem);
      corrected << key << known.predicted(kernel);
      comma = ",";
    }
    std::cout << R"(},"corrected":{)" << corrected.str() << "}}\n";
  }
}
