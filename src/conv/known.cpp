// SPDX-License-Identifier: Apache-2.0
#include "conv/known.h"

#include <cmath>
#include <map>
#include <mutex>

#include "conv/passes.h"
#include "core/environment.h"
#include "voxgemm/error.h"

namespace voxgemm {
namespace {

using Factors = std::shared_ptr<const std::vector<double>>;

Factors read_factors(const Store& store, DeviceKind kind) {
  const std::vector<Kernel>& rows = registry(kind);
  std::vector<double> factors;
  for (const Pass pass : {Pass::forward, Pass::grad_input, Pass::grad_weight}) {
    const Store::List list = store.known(calibration_of(pass));
    if (!list) continue;
    factors.resize(3 * rows.size(), 1.0);
    for (const Store::Known& known : *list) {
      const Kernel* kernel = find_kernel(kind, known.kernel);
      if (kernel == nullptr || kernel->revision != known.revision) continue;
      factors[static_cast<size_t>(pass) * rows.size() + (kernel - rows.data())] = known.seconds;
    }
  }
  if (factors.empty()) return nullptr;
  return std::make_shared<const std::vector<double>>(std::move(factors));
}

// A device model's store, and its calibration as it was when the store last changed.
class Model {
 public:
  Model(DeviceKind kind, const std::string& name)
      : store(name, environment().cache_folder, environment().priors), kind_(kind) {}

  Factors factors() {
    const int64_t changes = store.changes();
    const std::scoped_lock lock(mutex_);
    if (changes != seen_) {
      factors_ = read_factors(store, kind_);
      seen_ = changes;
    }
    return factors_;
  }

  Store store;

 private:
  DeviceKind kind_;
  std::mutex mutex_;
  int64_t seen_ = 0;  // a store that never changed holds nothing
  Factors factors_;
};

class Models {
 public:
  Model& of(const Device& device) {
    const std::scoped_lock lock(mutex_);
    Model*& found = by_device_[{device.kind, device.index}];
    if (found != nullptr) return *found;
    const bool is_cuda = device.kind == DeviceKind::cuda;
    if (is_cuda) cuda::load_kernels(device);
    const std::string name = is_cuda ? cuda::model(device) : cpu::model();
    std::unique_ptr<Model>& model = by_name_[name];
    if (!model) model = std::make_unique<Model>(device.kind, name);
    return *(found = model.get());
  }

 private:
  std::mutex mutex_;
  std::map<std::pair<DeviceKind, int>, Model*> by_device_;
  std::map<std::string, std::unique_ptr<Model>> by_name_;
};

Model& model_of(const Device& device) {
  // Never destroyed: a thread may still choose while the process exits.
  static Models* const models = new Models;
  return models->of(device);
}

void append_rounded(int64_t count, std::string* text) {
  if (count <= 0) {
    *text += "0";
  } else {
    *text += "2^" + std::to_string(std::lround(std::log2(static_cast<double>(count))));
  }
}

}  // namespace

std::string size_class(const Problem& problem) {
  Problem rounded = problem;
  rounded.cloud.clear();
  append_rounded(problem.n_in, &rounded.cloud);
  rounded.cloud += "->";
  append_rounded(problem.n_out, &rounded.cloud);
  if (problem.pairs >= 0) {
    rounded.cloud += ".p";
    append_rounded(problem.pairs, &rounded.cloud);
  }
  if (problem.device.kind == DeviceKind::cpu) {
    rounded.cloud += ".t" + std::to_string(problem.threads);
  }
  return rounded.text();
}

std::string calibration_of(Pass pass) { return join("calibration of ", name(pass)); }

Store& store_of(const Device& device) { return model_of(device).store; }

double likely_pairs(const Problem& problem) {
  if (problem.pairs >= 0) return static_cast<double>(problem.pairs);
  const auto n_in = static_cast<double>(problem.n_in);
  const auto n_out = static_cast<double>(problem.n_out);
  const double taps = problem.geometry.taps();
  const double all = taps * std::min(n_in, n_out);
  if (problem.operation == Operation::submanifold) {
    return std::min(all, 1.5 * n_out * std::pow(taps, 2.0 / 3));
  }
  const auto& stride = problem.geometry.stride;
  const double cells = double(stride[0]) * stride[1] * stride[2];
  const bool fine_is_in =
      (problem.operation == Operation::strided) == (problem.pass != Pass::grad_input);
  return std::min(taps * std::max(n_in, n_out), (fine_is_in ? n_in : n_out) * taps / cells);
}

Known::Known(const Problem& problem, bool measured)
    : problem_(problem), sizes_(sizes_for_correction(problem)) {
  problem_.pairs = std::llround(likely_pairs(problem));
  if (!measured) return;
  Model& model = model_of(problem.device);
  if (model.store.empty()) return;
  times_ = model.store.known(size_class(problem));
  factors_ = model.factors();
}

double Known::seconds(const Kernel& kernel) const {
  if (!times_) return 0;
  for (const Store::Known& known : *times_) {
    if (known.kernel == kernel.name && known.revision == kernel.revision) return known.seconds;
  }
  return 0;
}

double Known::predicted(const Kernel& kernel) const {
  const Correction& correction = shipped_correction(kernel, problem_);
  double power = 0;
  for (int term = 0; term < correction_terms; ++term) power += correction[term] * sizes_[term];
  const double seconds = std::exp2(power) * kernel.cost(kernel, problem_);
  if (!factors_) return seconds;
  const std::vector<Kernel>& rows = registry(problem_.device.kind);
  return seconds *
         (*factors_)[static_cast<size_t>(problem_.pass) * rows.size() + (&kernel - rows.data())];
}

}  // namespace voxgemm
