// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <memory>
#include <new>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "abi.h"
#include "voxgemm/error.h"
#include "voxgemm/plan.h"

// Between torch's types and the library's. Messages call an argument by its Python name.
namespace voxgemm {

using ::torch::headeronly::ScalarType;
using ::torch::stable::Tensor;
using Ints = std::vector<int64_t>;
using IntSpan = std::span<const int64_t>;
using Tensors = std::vector<Tensor>;

inline ScalarType scalar_type(Dtype dtype) {
  switch (dtype) {
    case Dtype::f16:
      return ScalarType::Half;
    case Dtype::bf16:
      return ScalarType::BFloat16;
    case Dtype::f32:
      return ScalarType::Float;
    case Dtype::f64:
      return ScalarType::Double;
    case Dtype::i32:
      return ScalarType::Int;
    case Dtype::i64:
      return ScalarType::Long;
  }
  return ScalarType::Undefined;
}

inline Dtype dtype_of(const Tensor& tensor, std::string_view what) {
  const ScalarType type = tensor.scalar_type();
  for (const Dtype dtype :
       {Dtype::f16, Dtype::bf16, Dtype::f32, Dtype::f64, Dtype::i32, Dtype::i64}) {
    if (scalar_type(dtype) == type) return dtype;
  }
  check(false, what, " has dtype ", torch::headeronly::toString(type),
        ", expected f16, bf16, f32, f64, i32 or i64");
  return Dtype::f32;
}

// Not initialised. Torch aligns the memory to 64 bytes.
inline Tensor empty_tensor(const Device& device, const Ints& sizes, ScalarType type) {
  Ints strides(sizes.size(), 1);
  for (size_t d = sizes.size(); d-- > 1;) {
    strides[d - 1] = strides[d] * std::max<int64_t>(sizes[d], 1);
  }
  const auto shim_type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  const bool on_device = device.kind == DeviceKind::cuda;
  AtenTensorHandle handle = nullptr;
  const AOTITorchError status = aoti_torch_empty_strided(
      static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), shim_type,
      on_device ? aoti_torch_device_type_cuda() : aoti_torch_device_type_cpu(), device.index,
      &handle);
  if (status != AOTI_TORCH_SUCCESS) throw std::bad_alloc();
  Tensor tensor(handle);
  if (!on_device) {
    prefer_huge_pages(tensor.mutable_data_ptr(),
                      static_cast<size_t>(tensor.numel()) * tensor.element_size());
  }
  return tensor;
}

inline Device device_of(const Tensor& tensor) {
  if (!tensor.is_cuda()) return {};
  return {DeviceKind::cuda, static_cast<int>(tensor.get_device_index())};
}

// `tensor` itself, or a contiguous copy. Torch's own contiguous() would report exhausted memory on
// stderr.
inline Tensor contiguous_tensor(const Tensor& tensor) {
  if (tensor.is_contiguous()) return tensor;
  const auto sizes = tensor.sizes();
  Tensor copy = empty_tensor(device_of(tensor), {sizes.begin(), sizes.end()}, tensor.scalar_type());
  return torch::stable::copy_(copy, tensor);
}

// The deleter of memory that a tensor owns. Finding it in a Matrix gives the tensor back.
struct TensorOwner {
  Tensor tensor;
  void operator()(void*) const {}
};

// Memory for a context that torch's allocator of its device gives.
inline Context::Allocate torch_memory(const Device& device) {
  return [device](size_t bytes) {
    // At least one byte: an empty tensor has no address.
    const Tensor tensor =
        empty_tensor(device, {static_cast<int64_t>(std::max<size_t>(bytes, 1))}, ScalarType::Byte);
    return std::shared_ptr<void>(tensor.mutable_data_ptr(), TensorOwner{tensor});
  };
}

// The same for a matrix, whose tensor is one of its shape: what tensor_of() gives of it is no view.
inline Context::AllocateMatrix torch_matrices(const Device& device) {
  return [device](const MatrixRef& shape) {
    if (shape.rows == 0 || shape.cols == 0) return torch_memory(device)(0);
    const Tensor tensor = empty_tensor(device, {shape.rows, shape.cols}, scalar_type(shape.dtype));
    return std::shared_ptr<void>(tensor.mutable_data_ptr(), TensorOwner{tensor});
  };
}

