// SPDX-License-Identifier: Apache-2.0
#include <chrono>
#include <cmath>
#include <map>
#include <memory>

#include "conv/known.h"
#include "conv/passes.h"
#include "conv/validate.h"
#include "tune/judge.h"
#include "tune/operands.h"
#include "tune/tuner.h"
#include "voxgemm/error.h"
#include "voxgemm/tune.h"

namespace voxgemm {
namespace {

// A lap takes at least this long, far above the steps of a clock, in up to so many calls; less
// where the budget has no room for it, but as much as shows a difference of some percent.
constexpr double lap_seconds = 2e-3;
constexpr double least_lap_seconds = 2e-4;
constexpr int most_calls = 200;
// The time of a kernel whose results are wrong: it is known and never the fastest.
constexpr double never = 1e9;

// Seconds of a call. On the CPU the median of the calls: where other programs take its time away,
// they take it from few of them.
double time_call(const Context& ctx, int calls, const std::function<void()>& work) {
  if (ctx.device.kind == DeviceKind::cuda) return cuda::time_calls(ctx, calls, work) / calls;
  std::vector<double> laps;
  for (int call = 0; call < calls; ++call) {
    const auto begin = std::chrono::steady_clock::now();
    work();
    const std::chrono::duration<double> lap = std::chrono::steady_clock::now() - begin;
    laps.push_back(lap.count());
  }
  return median(std::move(laps));
}

// One kernel of a pass, ready to be timed.
struct Trial {
  const Kernel* kernel = nullptr;
  double predicted = 0;
  std::unique_ptr<Plan> plan;
  int calls = 1;
  double once = 0;  // seconds of a call, as far as is known beforehand
  bool wrong = false;
};

// Those of a problem that can run and the filter admits, but for references beside others.
std::vector<Trial> trials_of(const Problem& problem, const Filter& filter) {
  std::vector<Trial> trials;
  for (const Candidate& candidate : candidates(problem, filter)) {
    const Kernel* kernel = find_kernel(problem.device.kind, candidate.kernel);
    if (!candidate.reason.empty() || kernel->reference) continue;
    trials.push_back({.kernel = kernel, .predicted = candidate.seconds, .plan = nullptr});
  }
  return trials;
}

std::vector<Contender> contenders_of(const Problem& problem, const std::vector<Trial>& trials) {
  const Known known(problem, true);
  std::vector<Contender> contenders;
  contenders.reserve(trials.size());
  for (const Trial& trial : trials) {
    contenders.push_back({trial.predicted, known.seconds(*trial.kernel) > 0});
  }
  return contenders;
}

// Plans of one kernel each, which share transposed map and schedules.
class Bench {
 public:
  Bench(const Context& ctx,
        const KernelMap& map,
        const PlanOptions& options,
        Pass pass,
        double lap_seconds)
      : ctx_(ctx),
        map_(map),
        options_(options),
        pass_(pass),
        lap_seconds_(lap_seconds),
        operands_(ctx, map, options, Numbers::normal) {
    if (pass == Pass::grad_input && !map.symmetric && options.transposed == nullptr) {
      transposed_ = transpose(ctx, map);
      options_.transposed = &*transposed_;
    }
    options_.tune_at_first_use = false;
  }
  // Kernels are judged before they are timed.
  void judge() { judge_.emplace(ctx_, map_, options_, pass_); }

  // Makes a trial ready to be timed: its plan, whether that gives what the reference gives, and how
  // many calls make a lap.
  void prepare(const Problem& problem, Trial* trial) {
    if (trial->plan) return;
    make_plan(problem, trial);
    trial->wrong = judge_ && !judge_->agrees(trial->plan.get());
    if (trial->wrong) return;
    const auto work = [&] { operands_.run(ctx_, trial->plan.get(), pass_); };
    // Pages, modules and memory are in the first.
    trial->once = time_call(ctx_, 1, work);
    if (trial->once < 10 * lap_seconds_) {
      trial->once = std::min(time_call(ctx_, 1, work), time_call(ctx_, 1, work));
    }
    trial->calls =
        std::clamp(static_cast<int>(lap_seconds_ / std::max(trial->once, 1e-9)), 1, most_calls);
  }
  // Seconds a call; of one with wrong results `never`.
  double time(const Trial& trial) {
    if (trial.wrong) return never;
    return time_call(ctx_, trial.calls, [&] { operands_.run(ctx_, trial.plan.get(), pass_); });
  }

