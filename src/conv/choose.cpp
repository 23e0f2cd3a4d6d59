// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <iomanip>
#include <sstream>

#include "conv/kernel.h"
#include "voxgemm/error.h"

namespace voxgemm {
namespace {

// Why the filter leaves a kernel out; empty if it does not. The reference implements no algorithm
// in particular, so every filter admits it; it is the last choice.
std::string outside(const Kernel& kernel, const Filter& filter) {
  if (!filter.kernel.empty()) {
    return kernel.name == filter.kernel ? "" : join("the filter asks for ", filter.kernel);
  }
  if (kernel.reference || filter.algorithms.empty()) return "";
  const auto& wanted = filter.algorithms;
  if (std::find(wanted.begin(), wanted.end(), kernel.algorithm) != wanted.end()) return "";
  return join("the filter leaves out ", name(kernel.algorithm));
}

}  // namespace

std::vector<Candidate> candidates(const Problem& problem, const Filter& filter) {
  std::vector<Candidate> list;
  Candidate* best = nullptr;
  bool best_is_reference = false;
  list.reserve(registry().size());
  for (const Kernel& kernel : registry()) {
    Candidate& candidate = list.emplace_back();
    candidate.kernel = kernel.name;
    candidate.reason = outside(kernel, filter);
    if (candidate.reason.empty()) candidate.reason = kernel.why_not(kernel, problem);
    if (!candidate.reason.empty()) continue;
    candidate.seconds = kernel.cost(kernel, problem);
    const bool better =
        best == nullptr || (best_is_reference && !kernel.reference) ||
        (best_is_reference == kernel.reference && candidate.seconds < best->seconds);
    if (!better) continue;
    best = &candidate;
    best_is_reference = kernel.reference;
  }
  if (best != nullptr) best->picked = true;
  return list;
}

std::string explain(const Problem& problem, const Filter& filter) {
  std::ostringstream text;
  text << problem.text() << " (" << problem.n_in << " -> " << problem.n_out << " rows, "
       << problem.pairs << " pairs, " << problem.threads << " threads)\n";
  for (const Candidate& candidate : candidates(problem, filter)) {
    text << (candidate.picked ? " > " : "   ") << std::left << std::setw(48) << candidate.kernel;
    if (candidate.reason.empty()) {
      text << std::right << std::setw(10) << std::fixed << std::setprecision(3)
           << candidate.seconds * 1e3 << " ms predicted" << (candidate.picked ? ", picked" : "");
    } else {
      text << "no: " << candidate.reason;
    }
    text << "\n";
  }
  return text.str();
}

const Kernel& choose(const Problem& problem, const Filter& filter) {
  const std::vector<Candidate> list = candidates(problem, filter);
  for (size_t i = 0; i < list.size(); ++i) {
    if (list[i].picked) return registry()[i];
  }
  fail(ErrorCode::unsupported, true,
       join("no kernel can run this problem inside the filter:\n", explain(problem, filter)));
}

}  // namespace voxgemm