// Where the operators of a tensor run; cpu.cpp and cuda.cpp each have their own.
Context context_of(const Tensor& tensor);

// A tensor and its view; the tensor is a copy where the argument's layout has no view.
struct HeldMatrix {
  Tensor tensor;
  MatrixRef matrix;
};

inline HeldMatrix held_matrix(const Tensor& argument, std::string_view what) {
  HeldMatrix held{argument, {}};
  check(argument.dim() == 2, what, " has ", argument.dim(),
        " dimensions, expected 2: [rows, columns]");
  const int64_t rows = argument.size(0);
  const int64_t cols = argument.size(1);
  const bool is_view = (cols <= 1 || argument.stride(1) == 1) &&
                       (rows <= 1 || argument.stride(0) >= std::max<int64_t>(cols, 1));
  if (!is_view) held.tensor = contiguous_tensor(argument);
  held.matrix = {.data = held.tensor.data_ptr(),
                 .rows = rows,
                 .cols = cols,
                 .stride = rows <= 1 ? cols : held.tensor.stride(0),
                 .dtype = dtype_of(argument, what),
                 .device = device_of(argument)};
  return held;
}

inline MatrixRef matrix_ref(const Tensor& tensor, int64_t rows, int64_t cols, Dtype dtype) {
  return {.data = tensor.data_ptr(),
          .rows = rows,
          .cols = cols,
          .stride = cols,
          .dtype = dtype,
          .device = device_of(tensor)};
}

// A matrix of the context's memory as the tensor that owns it: no copy. Empty sizes: [rows, cols].
inline Tensor tensor_of(const Matrix& matrix, Ints sizes = {}) {
  if (sizes.empty()) sizes = {matrix.rows, matrix.cols};
  const ScalarType type = scalar_type(matrix.dtype);
  if (matrix.empty()) return empty_tensor(matrix.device, sizes, type);
  const auto* owner = std::get_deleter<TensorOwner>(matrix.storage);
  if (owner == nullptr || matrix.stride != matrix.cols) {
    throw std::logic_error("a result is not contiguous memory of torch");
  }
  const Tensor& whole = owner->tensor;
  if (whole.scalar_type() == type && std::ranges::equal(whole.sizes(), sizes)) return whole;
  const auto offset =
      static_cast<char*>(matrix.data) - static_cast<char*>(owner->tensor.data_ptr());
  Ints strides(sizes.size(), 1);
  for (size_t d = sizes.size(); d-- > 1;) strides[d - 1] = strides[d] * sizes[d];
  const auto shim_type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch__alloc_from_pool(owner->tensor.get(), offset, shim_type,
                                                            static_cast<int64_t>(sizes.size()),
                                                            sizes.data(), strides.data(), &handle));
  return Tensor(handle);
}

inline Tensor text_tensor(std::string_view text) {
  Tensor tensor = empty_tensor({}, {static_cast<int64_t>(text.size())}, ScalarType::Byte);
  std::copy(text.begin(), text.end(), static_cast<char*>(tensor.mutable_data_ptr()));
  return tensor;
}

inline Tensor host_numbers(const Ints& numbers) {
  Tensor result = empty_tensor({}, {static_cast<int64_t>(numbers.size())}, ScalarType::Long);
  std::copy(numbers.begin(), numbers.end(), static_cast<int64_t*>(result.mutable_data_ptr()));
  return result;
}

inline std::string text_of(const Tensor& tensor) {
  return {static_cast<const char*>(tensor.const_data_ptr()), static_cast<size_t>(tensor.numel())};
}

inline int32_t narrow(int64_t value) {
  check(value == static_cast<int32_t>(value), "got ", value, ", expected a number of 32 bits");
  return static_cast<int32_t>(value);
}

inline Int3 int3(IntSpan values, size_t first = 0) {
  check(values.size() >= first + 3, "got ", values.size(), " numbers, expected ", first + 3);
  return {narrow(values[first]), narrow(values[first + 1]), narrow(values[first + 2])};
}

