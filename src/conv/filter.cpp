// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cctype>

#include "conv/kernel.h"
#include "core/environment.h"
#include "voxgemm/choose.h"
#include "voxgemm/error.h"

namespace voxgemm {
namespace {

std::string_view trimmed(std::string_view text) {
  const auto first = text.find_first_not_of(" \t\n");
  if (first == std::string_view::npos) return {};
  return text.substr(first, text.find_last_not_of(" \t\n") + 1 - first);
}

std::vector<std::string_view> parts_of(std::string_view text, char between) {
  std::vector<std::string_view> parts;
  for (size_t at = 0; at <= text.size();) {
    const size_t end = std::min(text.find(between, at), text.size());
    parts.push_back(trimmed(text.substr(at, end - at)));
    at = end + 1;
  }
  return parts;
}

std::string lower(std::string_view text) {
  std::string result(text);
  std::transform(result.begin(), result.end(), result.begin(),
                 [](unsigned char c) { return std::tolower(c); });
  return result;
}

std::string legal_names() {
  std::string text = "auto";
  for (int a = 0; a < algorithm_count; ++a) text += join(", ", name(static_cast<Algorithm>(a)));
  return text;
}

// Adds what a single name means; false if it means nothing.
bool add(std::string_view word, Filter* filter, bool* everything) {
  const std::string asked = lower(word);
  if (asked == "auto") return *everything = true;
  for (int a = 0; a < algorithm_count; ++a) {
    const auto algorithm = static_cast<Algorithm>(a);
    if (name(algorithm) != asked) continue;
    if (std::count(filter->algorithms.begin(), filter->algorithms.end(), algorithm) == 0) {
      filter->algorithms.push_back(algorithm);
    }
    return true;
  }
  return false;
}

}  // namespace

Filter Filter::parse(std::string_view text) {
  std::string_view list = trimmed(text);
  for (const DeviceKind kind : {DeviceKind::cpu, DeviceKind::cuda}) {
    if (find_kernel(kind, list) != nullptr) return {.kernel = std::string(list)};
  }
  const bool opened = list.starts_with('[');
  check(opened == list.ends_with(']') && list != "[", "\"", text, "\" has one bracket of two");
  if (opened) list = list.substr(1, list.size() - 2);
  Filter filter;
  bool everything = false;
  for (const std::string_view word : parts_of(list, ',')) {
    check(add(word, &filter, &everything), "\"", word,
          "\" is no algorithm, expected one or several of ", legal_names(),
          ", or a kernel's full name");
  }
  if (everything) filter.algorithms.clear();
  return filter;
}

Filters parse_filters(std::string_view text) {
  if (text.find('=') == std::string_view::npos) {
    const Filter filter = Filter::parse(text);
    return {filter, filter, filter};
  }
  Filters filters;
  std::array<bool, 3> given = {};
  for (const std::string_view part : parts_of(text, ';')) {
    const size_t equals = part.find('=');
    check(equals != std::string_view::npos, "\"", part,
          "\" names no pass, expected PASS=ALGORITHM");
    const std::string_view of = trimmed(part.substr(0, equals));
    bool known = false;
    for (const Pass pass : {Pass::forward, Pass::grad_input, Pass::grad_weight}) {
      if (of != name(pass) && (of != "backward" || pass == Pass::forward)) continue;
      const auto number = static_cast<size_t>(pass);
      check(!given[number], "\"", text, "\" names ", name(pass), " twice");
      filters[number] = Filter::parse(part.substr(equals + 1));
      known = given[number] = true;
    }
    check(known, "\"", of, "\" is no pass, expected forward, backward, grad_input or grad_weight");
  }
  return filters;
}

bool tunes_at_first_use() {
  const std::string& asked = environment().tune;
  check(asked.empty() || asked == "off" || asked == "first_use", "VOXGEMM_TUNE is \"", asked,
        "\", expected off or first_use");
  return asked == "first_use";
}

const Filters& environment_filters() {
  static const Filters filters = [] {
    const std::string& text = environment().algorithm;
    try {
      Filters parsed = text.empty() ? Filters{} : parse_filters(text);
      for (const Filter& filter : parsed) {
        check(filter.kernel.empty(), "a kernel cannot be named here, expected ", legal_names());
      }
      return parsed;
    } catch (const Error& error) {
      throw Error(error.code(), join("VOXGEMM_ALGORITHM is \"", text, "\": ", error.what()),
                  error.where());
    }
  }();
  return filters;
}

}  // namespace voxgemm
