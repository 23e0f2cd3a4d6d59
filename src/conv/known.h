// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <memory>
#include <string>

#include "conv/correction.h"
#include "conv/kernel.h"
#include "core/store.h"

namespace voxgemm {

// The problem of a record: the text of a problem whose cloud is its size class, rows in and out
// and, where the host knows them, pairs, each rounded to a power of two; on the CPU also the
// threads:
//   "forward f16 subm3 64->128 2^17->2^17", "grad_weight f32 conv2s2 8->16 2^12->2^10.p2^13.t4"
std::string size_class(const Problem& problem);
// The problem of the records of a calibration, whose seconds are measured over predicted ones.
std::string calibration_of(Pass pass);

// The store of a device, of this process and its environment: one for all devices of a model.
Store& store_of(const Device& device);

// The pairs that a problem has, where they are known, or may be expected to have: a row of a
// surface has 1.5 k^2 of k^3 taps, and a layer that makes its coarse voxels has every one with a
// fine voxel below it.
double likely_pairs(const Problem& problem);

// What a choice knows beyond the cost models.
class Known {
 public:
  // With `measured` false only what comes with the library.
  Known(const Problem& problem, bool measured);

  // What was measured of the problem's size class; null: nothing. Times of other revisions and of
  // kernels that this build lacks are among them.
  const Store::List& times() const { return times_; }
  // Of a kernel as it is now; 0: not measured.
  double seconds(const Kernel& kernel) const;
  // The model's seconds for the problem, corrected by what comes with the library and by what
  // `calibrate` found on this device.
  double predicted(const Kernel& kernel) const;

 private:
  Problem problem_;  // with its pairs, as far as can be said
  Correction sizes_;
  Store::List times_;
  // [passes, rows of the registry]; null: never calibrated.
  std::shared_ptr<const std::vector<double>> factors_;
};

}  // namespace voxgemm