// Size, stride, padding, dilation: twelve numbers.
inline Geometry geometry_of(IntSpan values, size_t first = 0) {
  return {.size = int3(values, first),
          .stride = int3(values, first + 3),
          .padding = int3(values, first + 6),
          .dilation = int3(values, first + 9)};
}

// What a pass must know beyond its tensors, as the numbers that cross the boundary:
//   n_in, operation, symmetric, is_transposed, geometry (12), precision, schedule (4), -2 if
//   measured times do not count, algorithms, and after a -1 the bytes of a kernel's name.
struct Layer {
  int64_t n_in = 0;
  Operation operation = Operation::submanifold;
  bool symmetric = false;
  bool is_transposed = false;
  Geometry geometry;
  Precision precision = Precision::ieee;
  ScheduleOptions schedule;
  Filter filter;
};

inline Filter filter_of(IntSpan values, size_t first) {
  Filter filter;
  auto begin = values.begin() + static_cast<int64_t>(std::min(first, values.size()));
  filter.measured = begin == values.end() || *begin != -2;
  if (!filter.measured) ++begin;
  const auto end_of_algorithms = std::find(begin, values.end(), -1);
  for (auto value = begin; value != end_of_algorithms; ++value) {
    filter.algorithms.push_back(static_cast<Algorithm>(*value));
  }
  if (end_of_algorithms != values.end()) {
    std::for_each(end_of_algorithms + 1, values.end(),
                  [&](int64_t byte) { filter.kernel.push_back(static_cast<char>(byte)); });
  }
  return filter;
}

// order, groups, tile_rows, chunk_rows: four numbers.
inline ScheduleOptions schedule_options_of(IntSpan values, size_t first) {
  check(values.size() >= first + 4, "got ", values.size(), " numbers, expected ", first + 4);
  return {.order = static_cast<ScheduleOptions::Order>(values[first]),
          .groups = static_cast<int>(values[first + 1]),
          .tile_rows = static_cast<int>(values[first + 2]),
          .chunk_rows = static_cast<int>(values[first + 3])};
}

constexpr size_t first_of_schedule = 17;
constexpr size_t first_of_filter = 21;

inline Layer layer_of(IntSpan values) {
  check(values.size() >= first_of_filter, "a layer has ", values.size(), " numbers, expected ",
        first_of_filter);
  return {.n_in = values[0],
          .operation = static_cast<Operation>(values[1]),
          .symmetric = values[2] != 0,
          .is_transposed = values[3] != 0,
          .geometry = geometry_of(values, 4),
          .precision = static_cast<Precision>(values[16]),
          .schedule = schedule_options_of(values, first_of_schedule),
          .filter = filter_of(values, first_of_filter)};
}

// A layer's numbers with another schedule, and a kernel's name as the filter.
inline Ints chosen(IntSpan layer, const ScheduleOptions& schedule, std::string_view kernel) {
  Ints numbers(layer.begin(), layer.begin() + first_of_schedule);
  numbers.insert(numbers.end(), {static_cast<int64_t>(schedule.order), schedule.groups,
                                 schedule.tile_rows, schedule.chunk_rows, -1});
  numbers.insert(numbers.end(), kernel.begin(), kernel.end());
  return numbers;
}

// Views of the tensors neighbours [taps, n_out], pairs_per_tap [taps], in_first and out_first [rows
// or 0] of a map; of the six of ScheduleParts.
using MapViews = std::array<MatrixRef, 4>;
using ScheduleViews = std::array<MatrixRef, 6>;

inline MapViews map_views(const Tensors& tensors) {
  MapViews views;
  check(tensors.size() >= views.size(), "a kernel map has ", tensors.size(), " tensors, expected ",
        views.size());
  for (size_t p = 0; p < views.size(); ++p) {
    const Tensor& tensor = tensors[p];
    const Dtype dtype = p == 1 ? Dtype::i64 : Dtype::i32;
    check(tensor.is_contiguous() && tensor.dim() == (p == 0 ? 2 : 1) &&
              tensor.scalar_type() == scalar_type(dtype),
          "tensor ", p, " of the kernel map has another dtype or layout than build_map gave it");
    views[p] = p == 0   ? matrix_ref(tensor, tensor.size(0), tensor.size(1), dtype)
               : p == 1 ? matrix_ref(tensor, 1, tensor.size(0), dtype)
                        : matrix_ref(tensor, tensor.size(0), 1, dtype);
  }
  return views;
}

