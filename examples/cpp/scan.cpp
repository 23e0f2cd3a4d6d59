// SPDX-License-Identifier: Apache-2.0
//
// One convolution layer over a LiDAR scan, forward and backward, without Python:
//   scan FILE [VOXEL]
// FILE is a KITTI .bin (float32 x, y, z, intensity) or a .npy of float32 [n, >= 3]; VOXEL is the
// voxel's edge in the file's unit (0.2 if not given). Prints what was computed and how long each
// step took.
#include <voxgemm/plan.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <iterator>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include <voxgemm/error.h>

namespace {

using voxgemm::check;

struct Points {
  std::vector<float> values;  // [rows, columns]
  size_t columns = 4;
  size_t rows() const { return values.size() / columns; }
};

std::vector<char> read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  check(file.good(), "cannot read ", path);
  return {std::istreambuf_iterator<char>(file), {}};
}

// The text between `before` and `after` in a .npy header.
std::string between(const std::string& header, const std::string& before, char after) {
  const size_t begin = header.find(before);
  check(begin != std::string::npos, "the .npy header has no ", before);
  const size_t end = header.find(after, begin + before.size());
  return header.substr(begin + before.size(), end - begin - before.size());
}

Points parse_npy(const std::vector<char>& bytes) {
  check(bytes.size() > 10, "a .npy file of ", bytes.size(), " bytes has no header");
  // Version 1 counts its header in two bytes, later ones in four.
  const size_t width = bytes[6] == 1 ? 2 : 4;
  size_t length = 0;
  for (size_t i = 0; i < width; ++i)
    length |= size_t(static_cast<unsigned char>(bytes[8 + i])) << 8 * i;
  const size_t start = 8 + width + length;
  check(start <= bytes.size(), "the .npy header is longer than the file");
  const std::string header(bytes.data() + 8 + width, length);
  check(header.find("'<f4'") != std::string::npos, "expected float32 values, the header says ",
        header);
  check(header.find("'fortran_order': False") != std::string::npos, "expected C order");
  const std::string shape = between(header, "'shape': (", ')');
  const size_t comma = shape.find(',');
  Points points;
  points.columns = comma + 1 < shape.size() ? std::stoul(shape.substr(comma + 1)) : 1;
  points.values.resize((bytes.size() - start) / sizeof(float));
  std::memcpy(points.values.data(), bytes.data() + start, points.values.size() * sizeof(float));
  return points;
}

Points read_points(const std::string& path) {
  const std::vector<char> bytes = read_file(path);
  Points points;
  if (bytes.size() >= 6 && std::memcmp(bytes.data(), "\x93NUMPY", 6) == 0) {
    points = parse_npy(bytes);
  } else {
    check(bytes.size() % 16 == 0, path, " has ", bytes.size(), " bytes, expected a multiple of 16");
    points.values.resize(bytes.size() / sizeof(float));
    std::memcpy(points.values.data(), bytes.data(), bytes.size());
  }
  check(points.columns >= 3 && points.rows() > 0, path, " has ", points.rows(), " points of ",
        points.columns, " values, expected at least 1 of 3");
  return points;
}

// floor((p - min) / voxel) per axis, in double; one row (batch 0, x, y, z) per point.
std::vector<int32_t> voxelize(const Points& points, double voxel) {
  double least[3];
  std::fill_n(least, 3, std::numeric_limits<double>::infinity());
  for (size_t row = 0; row < points.rows(); ++row) {
    for (int axis = 0; axis < 3; ++axis) {
      const double value = points.values[row * points.columns + axis];
      check(std::isfinite(value), "point ", row, " has a coordinate that is not finite");
      least[axis] = std::min(least[axis], value);
    }
  }
  std::vector<int32_t> coords;
  for (size_t row = 0; row < points.rows(); ++row) {
    coords.push_back(0);
    for (int axis = 0; axis < 3; ++axis) {
      const double value = points.values[row * points.columns + axis];
      coords.push_back(static_cast<int32_t>(std::floor((value - least[axis]) / voxel)));
    }
  }
  return coords;
}

