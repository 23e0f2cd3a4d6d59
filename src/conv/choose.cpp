// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <iomanip>
#include <sstream>

#include "conv/kernel.h"
#include "voxgemm/error.h"

namespace voxgemm {
namespace {

// Whether the filter admits a kernel. The reference implements no algorithm in particular, so every
// filter of algorithms admits it; it is the last choice.
bool inside(const Kernel& kernel, const Filter& filter) {
  if (!filter.kernel.empty()) return kernel.name == filter.kernel;
  if (kernel.reference || filter.algorithms.empty()) return true;
  const auto& wanted = filter.algorithms;
  return std::find(wanted.begin(), wanted.end(), kernel.algorithm) != wanted.end();
}

std::string reason_against(const Kernel& kernel, const Problem& problem, const Filter& filter) {
  if (inside(kernel, filter)) return kernel.why_not(kernel, problem);
  if (!filter.kernel.empty()) return join("the filter asks for ", filter.kernel);
  return join("the filter leaves out ", name(kernel.algorithm));
}

// The cheapest kernel that can run; the reference only where nothing else can. Null if none can.
// Runs in every call of an operator, so it makes no list and no words.
const Kernel* pick(const Problem& problem, const Filter& filter) {
  const Kernel* best = nullptr;
  double best_seconds = 0;
  for (const Kernel& kernel : registry(problem.device.kind)) {
    if (!inside(kernel, filter) || !kernel.why_not(kernel, problem).empty()) continue;
    // A name leaves nothing to compare.
    if (!filter.kernel.empty()) return &kernel;
    const double seconds = kernel.cost(kernel, problem);
    const bool better = best == nullptr || (best->reference && !kernel.reference) ||
                        (best->reference == kernel.reference && seconds < best_seconds);
    if (!better) continue;
    best = &kernel;
    best_seconds = seconds;
  }
  return best;
}

}  // namespace

std::vector<Candidate> candidates(const Problem& problem, const Filter& filter) {
  const Kernel* picked = pick(problem, filter);
  std::vector<Candidate> list;
  for (const Kernel& kernel : registry(problem.device.kind)) {
    Candidate& candidate = list.emplace_back();
    candidate.kernel = kernel.name;
    candidate.reason = reason_against(kernel, problem, filter);
    if (candidate.reason.empty()) candidate.seconds = kernel.cost(kernel, problem);
    candidate.picked = &kernel == picked;
  }
  return list;
}

std::string explain(const Problem& problem, const Filter& filter) {
  std::ostringstream text;
  text << problem.text() << " (" << problem.n_in << " -> " << problem.n_out << " rows, ";
  if (problem.pairs >= 0) text << problem.pairs << " pairs, ";
  if (problem.device.kind == DeviceKind::cuda) {
    text << "cuda:" << problem.device.index << " of compute capability "
         << problem.architecture / 10 << "." << problem.architecture % 10 << ")\n";
  } else {
    text << problem.threads << " threads)\n";
  }
  const std::vector<Candidate> all = candidates(problem, filter);
  size_t width = 0;
  for (const Candidate& candidate : all) width = std::max(width, candidate.kernel.size() + 2);
  for (const Candidate& candidate : all) {
    text << (candidate.picked ? " > " : "   ") << std::left << std::setw(static_cast<int>(width))
         << candidate.kernel;
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
  if (const Kernel* picked = pick(problem, filter)) return *picked;
  fail(ErrorCode::unsupported, true,
       join("no kernel can run this problem inside the filter:\n", explain(problem, filter)));
}

Choice choice(const Problem& problem, const Filter& filter) {
  const Kernel& picked = choose(problem, filter);
  return {picked.name, picked.schedule(picked, problem)};
}

}  // namespace voxgemm
