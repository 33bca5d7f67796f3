// Array arguments and results of the bindings: C-contiguous numpy arrays in host memory, never converted or copied on
// the way in.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>
#include <memory>
#include <utility>

namespace tersor::bindings {

template <typename T>
using Vector = nanobind::ndarray<const T, nanobind::ndim<1>, nanobind::c_contig, nanobind::device::cpu>;
template <typename T>
using Matrix = nanobind::ndarray<const T, nanobind::ndim<2>, nanobind::c_contig, nanobind::device::cpu>;
template <typename T>
using NewMatrix = nanobind::ndarray<nanobind::numpy, T, nanobind::ndim<2>>;

// A result under construction: memory that becomes a numpy array, which then owns it.
template <typename T>
struct Result {
  int64_t rows, columns;
  std::unique_ptr<T[]> data;

  Result(int64_t rows, int64_t columns)
      : rows(rows), columns(columns), data(new T[static_cast<size_t>(rows * columns)]) {}

  T* get() { return data.get(); }

  NewMatrix<T> array() && {
    T* raw = data.release();
    nanobind::capsule owner(raw, [](void* p) noexcept { delete[] static_cast<T*>(p); });
    return NewMatrix<T>(raw, {static_cast<size_t>(rows), static_cast<size_t>(columns)}, owner);
  }
};

// Raises ValueError unless the condition holds. For what the Python callers should have checked.
inline void require(bool condition, const char* text) {
  if (!condition) throw nanobind::value_error(text);
}

}  // namespace tersor::bindings
