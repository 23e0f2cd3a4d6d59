// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>
#include <vector>

#include "support/clouds.h"
#include "voxgemm/kernel_map.h"
#include "voxgemm/problem.h"

namespace voxgemm::test {

// "OPERATION C_IN->C_OUT CLOUD": what every kernel must compute, in every pass and dtype.
inline const std::vector<std::string>& layers() {
  static const std::vector<std::string> list = {
      // Channels below, at and above every register width, odd and even.
      "subm3 1->1 line:1",
      "subm3 1->3 random:129:6",
      "subm3 3->33 line:31",
      "subm3 6->16 shell:6",
      "subm3 16->33 random:129:6",
      "subm3 33->6 random:129:6",
      "subm3 96->96 shell:4",
      "subm1x3x2 96->192 random:129:6",
      "subm2x1x3 192->96 random:31:4",
      "subm3x1x1 192->192 line:129",
      // Kernel sizes, even ones too, mixed axes, dilation.
      "subm1 16->16 random:129:6",
      "subm2 6->16 shell:8",
      "subm4 3->6 random:129:6",
      "subm5 16->3 shell:8",
      "subm6 1->16 random:31:6",
      "subm7 6->3 random:129:6",
      "subm3x1x2 16->16 shell:8",
      "subm3d2 6->16 random:129:8",
      "subm5x3x1d3x2x1 16->6 random:129:10",
      // Clouds.
      "subm3 16->16 empty",
      "subm3 16->16 full:5",
      "subm3 6->6 street",
      "subm3 3->6 random:9000:26",
      "subm3 16->16 gap:129",
      "subm3 16->16 repeat:129",
      "subm2 6->3 repeat:31",
      "subm3 6->6 extreme",
      // Strided.
      "conv3s2p1 6->16 empty",
      "conv3s2p1 1->3 odd",
      "conv2s2 33->16 shell:8",
      "conv2s2 96->192 shell:6",
      "conv3s2p1 16->33 random:129:8",
      "conv1s2 6->6 random:129:8",
      "conv3s3 6->16 random:31:8",
      "conv4s2p1 16->6 random:129:8",
      "conv5s3p2d2 3->6 random:129:8",
      "conv3x2x1s2x1x3p1x0x0d1x2x1 6->16 random:129:8",
      "conv3p1 6->6 line:31",
      "conv3s2p1 16->16 gap:129",
      "conv3s2p1 6->16 repeat:129",
      "conv3s2p1 6->6 extreme",
      // Inverse: the strided map of the cloud with its sides exchanged.
      "inv2s2 6->16 empty",
      "inv3s2p1 3->1 odd",
      "inv2s2 16->33 shell:8",
      "inv2s2 192->96 shell:6",
      "inv3s2p1 33->16 random:129:8",
      "inv4s2p1 6->16 random:129:8",
      "inv3x2x1s2x1x3p1x0x0 16->6 random:129:8",
      "inv3s2p1 16->16 gap:129",
      "inv3s2p1 16->6 repeat:129",
      "inv3s2p1 6->6 extreme",
  };
  return list;
}

constexpr Pass passes[] = {Pass::forward, Pass::grad_input, Pass::grad_weight};

inline std::string problem_text(Pass pass, Dtype dtype, const std::string& layer) {
  return std::string(name(pass)) + " " + std::string(name(dtype)) + " " + layer;
}

// The thread sanitizer makes code some 25 times slower, and what threads do hardly depends on the
// layer.
#if defined(__SANITIZE_THREAD__)
constexpr size_t layer_step = 7;
#else
constexpr size_t layer_step = 1;
#endif

inline std::vector<std::string> problem_list() {
  std::vector<std::string> list;
  for (size_t i = 0; i < layers().size(); i += layer_step) {
    for (const Dtype dtype : {Dtype::f32, Dtype::f16, Dtype::bf16}) {
      for (const Pass pass : passes) list.push_back(problem_text(pass, dtype, layers()[i]));
    }
  }
  return list;
}

// A problem with its coordinates and its map.
struct Case {
  Problem problem;
  Voxels in;
  Voxels out;
  KernelMap map;

  Case with(Pass pass, Dtype dtype) const {
    Case copy = *this;
    copy.problem.pass = pass;
    copy.problem.dtype = dtype;
    return copy;
  }
};

inline Case make_case(const Context& ctx, const Problem& problem, const Voxels& voxels) {
  Case made{.problem = problem, .in = voxels, .out = voxels, .map = {}};
  const Matrix fine = coords_matrix(ctx, voxels);
  if (problem.operation == Operation::submanifold) {
    made.map = build_submanifold_map(ctx, fine, problem.geometry);
    return made;
  }
  const Matrix coarse = output_coords(ctx, fine, problem.geometry);
  made.map = build_kernel_map(ctx, fine, coarse, problem.geometry);
  made.out = voxels_of(coarse);
  if (problem.operation == Operation::inverse) {
    made.map = transpose(ctx, made.map);
    std::swap(made.in, made.out);
  }
  return made;
}

inline Case make_case(const Context& ctx, const std::string& text) {
  const Problem problem = Problem::parse(text);
  return make_case(ctx, problem, cloud(problem.cloud));
}

}  // namespace voxgemm::test
