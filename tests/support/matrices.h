// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "core/dispatch.h"
#include "voxgemm/types.h"

namespace voxgemm::test {

// Rounded once to a float dtype.
inline double rounded(double value, Dtype dtype) {
  return dispatch_float(dtype, [&]<class T>(Type<T>) -> double {
    T result;
    store(value, result);
    return to_float(result);
  });
}

// Places of the elements of a [planes, rows, cols] array.
struct Strides {
  int64_t planes = 1;
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t plane_stride = 0;
  int64_t row_stride = 0;
  int64_t col_stride = 1;
  int64_t size() const { return planes * rows * cols; }
};

// Float elements in exactly this much memory, all bits set (a NaN) until written, and not aligned
// to more than one element: a read of what was not written spreads, a write beside the elements
// shows, and the address sanitizer sees any access past the end.
class Elements {
 public:
  Elements(int64_t count, Dtype dtype)
      : dtype_(dtype),
        bytes_((count + 1) * size_of(dtype)),
        memory_(static_cast<char*>(::operator new (bytes_, std::align_val_t{64}))) {
    std::memset(memory_.get(), 0xff, bytes_);
  }

  void* data() const { return memory_.get() + size_of(dtype_); }

  void write(const Strides& strides, const std::vector<double>& values) {
    dispatch_float(dtype_, [&]<class T>(Type<T>) {
      visit(strides,
            [&](int64_t i, int64_t place) { store(values[i], static_cast<T*>(data())[place]); });
    });
  }
  std::vector<double> read(const Strides& strides) const {
    std::vector<double> values(strides.size());
    dispatch_float(dtype_, [&]<class T>(Type<T>) {
      visit(strides, [&](int64_t i, int64_t place) {
        values[i] = to_float(static_cast<const T*>(data())[place]);
      });
    });
    return values;
  }

  // How many elements differ from those never written.
  int64_t written() const {
    const size_t size = size_of(dtype_);
    int64_t count = 0;
    for (size_t at = 0; at < bytes_; at += size) {
      uint64_t bits = ~uint64_t{0};
      std::memcpy(&bits, memory_.get() + at, size);
      count += bits != ~uint64_t{0};
    }
    return count;
  }
  std::vector<char> bytes() const { return {memory_.get(), memory_.get() + bytes_}; }

 private:
  struct Free {
    void operator()(char* data) const { ::operator delete (data, std::align_val_t{64}); }
  };

  template <class Body>
  static void visit(const Strides& s, Body body) {
    int64_t i = 0;
    for (int64_t plane = 0; plane < s.planes; ++plane) {
      for (int64_t row = 0; row < s.rows; ++row) {
        for (int64_t col = 0; col < s.cols; ++col) {
          body(i++, plane * s.plane_stride + row * s.row_stride + col * s.col_stride);
        }
      }
    }
  }

  Dtype dtype_;
  size_t bytes_;
  std::unique_ptr<char, Free> memory_;
};

struct Extent {
  int64_t rows;
  int64_t cols;
  int64_t gap = 0;  // elements between rows; as many after the last one
};

// A float matrix in its own memory.
class Buffer {
 public:
  Buffer(const Extent& extent, Dtype dtype)
      : elements_(extent.rows * (extent.cols + extent.gap), dtype),
        ref_{.data = elements_.data(),
             .rows = extent.rows,
             .cols = extent.cols,
             .stride = extent.cols + extent.gap,
             .dtype = dtype} {}
  Buffer(const Extent& extent, Dtype dtype, const std::vector<double>& values)
      : Buffer(extent, dtype) {
    elements_.write(strides(), values);
  }

  const MatrixRef& ref() const { return ref_; }
  const Elements& elements() const { return elements_; }
  std::vector<double> values() const { return elements_.read(strides()); }

 private:
  Strides strides() const {
    return {.rows = ref_.rows, .cols = ref_.cols, .row_stride = ref_.stride};
  }

  Elements elements_;
  MatrixRef ref_;
};

// Where the weights of a convolution stand in memory.
enum class Layout {
  out_tap_in,  // [c_out, taps, c_in]
  tap_in_out,  // [taps, c_in, c_out]
  slice,       // every other column of [taps, c_in, 2 * c_out], so no side is contiguous
};
constexpr Layout layouts[] = {Layout::out_tap_in, Layout::tap_in_out, Layout::slice};

struct WeightShape {
  int taps;
  int c_in;
  int c_out;
  int64_t size() const { return static_cast<int64_t>(taps) * c_in * c_out; }
};

// Weights in their own memory. As values they are [taps, c_in, c_out].
class Weights {
 public:
  Weights(const WeightShape& shape, Dtype dtype, Layout layout)
      : elements_(shape.size() * (layout == Layout::slice ? 2 : 1), dtype),
        ref_{.data = elements_.data(),
             .taps = shape.taps,
             .c_in = shape.c_in,
             .c_out = shape.c_out,
             .dtype = dtype} {
    const int64_t c_in = shape.c_in;
    const int64_t c_out = shape.c_out;
    if (layout == Layout::out_tap_in) {
      ref_.tap_stride = c_in;
      ref_.in_stride = 1;
      ref_.out_stride = shape.taps * c_in;
    } else {
      ref_.out_stride = layout == Layout::slice ? 2 : 1;
      ref_.in_stride = c_out * ref_.out_stride;
      ref_.tap_stride = c_in * ref_.in_stride;
    }
  }
  Weights(const WeightShape& shape, Dtype dtype, Layout layout, const std::vector<double>& values)
      : Weights(shape, dtype, layout) {
    elements_.write(strides(), values);
  }

  const WeightsRef& ref() const { return ref_; }
  const Elements& elements() const { return elements_; }
  std::vector<double> values() const { return elements_.read(strides()); }

 private:
  Strides strides() const {
    return {.planes = ref_.taps,
            .rows = ref_.c_in,
            .cols = ref_.c_out,
            .plane_stride = ref_.tap_stride,
            .row_stride = ref_.in_stride,
            .col_stride = ref_.out_stride};
  }

  Elements elements_;
  WeightsRef ref_;
};

}  // namespace voxgemm::test
