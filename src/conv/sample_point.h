// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cmath>

#include "core/dispatch.h"
#include "core/host_device.h"
#include "voxgemm/sampling.h"

namespace voxgemm {

// SampleOptions for kernels, which std::array is not.
struct SampleRule {
  SampleMode mode;
  Rounding rounding;
  bool bounded;
  int64_t shape[3];

  explicit SampleRule(const SampleOptions& options)
      : mode(options.mode), rounding(options.rounding), bounded(options.spatial_shape.has_value()) {
    for (int axis = 0; axis < 3; ++axis) {
      shape[axis] = bounded ? (*options.spatial_shape)[axis] : 0;
    }
  }
  // Beyond int32 there are no voxels.
  VOXGEMM_HOST_DEVICE bool counts(const int64_t* voxel) const {
    for (int axis = 0; axis < 3; ++axis) {
      if (voxel[axis] != static_cast<int32_t>(voxel[axis])) return false;
      if (bounded && (voxel[axis] < 0 || voxel[axis] >= shape[axis])) return false;
    }
    return true;
  }
};

// PointsRef for kernels, and where the rows and weights of points go.
template <class T>
struct Points {
  const T* points;       // [count, 3]
  const int32_t* batch;  // [count] or null
  int64_t per_batch;
  int64_t count;
  int32_t* rows;  // [count, taps]
  T* weights;     // [count, taps]

  Points(const PointsRef& given, const SampleMap& map)
      : points(given.points.as<T>()),
        batch(given.batch ? given.batch->as<int32_t>() : nullptr),
        per_batch(given.points_per_batch),
        count(given.points.rows),
        rows(map.rows.as<int32_t>()),
        weights(map.weights.as<T>()) {}
  VOXGEMM_HOST_DEVICE int64_t batch_of(int64_t point) const {
    if (batch != nullptr) return batch[point];
    return per_batch > 0 ? point / per_batch : 0;
  }
};

template <class Body>
void dispatch_points(Dtype dtype, const Body& body) {
  if (dtype == Dtype::f64) return body(Type<double>{});
  body(Type<float>{});
}

constexpr double least_weight_sum = 1e-12;

// Where a point lies between the centres of eight voxels.
template <class T>
struct Cell {
  int64_t corner[3] = {};  // the lower voxel
  T fraction[3] = {};      // of the way to the upper one
  bool finite = true;

  VOXGEMM_HOST_DEVICE explicit Cell(const T* point) {
    for (int axis = 0; axis < 3; ++axis) {
      const T place = point[axis] - T(0.5);
      const T low = std::floor(place);
      // Beyond int32 there are no voxels; NaN compares false.
      finite = finite && std::fabs(low) < T(4294967296.0);
      corner[axis] = finite ? static_cast<int64_t>(low) : 0;
      fraction[axis] = place - low;
    }
  }
  VOXGEMM_HOST_DEVICE T share(int axis, int c) const {
    return (c >> axis & 1) != 0 ? fraction[axis] : T(1) - fraction[axis];
  }
};

template <class T, class Find>
VOXGEMM_HOST_DEVICE inline void sample_nearest(
    Rounding rounding, const T* point, const Find& find, int32_t* row, T* weight) {
  int64_t voxel[3];
  bool finite = true;
  for (int axis = 0; axis < 3; ++axis) {
    const T place = rounding == Rounding::floor ? std::floor(point[axis]) : std::trunc(point[axis]);
    finite = finite && std::fabs(place) < T(4294967296.0);
    voxel[axis] = finite ? static_cast<int64_t>(place) : 0;
  }
  *row = finite ? find(voxel) : -1;
  *weight = *row >= 0 ? T(1) : T(0);
}

template <class T, class Find>
VOXGEMM_HOST_DEVICE inline void sample_trilinear(const T* point,
                                                 const Find& find,
                                                 int32_t* rows,
                                                 T* weights) {
  const Cell<T> cell(point);
  T shares[8];
  T sum = 0;
  for (int c = 0; c < 8; ++c) {
    const int64_t voxel[3] = {cell.corner[0] + (c & 1), cell.corner[1] + (c >> 1 & 1),
                              cell.corner[2] + (c >> 2)};
    rows[c] = cell.finite ? find(voxel) : -1;
    shares[c] = rows[c] >= 0 ? cell.share(0, c) * cell.share(1, c) * cell.share(2, c) : T(0);
    sum += shares[c];
  }
  const T divisor = sum > T(least_weight_sum) ? sum : T(least_weight_sum);
  for (int c = 0; c < 8; ++c) weights[c] = shares[c] / divisor;
}

// Row and weight of every voxel that point p reads; find(batch, x, y, z) gives a row or -1.
template <SampleMode mode, class T, class Find>
VOXGEMM_HOST_DEVICE inline void sample_point(const SampleRule& rule,
                                             const Points<T>& points,
                                             int64_t p,
                                             const Find& find) {
  const auto batch = static_cast<int32_t>(points.batch_of(p));
  const auto find_counted = [&](const int64_t* voxel) {
    return rule.counts(voxel) ? find(batch, static_cast<int32_t>(voxel[0]),
                                     static_cast<int32_t>(voxel[1]), static_cast<int32_t>(voxel[2]))
                              : -1;
  };
  const T* point = points.points + 3 * p;
  if constexpr (mode == SampleMode::nearest) {
    sample_nearest(rule.rounding, point, find_counted, points.rows + p, points.weights + p);
  } else {
    sample_trilinear(point, find_counted, points.rows + 8 * p, points.weights + 8 * p);
  }
}

// With w = u / s for the shares u of the corners that are there and their sum s:
//   d(sum g w) / dq = (sum g du/dq - (sum g w) sum du/dq) / s,
// the second term only where s is not the least one.
template <class T>
VOXGEMM_HOST_DEVICE inline void sample_gradient(const T* point,
                                                const int32_t* rows,
                                                const T* dweights,
                                                T* dpoint) {
  const Cell<T> cell(point);
  T sum = 0;
  T product = 0;
  T slope[3] = {};       // sum of du/dq
  T dpoint_sum[3] = {};  // sum of g du/dq
  for (int c = 0; c < 8; ++c) {
    if (rows[c] < 0) continue;
    const T shares[3] = {cell.share(0, c), cell.share(1, c), cell.share(2, c)};
    const T share = shares[0] * shares[1] * shares[2];
    sum += share;
    product += dweights[c] * share;
    for (int axis = 0; axis < 3; ++axis) {
      const T others = shares[(axis + 1) % 3] * shares[(axis + 2) % 3];
      const T change = (c >> axis & 1) != 0 ? others : -others;
      slope[axis] += change;
      dpoint_sum[axis] += dweights[c] * change;
    }
  }
  const bool divided = sum > T(least_weight_sum);
  const T divisor = divided ? sum : T(least_weight_sum);
  for (int axis = 0; axis < 3; ++axis) {
    const T correction = divided ? product / divisor * slope[axis] : T(0);
    dpoint[axis] = (dpoint_sum[axis] - correction) / divisor;
  }
}

// What sample_map_grad() does with a point.
template <class T>
struct PointGradients {
  const T* points;      // [count, 3]
  const int32_t* rows;  // [count, 8]
  const T* dweights;    // [count, 8]
  T* dpoints;           // [count, 3]

  VOXGEMM_HOST_DEVICE void operator()(int64_t p) const {
    sample_gradient(points + 3 * p, rows + 8 * p, dweights + 8 * p, dpoints + 3 * p);
  }
};

}  // namespace voxgemm