// Of the tensors from `first` on.
inline ScheduleViews schedule_views(const Tensors& tensors, size_t first) {
  ScheduleViews views;
  check(tensors.size() == first + views.size(), "a schedule has ", tensors.size() - first,
        " tensors, expected ", views.size());
  for (size_t p = 0; p < views.size(); ++p) {
    const Tensor& tensor = tensors[first + p];
    check(tensor.is_contiguous() && tensor.dim() == 2, "tensor ", p,
          " of the schedule has another layout than _schedule gave it");
    views[p] = matrix_ref(tensor, tensor.size(0), tensor.size(1),
                          dtype_of(tensor, "a part of a schedule"));
  }
  return views;
}

inline KernelMap map_of(const MapViews& views, const Layer& layer) {
  KernelMap map;
  map.geometry = layer.geometry;
  map.n_in = layer.n_in;
  map.n_out = views[0].cols;
  map.symmetric = layer.symmetric;
  map.is_transposed = layer.is_transposed;
  check(views[0].rows == map.taps() && views[1].cols == map.taps(), "the kernel map has ",
        views[0].rows, " taps, its geometry ", map.taps());
  static_cast<MatrixRef&>(map.neighbours) = views[0];
  static_cast<MatrixRef&>(map.pairs_per_tap) = views[1];
  static_cast<MatrixRef&>(map.in_first) = views[2];
  static_cast<MatrixRef&>(map.out_first) = views[3];
  return map;
}

// Those that came with the map, if they are known.
inline void set_masks(const std::optional<Tensor>& masks, KernelMap* map) {
  if (!masks || masks->numel() == 0) return;
  check(masks->numel() == map->n_out && masks->is_contiguous() &&
            masks->scalar_type() == ScalarType::Int,
        "the masks of the kernel map are not those that build_map gave it");
  static_cast<MatrixRef&>(map->masks) = matrix_ref(*masks, map->n_out, 1, Dtype::i32);
}

inline Schedule schedule_of(const ScheduleViews& views,
                            const KernelMap& map,
                            const ScheduleOptions& options) {
  std::array<Matrix, std::tuple_size_v<ScheduleViews>> parts;
  for (size_t p = 0; p < parts.size(); ++p) static_cast<MatrixRef&>(parts[p]) = views[p];
  return Schedule::from_parts(map, options,
                              {.order = parts[0],
                               .chunk_tiles = parts[1],
                               .tiles = parts[2],
                               .masks = parts[3],
                               .block_taps = parts[4],
                               .indices = parts[5]});
}

// What an operator knows of a map: the layer on it, its transposition where that is given, and the
// schedule, where one came, of the one that is walked.
struct Maps {
  Layer layer;
  KernelMap map;
  std::optional<KernelMap> transposed;
  std::optional<Schedule> schedule;

  // Of lists: the tensors of a map and, behind them, those of its schedule or none; the transposed
  // map's likewise, or none; the layer's numbers. Or, where these last two are empty, of four int64
  // tensors of the host, which cost a call less: the layer's numbers, and the views of the map, of
  // the transposed one and of the schedule, empty where there is none.
  Maps(const Tensors& tensors, const Tensors& transposed_tensors, IntSpan numbers)
      : layer(layer_of(numbers.empty() ? numbers_in(tensors, 0) : numbers)),
        map(map_of(numbers.empty() ? views_in<MapViews>(tensors, 1) : map_views(tensors), layer)) {
    if (numbers.empty()) {
      if (!numbers_in(tensors, 2).empty()) transpose(views_in<MapViews>(tensors, 2));
      if (!numbers_in(tensors, 3).empty()) set_schedule(views_in<ScheduleViews>(tensors, 3));
      return;
    }
    if (!transposed_tensors.empty()) transpose(map_views(transposed_tensors));
    const Tensors& walked = transposed ? transposed_tensors : tensors;
    constexpr size_t of_map = std::tuple_size_v<MapViews>;
    if (walked.size() > of_map) set_schedule(schedule_views(walked, of_map));
  }
  const KernelMap* back() const { return transposed ? &*transposed : nullptr; }