 private:
  void make_plan(const Problem& problem, Trial* trial) {
    const auto number = static_cast<size_t>(pass_);
    const ScheduleOptions wanted = trial->kernel->schedule(*trial->kernel, problem);
    const bool backward = pass_ == Pass::grad_input && !map_.symmetric;
    auto found = std::find_if(schedules_.begin(), schedules_.end(),
                              [&](const auto& each) { return each->options() == wanted; });
    if (found == schedules_.end()) {
      schedules_.push_back(std::make_unique<Schedule>(
          Schedule::build(ctx_, backward ? *options_.transposed : map_, wanted)));
      found = schedules_.end() - 1;
    }
    PlanOptions options = options_;
    options.filters[number] = {.kernel = trial->kernel->name};
    options.schedules[number] = found->get();
    trial->plan = std::make_unique<Plan>(Plan::make(ctx_, map_, options));
  }

  const Context& ctx_;
  const KernelMap& map_;
  PlanOptions options_;
  Pass pass_;
  double lap_seconds_;
  Operands operands_;
  std::optional<KernelMap> transposed_;
  std::vector<std::unique_ptr<Schedule>> schedules_;
  std::optional<Judge> judge_;
};

// What every lap of so many contenders can take of a budget.
double lap_of(double budget_seconds, size_t contenders) {
  const double laps = static_cast<double>(contenders) * (Tuner::Options{}.rounds + 1);
  return std::clamp(budget_seconds / laps, least_lap_seconds, lap_seconds);
}

// Times the trials of these places in turn; their medians.
Tuner run_rounds(Bench* bench,
                 const Problem& problem,
                 std::vector<Trial>* trials,
                 const std::vector<size_t>& places,
                 const Tuner::Options& options) {
  Tuner tuner(places.size(), options);
  while (const std::optional<size_t> turn = tuner.next()) {
    Trial& trial = (*trials)[places[*turn]];
    try {
      const bool warms_up = !trial.plan;
      bench->prepare(problem, &trial);
      if (warms_up && trial.calls == 1 && !trial.wrong) {
        // A long call is its own lap.
        tuner.record(trial.once, trial.once);
        continue;
      }
      const auto begin = std::chrono::steady_clock::now();
      const double seconds = bench->time(trial);
      const std::chrono::duration<double> spent = std::chrono::steady_clock::now() - begin;
      tuner.record(seconds, spent.count());
    } catch (const Error& error) {
      // One that needs more memory than there is cannot win.
      if (error.code() != ErrorCode::out_of_memory) throw;
      tuner.drop();
    }
  }
  return tuner;
}

}  // namespace

bool is_tuned(const Problem& problem, const Filter& filter) {
  validate_problem(problem);
  validate_algorithms(filter);
  if (!filter.kernel.empty()) return true;
  return worth_timing(contenders_of(problem, trials_of(problem, filter)), {}).empty();
}

Tuning tune(const Context& ctx,
            const KernelMap& map,
            const PlanOptions& options,
            Pass pass,
            const TuneOptions& how) {
  validate_enumerator(pass, Pass::grad_weight, "the pass");
  Plan plan = Plan::make(ctx, map, options);
  const Filter& filter = options.filters[static_cast<size_t>(pass)];
  Tuning result;
  if (!filter.kernel.empty() || map.n_in == 0 || map.n_out == 0) return result;
  const Problem problem = plan.problem(ctx, pass);
  std::vector<Trial> trials = trials_of(problem, filter);
  const std::vector<size_t> places =
      worth_timing(contenders_of(problem, trials), {how.exhaustive, how.again});
  if (places.empty()) return result;
  Bench bench(ctx, map, options, pass, lap_of(how.budget_seconds, places.size()));
  if (how.judged) bench.judge();
  const Tuner tuner =
      run_rounds(&bench, problem, &trials, places, {.budget_seconds = how.budget_seconds});
  Store& store = store_of(ctx.device);
  std::vector<Record> records;
  for (size_t p = 0; p < places.size(); ++p) {
    const Trial& trial = trials[places[p]];
    const Kernel& kernel = *trial.kernel;
    const double seconds = trial.wrong ? never : tuner.seconds(p);
    if (seconds <= 0) continue;
    if (trial.wrong) result.wrong.push_back(kernel.name);
    records.push_back({store.device(), size_class(problem), kernel.name, kernel.revision, seconds});
    result.records += line_of(records.back());
  }
  result.measured = static_cast<int>(records.size());
  result.seconds = tuner.spent();
  result.not_written = store.add(records);
  return result;
}

namespace {

// A surface that most clouds resemble: the voxels of a sphere's shell in a cube of this size.
Matrix shell(const Context& ctx, int size) {
  std::vector<int32_t> rows;
  const double middle = (size - 1) / 2.0;
  const auto off = [&](int at) { return (at - middle) * (at - middle); };
  for (int x = 0; x < size; ++x) {
    for (int y = 0; y < size; ++y) {
      for (int z = 0; z < size; ++z) {
        const double radius = std::sqrt(off(x) + off(y) + off(z));
        if (std::abs(radius - (middle - 0.5)) < 0.5) rows.insert(rows.end(), {0, x, y, z});
      }
    }
  }
  const auto count = static_cast<int64_t>(rows.size());
  Matrix coords = make_matrix(ctx, count / 4, 4, Dtype::i32);
  const MatrixRef host = {.data = rows.data(),
                          .rows = 1,
                          .cols = count,
                          .stride = count,
                          .dtype = Dtype::i32,
                          .device = {}};
  MatrixRef flat = coords;
  flat.rows = 1;
  flat.cols = flat.stride = count;
  copy_elements(ctx, host, flat);
  return coords;
}

// What one kind of problem says of the kernels that compute it.
void calibrate_on(const Context& ctx,
                  const KernelMap& map,
                  const Problem& kind,
                  double budget_seconds,
                  std::map<const Kernel*, std::vector<double>>* ratios) {
  PlanOptions options{
      .c_in = kind.c_in,
      .c_out = kind.c_out,
      .dtype = kind.dtype,
      .precision = kind.precision,
      .filters = {Filter{.measured = false}, Filter{.measured = false}, Filter{.measured = false}}};
  const Problem problem = Plan::make(ctx, map, options).problem(ctx, kind.pass);
  std::vector<Trial> trials = trials_of(problem, options.filters[0]);
  if (trials.empty()) return;
  const std::vector<size_t> places =
      worth_timing(contenders_of(problem, trials), {.exhaustive = true, .again = true});
  Bench bench(ctx, map, options, kind.pass, lap_of(budget_seconds, places.size()));
  const Tuner tuner =
      run_rounds(&bench, problem, &trials, places, {.rounds = 3, .budget_seconds = budget_seconds});
  for (size_t p = 0; p < places.size(); ++p) {
    const Trial& trial = trials[places[p]];
    if (tuner.seconds(p) > 0) (*ratios)[trial.kernel].push_back(tuner.seconds(p) / trial.predicted);
  }
}

std::vector<Problem> kinds_of_problems() {
  std::vector<Problem> kinds;
  for (const char* channels : {"64->64", "16->32", "128->128"}) {
    for (const char* pass : {"forward", "grad_input", "grad_weight"}) {
      for (const char* dtype : {"f16", "bf16", "f32", "tf32", "bf16x3", "bf16x6"}) {
        kinds.push_back(Problem::parse(join(pass, " ", dtype, " subm3 ", channels)));
      }
    }
  }
  return kinds;
}

double geometric_mean(const std::vector<double>& values) {
  double sum = 0;
  for (const double value : values) sum += std::log(value);
  return std::exp(sum / static_cast<double>(values.size()));
}

}  // namespace

Tuning calibrate(const Context& ctx, double budget_seconds) {
  const bool on_device = ctx.device.kind == DeviceKind::cuda;
  const Matrix coords = shell(ctx, on_device ? 128 : 48);
  const KernelMap map = build_submanifold_map(ctx, coords, Geometry::submanifold({3, 3, 3}));
  const std::vector<Problem> kinds = kinds_of_problems();
  std::array<std::map<const Kernel*, std::vector<double>>, 3> ratios;  // by pass
  const auto begin = std::chrono::steady_clock::now();
  const auto spent = [&] {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  };
  for (size_t k = 0; k < kinds.size() && spent() < budget_seconds; ++k) {
    // On the CPU every precision of f32 is the same.
    if (!on_device && kinds[k].precision != Precision::ieee) continue;
    const double share = 2 * (budget_seconds - spent()) / static_cast<double>(kinds.size() - k);
    calibrate_on(ctx, map, kinds[k], share, &ratios[static_cast<size_t>(kinds[k].pass)]);
  }
  Store& store = store_of(ctx.device);
  Tuning result;
  std::vector<Record> records;
  for (const Pass pass : {Pass::forward, Pass::grad_input, Pass::grad_weight}) {
    for (const auto& [kernel, values] : ratios[static_cast<size_t>(pass)]) {
      records.push_back({store.device(), calibration_of(pass), kernel->name, kernel->revision,
                         geometric_mean(values)});
      result.records += line_of(records.back());
    }
  }
  result.measured = static_cast<int>(records.size());
  result.seconds = spent();
  result.not_written = store.add(records);
  return result;
}

}  // namespace voxgemm