voxgemm::Matrix random_matrix(const voxgemm::Context& ctx, int64_t rows, int64_t cols) {
  voxgemm::Matrix matrix = voxgemm::make_matrix(ctx, rows, cols, voxgemm::Dtype::f32);
  std::mt19937 random(7);
  std::normal_distribution<float> normal;
  std::generate_n(matrix.as<float>(), rows * cols, [&] { return normal(random); });
  return matrix;
}

template <class Body>
void timed(const char* what, const Body& body) {
  const auto start = std::chrono::steady_clock::now();
  body();
  const std::chrono::duration<double, std::milli> spent = std::chrono::steady_clock::now() - start;
  std::printf("%-12s %8.2f ms\n", what, spent.count());
}

void run(const std::string& path, double voxel) {
  constexpr int c_in = 16;
  constexpr int c_out = 32;
  const Points points = read_points(path);
  std::vector<int32_t> rows = voxelize(points, voxel);
  const auto ctx = voxgemm::Context::cpu();
  const voxgemm::MatrixRef all{rows.data(), static_cast<int64_t>(points.rows()), 4, 4,
                               voxgemm::Dtype::i32};
  const voxgemm::UniqueCoords voxels = voxgemm::unique(ctx, all);

  voxgemm::KernelMap map;
  timed("map", [&] {
    map = voxgemm::build_submanifold_map(ctx, voxels.coords,
                                         voxgemm::Geometry::submanifold({3, 3, 3}));
  });
  auto plan = voxgemm::Plan::make(ctx, map, {.c_in = c_in, .c_out = c_out});
  const int taps = map.taps();
  const voxgemm::Matrix x = random_matrix(ctx, map.n_in, c_in);
  const voxgemm::Matrix weights = random_matrix(ctx, c_out, taps * c_in);
  const voxgemm::Matrix y = voxgemm::make_matrix(ctx, map.n_out, c_out, voxgemm::Dtype::f32);
  const voxgemm::Matrix dx = voxgemm::make_matrix(ctx, map.n_in, c_in, voxgemm::Dtype::f32);
  const voxgemm::Matrix dw = voxgemm::make_matrix(ctx, c_out, taps * c_in, voxgemm::Dtype::f32);
  // [c_out, taps, c_in], as torch's Conv3d stores it with its channels last.
  const auto view = [&](const voxgemm::Matrix& matrix) {
    return voxgemm::WeightsRef{.data = matrix.data,
                               .taps = taps,
                               .c_in = c_in,
                               .c_out = c_out,
                               .tap_stride = c_in,
                               .in_stride = 1,
                               .out_stride = static_cast<int64_t>(taps) * c_in};
  };
  timed("forward", [&] { plan.forward(ctx, x, view(weights), {}, y); });
  timed("grad_input", [&] { plan.grad_input(ctx, y, view(weights), dx); });
  timed("grad_weight", [&] { plan.grad_weight(ctx, x, y, view(dw)); });

  // <y, y> = <dx, x> = <dw, w> for dy = y: the gradients are the adjoints of the forward pass.
  const auto dot = [](const voxgemm::Matrix& a, const voxgemm::Matrix& b) {
    double sum = 0;
    for (int64_t i = 0; i < a.rows * a.cols; ++i)
      sum += double(a.as<float>()[i]) * b.as<float>()[i];
    return sum;
  };
  std::printf("%zu points, %lld voxels, %lld pairs, %d threads\n", points.rows(),
              static_cast<long long>(map.n_in), static_cast<long long>(map.pairs(ctx)),
              ctx.threads);
  std::printf("<y, y> = %.6e, <dx, x> = %.6e, <dw, w> = %.6e\n", dot(y, y), dot(dx, x),
              dot(dw, weights));
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2 && argc != 3) {
    std::fprintf(stderr, "usage: %s FILE [VOXEL]\n", argv[0]);
    return 2;
  }
  try {
    const double voxel = argc == 3 ? std::stod(argv[2]) : 0.2;
    check(voxel > 0, "VOXEL is ", voxel, ", expected more than 0");
    run(argv[1], voxel);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 2;
  }
  return 0;
}