 private:
  template <class Views>
  using Words = std::array<int64_t, sizeof(Views) / sizeof(int64_t)>;

  static IntSpan numbers_in(const Tensors& prepared, size_t place) {
    const size_t expected = 4;
    check(prepared.size() == expected, "a prepared map has ", prepared.size(),
          " tensors, expected ", expected);
    const Tensor& tensor = prepared[place];
    check(!tensor.is_cuda() && tensor.is_contiguous() && tensor.scalar_type() == ScalarType::Long,
          "tensor ", place, " of a prepared map is not int64 numbers of the host");
    return {static_cast<const int64_t*>(tensor.const_data_ptr()),
            static_cast<size_t>(tensor.numel())};
  }
  template <class Views>
  static Views views_in(const Tensors& prepared, size_t place) {
    const IntSpan numbers = numbers_in(prepared, place);
    Words<Views> words;
    check(numbers.size() == words.size(), "tensor ", place, " of a prepared map has ",
          numbers.size(), " numbers, expected ", words.size());
    std::copy(numbers.begin(), numbers.end(), words.begin());
    return std::bit_cast<Views>(words);
  }
  void transpose(const MapViews& views) {
    Layer flipped = layer;
    flipped.n_in = map.n_out;
    flipped.is_transposed = !layer.is_transposed;
    transposed = map_of(views, flipped);
  }
  void set_schedule(const ScheduleViews& views) {
    schedule = schedule_of(views, transposed ? *transposed : map, layer.schedule);
  }
};

// Views as numbers. They hold addresses: whoever keeps them keeps the tensors.
template <class Views>
Tensor views_tensor(const Views& views) {
  const auto words = std::bit_cast<std::array<int64_t, sizeof(Views) / sizeof(int64_t)>>(views);
  return host_numbers({words.begin(), words.end()});
}

// A tensor [c_out, Kx, Ky, Kz, c_in] as weights; the tensor is a copy where its taps are not evenly
// spaced or neither of its channel axes is contiguous.
struct HeldWeights {
  Tensor tensor;
  WeightsRef weights;
};

// The distance of two taps, 0 if they are not evenly spaced.
inline int64_t tap_stride(const Tensor& weight) {
  int64_t stride = 0;
  int64_t span = 1;
  for (const int axis : {3, 2, 1}) {
    if (weight.size(axis) == 1) continue;
    if (stride == 0) stride = weight.stride(axis);
    if (weight.stride(axis) != stride * span) return 0;
    span *= weight.size(axis);
  }
  return stride == 0 ? weight.size(4) : stride;
}

inline HeldWeights held_weights(const Tensor& argument, const Geometry& geometry) {
  check(argument.dim() == 5, "weight has ", argument.dim(),
        " dimensions, expected 5: [c_out, Kx, Ky, Kz, c_in]");
  const Int3& size = geometry.size;
  check(argument.size(1) == size[0] && argument.size(2) == size[1] && argument.size(3) == size[2],
        "weight has a ", argument.size(1), "x", argument.size(2), "x", argument.size(3),
        " kernel, the map a ", size[0], "x", size[1], "x", size[2], " one");
  check(argument.size(0) <= INT32_MAX && argument.size(4) <= INT32_MAX, "weight has ",
        argument.size(0), " x ", argument.size(4), " channels, expected at most ", INT32_MAX);
  HeldWeights held{argument, {}};
  const bool one_contiguous = argument.stride(4) == 1 || argument.stride(0) == 1;
  if (tap_stride(argument) == 0 || !one_contiguous) {
    held.tensor = contiguous_tensor(argument);
  }
  held.weights = {.data = held.tensor.data_ptr(),
                  .taps = geometry.taps(),
                  .c_in = static_cast<int>(argument.size(4)),
                  .c_out = static_cast<int>(argument.size(0)),
                  .tap_stride = tap_stride(held.tensor),
                  .in_stride = held.tensor.stride(4),
                  .out_stride = held.tensor.stride(0),
                  .dtype = dtype_of(argument, "weight"),
                  .device = device_of(argument)};
  return held;
}

}  // namespace voxgemm
