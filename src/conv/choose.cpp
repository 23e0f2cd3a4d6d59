// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cstdio>
#include <iomanip>
#include <sstream>

#include "conv/kernel.h"
#include "conv/known.h"
#include "conv/ranking.h"
#include "conv/validate.h"
#include "voxgemm/choose.h"
#include "voxgemm/error.h"

namespace voxgemm {
namespace {

// Whether the filter admits a kernel. The reference implements no algorithm in particular, so every
// filter of algorithms admits it; it is the last choice.
bool inside(const Kernel& kernel, const Filter& filter) {
  if (!filter.kernel.empty()) return kernel.name == filter.kernel;
  if (kernel.reference || filter.algorithms.empty()) return true;
  return std::any_of(filter.algorithms.begin(), filter.algorithms.end(), [&](Algorithm wanted) {
    return wanted == kernel.algorithm ||
           std::find(kernel.also.begin(), kernel.also.end(), wanted) != kernel.also.end();
  });
}

std::string reason_against(const Kernel& kernel, const Problem& problem, const Filter& filter) {
  if (inside(kernel, filter)) return why_not(kernel, problem);
  if (!filter.kernel.empty()) return join("the filter asks for ", filter.kernel);
  return join("the filter leaves out ", name(kernel.algorithm));
}

struct Picked {
  const Kernel* kernel = nullptr;  // null: none can run
  Chooser by = Chooser::model;
};

// Runs in every call of an operator, so it makes no list and no words.
Picked pick(const Problem& problem, const Filter& filter, const Known& known) {
  if (!filter.kernel.empty()) {
    // A name leaves nothing to compare.
    const Kernel* named = find_kernel(problem.device.kind, filter.kernel);
    const bool runs = named != nullptr && can_run(*named, problem);
    return {runs ? named : nullptr, Chooser::filter};
  }
  Ranking<const Kernel*> ranking;
  const auto competes = [&](const Kernel& kernel) {
    return can_run(kernel, problem) && inside(kernel, filter);
  };
  for (const Kernel& kernel : registry(problem.device.kind)) {
    if (!competes(kernel)) continue;
    ranking.offer(&kernel, known.predicted(kernel), kernel.reference);
  }
  if (ranking.empty()) return {};
  if (known.times()) {
    for (const Store::Known& time : *known.times()) {
      const Kernel* kernel = find_kernel(problem.device.kind, time.kernel);
      if (kernel == nullptr || kernel->revision != time.revision || !competes(*kernel)) continue;
      ranking.measured(kernel, time.seconds);
    }
  }
  return {ranking.best(), ranking.by()};
}

Known known_of(const Problem& problem, const Filter& filter) {
  return {problem, filter.measured && filter.kernel.empty()};
}

std::string device_text(const Problem& problem) {
  if (problem.device.kind == DeviceKind::cpu) return join(problem.threads, " threads");
  return join("cuda:", problem.device.index, " of compute capability ", problem.architecture / 10,
              ".", problem.architecture % 10);
}

std::string ms(double seconds) {
  char text[32];
  std::snprintf(text, sizeof text, "%.4f", seconds * 1e3);
  return text;
}

}  // namespace

std::string_view name(Chooser chooser) {
  switch (chooser) {
    case Chooser::filter:
      return "filter";
    case Chooser::store:
      return "store";
    case Chooser::model:
      return "model";
  }
  return "?";
}

std::vector<Candidate> candidates(const Problem& problem, const Filter& filter) {
  validate_problem(problem);
  validate_algorithms(filter);
  const Known known(problem, filter.measured);
  const Picked picked = pick(problem, filter, known);
  std::vector<Candidate> list;
  for (const Kernel& kernel : registry(problem.device.kind)) {
    Candidate& candidate = list.emplace_back();
    candidate.kernel = kernel.name;
    candidate.reason = reason_against(kernel, problem, filter);
    if (candidate.reason.empty()) {
      candidate.seconds = known.predicted(kernel);
      candidate.measured = known.seconds(kernel);
    }
    candidate.picked = &kernel == picked.kernel;
    if (candidate.picked) candidate.by = picked.by;
  }
  return list;
}

std::string explain(const Problem& problem, const Filter& filter) {
  std::ostringstream text;
  text << problem.text() << " (" << problem.n_in << " -> " << problem.n_out << " rows, ";
  if (problem.pairs >= 0) text << problem.pairs << " pairs, ";
  text << device_text(problem) << ")\n";
  const std::vector<Candidate> all = candidates(problem, filter);
  size_t width = 0;
  for (const Candidate& candidate : all) width = std::max(width, candidate.kernel.size() + 2);
  for (const Candidate& candidate : all) {
    text << (candidate.picked ? " > " : "   ") << std::left << std::setw(static_cast<int>(width))
         << candidate.kernel;
    if (candidate.reason.empty()) {
      text << std::right << std::setw(10) << ms(candidate.seconds) << " ms predicted";
      if (candidate.measured > 0) text << ", " << ms(candidate.measured) << " ms measured";
      if (candidate.picked) text << ", picked by the " << name(candidate.by);
    } else {
      text << "no: " << candidate.reason;
    }
    text << "\n";
  }
  return text.str();
}

std::string explain_json(const Problem& problem, const Filter& filter) {
  const std::string pairs = problem.pairs >= 0 ? join(problem.pairs) : "null";
  std::string list;
  std::string picked = R"("picked":null,"picked_by":null)";
  for (const Candidate& candidate : candidates(problem, filter)) {
    const bool runs = candidate.reason.empty();
    list += join(list.empty() ? "" : ",", R"({"kernel":)", json_string(candidate.kernel),
                 R"(,"predicted_ms":)", runs ? ms(candidate.seconds) : "null", R"(,"measured_ms":)",
                 candidate.measured > 0 ? ms(candidate.measured) : "null", R"(,"reason":)",
                 runs ? "null" : json_string(candidate.reason), "}");
    if (!candidate.picked) continue;
    picked = join(R"("picked":)", json_string(candidate.kernel), R"(,"picked_by":")",
                  name(candidate.by), "\"");
  }
  return join(R"({"problem":)", json_string(problem.text()), R"(,"rows_in":)", problem.n_in,
              R"(,"rows_out":)", problem.n_out, R"(,"pairs":)", pairs, R"(,"device":)",
              json_string(device_text(problem)), ",", picked, R"(,"candidates":[)", list, "]}");
}

const Kernel& choose(const Problem& problem, const Filter& filter) {
  validate_problem(problem);
  validate_algorithms(filter);
  const Picked picked = pick(problem, filter, known_of(problem, filter));
  if (picked.kernel != nullptr) return *picked.kernel;
  fail(ErrorCode::unsupported, true,
       join("no kernel can run this problem inside the filter:\n", explain(problem, filter)));
}

Choice choice(const Problem& problem, const Filter& filter) {
  const Kernel& picked = choose(problem, filter);
  return {picked.name, picked.schedule(picked, problem)};
}

}  // namespace voxgemm
