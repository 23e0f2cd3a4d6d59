// SPDX-License-Identifier: Apache-2.0
//
// The operators of choosing a kernel and of measured times.
#include "ops.h"

#include <set>

#include "kept.h"
#include "voxgemm/tune.h"

namespace voxgemm {
namespace {

// What a pass of a layer on a map is planned with. The numbers are pass, dtype, c_in, c_out.
PlanOptions options_of(const Maps& maps, IntSpan numbers) {
  const Layer& layer = maps.layer;
  check(numbers.size() == 4, "a problem has ", numbers.size(), " numbers, expected 4");
  return {.c_in = static_cast<int>(numbers[2]),
          .c_out = static_cast<int>(numbers[3]),
          .dtype = static_cast<Dtype>(numbers[1]),
          .operation = layer.operation,
          .precision = layer.precision,
          .filters = {layer.filter, layer.filter, layer.filter},
          .tune_at_first_use = false,
          .transposed = maps.back()};
}

Problem problem_of(const Context& ctx, const Maps& maps, IntSpan numbers) {
  return Plan::make(ctx, maps.map, options_of(maps, numbers))
      .problem(ctx, static_cast<Pass>(numbers[0]));
}

// Of each problem the layer's numbers, with the kernel and the schedule that were picked. Behind
// them, where the map has none yet, the parts of its schedules, each of them once.
Tensors choices_of_passes(const Tensors& map,
                          const Ints& layer,
                          const Ints& problems,
                          const std::optional<Tensor>& masks,
                          bool builds) {
  const Context ctx = context_of(map.at(0));
  Maps maps(map, {}, layer);
  set_masks(masks, &maps.map);
  Tensors found;
  std::vector<ScheduleOptions> wanted;
  for (IntSpan rest = problems; !rest.empty();) {
    const auto count = static_cast<size_t>(rest[0]);
    check(count >= 4 && count < rest.size(), "a problem of ", count, " numbers, expected 4 to ",
          rest.size() - 1);
    const IntSpan numbers = rest.subspan(1, count);
    const Problem problem = problem_of(ctx, maps, numbers.first(4));
    const Choice picked = choice(problem, filter_of(numbers, 4));
    const bool on_map = problem.pass != Pass::grad_input || maps.map.symmetric;
    if (builds && on_map && std::ranges::find(wanted, picked.schedule) == wanted.end()) {
      wanted.push_back(picked.schedule);
    }
    found.push_back(host_numbers(chosen(layer, picked.schedule, picked.kernel)));
    rest = rest.subspan(1 + count);
  }
  for (const ScheduleOptions& options : wanted) {
    const Tensors parts = parts_of(kept_schedules().get(ctx, maps.map, options));
    found.insert(found.end(), parts.begin(), parts.end());
  }
  return found;
}

Tensor explain_pass(const Tensors& map, const Ints& layer, const Ints& problem, bool as_json) {
  const Maps maps(map, {}, layer);
  const Problem asked = problem_of(context_of(map.at(0)), maps, problem);
  const Filter& filter = maps.layer.filter;
  return text_tensor(as_json ? explain_json(asked, filter) : explain(asked, filter));
}

// Lines: how many candidates, in how many seconds; why it was not written; wrong kernels; the
// records.
Tensor text_of_tuning(const Tuning& found) {
  std::string wrong;
  for (const std::string& kernel : found.wrong) wrong += join(wrong.empty() ? "" : " ", kernel);
  return text_tensor(join(found.measured, " ", found.seconds, "\n", found.not_written, "\n", wrong,
                          "\n", found.records));
}

Tensor tune_pass(const Tensors& map,
                 const Tensors& transposed,
                 const Ints& layer,
                 const Ints& problem,
                 const Ints& how) {
  const Maps maps(map, transposed, layer);
  check(how.size() == 4, "got ", how.size(), " numbers, expected 4");
  return text_of_tuning(tune(context_of(map.at(0)), maps.map, options_of(maps, problem),
                             static_cast<Pass>(problem[0]),
                             {.budget_seconds = 1e-6 * static_cast<double>(how[0]),
                              .exhaustive = how[1] != 0,
                              .again = how[2] != 0,
                              .judged = how[3] != 0}));
}

Tensor is_tuned_pass(const Tensors& map, const Ints& layer, const Ints& problem) {
  const Maps maps(map, {}, layer);
  const Problem asked = problem_of(context_of(map.at(0)), maps, problem);
  return host_numbers({is_tuned(asked, maps.layer.filter) ? 1 : 0});
}

Tensor calibrate_device(const Tensor& on, int64_t budget_microseconds) {
  return text_of_tuning(calibrate(context_of(on), 1e-6 * static_cast<double>(budget_microseconds)));
}

Tensor learn(const Tensor& on, const Ints& bytes) {
  learn_times(device_of(on), std::string(bytes.begin(), bytes.end()));
  return host_numbers({});
}

Tensor times_folder_text() { return text_tensor(times_folder()); }

// A line of each: device, records, problems, superseded, foreign and path, with tabs between.
Tensor times_files_text() {
  std::string text;
  for (const TimesFile& file : times_files()) {
    text += join(file.device, "\t", file.records, "\t", file.problems, "\t", file.superseded, "\t",
                 file.foreign, "\t", file.path, "\n");
  }
  return text_tensor(text);
}

Tensor export_times_text(const Tensor& device) {
  return text_tensor(export_times(text_of(device)));
}
Tensor import_times_text(const Tensor& text) { return host_numbers({import_times(text_of(text))}); }
Tensor clear_times_count() { return host_numbers({clear_times()}); }

// The numbers of the filter that the environment gives a pass, as a layer has them.
Tensor environment_filter(int64_t of_pass) {
  const Filter& filter = environment_filters().at(static_cast<size_t>(of_pass));
  Ints numbers;
  for (const Algorithm algorithm : filter.algorithms) {
    numbers.push_back(static_cast<int64_t>(algorithm));
  }
  return host_numbers(numbers);
}

Tensor tunes_at_first_use_flag() { return host_numbers({tunes_at_first_use() ? 1 : 0}); }

}  // namespace

Tensor info(DeviceKind kind, const Context* ctx) {
  std::string text = VOXGEMM_VERSION;
  for (const std::string& kernel : kernel_names(kind)) text += join("\n- ", kernel);
  if (ctx == nullptr) return text_tensor(text);
  std::set<std::string> lines;
  for (const char* dtype : {"f16", "bf16", "f32", "f64", "tf32", "bf16x3", "bf16x6"}) {
    for (const Pass pass : {Pass::forward, Pass::grad_input, Pass::grad_weight}) {
      Problem problem = Problem::parse(join(name(pass), " ", dtype, " subm3 64->64"));
      problem.place(*ctx);
      for (const Candidate& candidate : candidates(problem, {})) {
        if (!candidate.reason.empty()) continue;
        lines.insert(join("\n", name(problem.dtype), " ", candidate.kernel));
      }
    }
  }
  for (const std::string& line : lines) text += line;
  return text_tensor(text);
}

void add_choice_operators(StableLibrary& m) {
  m.impl("_choice", TORCH_BOX(&Guarded<&choices_of_passes>::call));
  m.impl("_explain", TORCH_BOX(&Guarded<&explain_pass>::call));
  m.impl("_tune", TORCH_BOX(&Guarded<&tune_pass>::call));
  m.impl("_is_tuned", TORCH_BOX(&Guarded<&is_tuned_pass>::call));
  m.impl("_calibrate", TORCH_BOX(&Guarded<&calibrate_device>::call));
  m.impl("_learn", TORCH_BOX(&Guarded<&learn>::call));
}

void add_times_operators(StableLibrary& m) {
  m.impl("_environment_filter", TORCH_BOX(&Guarded<&environment_filter>::call));
  m.impl("_tunes_at_first_use", TORCH_BOX(&Guarded<&tunes_at_first_use_flag>::call));
  m.impl("_times_folder", TORCH_BOX(&Guarded<&times_folder_text>::call));
  m.impl("_times_files", TORCH_BOX(&Guarded<&times_files_text>::call));
  m.impl("_export_times", TORCH_BOX(&Guarded<&export_times_text>::call));
  m.impl("_import_times", TORCH_BOX(&Guarded<&import_times_text>::call));
  m.impl("_clear_times", TORCH_BOX(&Guarded<&clear_times_count>::call));
}

}  // namespace voxgemm
