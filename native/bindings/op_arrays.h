// Array arguments of the ops, and their checks. Errors say which argument, what was got and what is needed.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>
#include <string>

#include "kernels/elementwise/elementwise.h"

namespace tersor::ops_bindings {

namespace nb = nanobind;

template <typename T, int kDimensions>
using Array = nb::ndarray<T, nb::ndim<kDimensions>, nb::c_contig, nb::device::cpu>;

template <typename T>
using AnyArray = nb::ndarray<T, nb::c_contig, nb::device::cpu>;  // of any number of axes

inline std::string text_of(const char* piece) { return piece; }
inline std::string text_of(const std::string& piece) { return piece; }
inline std::string text_of(int64_t piece) { return std::to_string(piece); }

// Raises ValueError with the pieces joined, unless the condition holds. Texts are only made then: calls are frequent.
template <typename... Pieces>
inline void require(bool condition, const Pieces&... pieces) {
  if (condition) return;
  const std::string text = (text_of(pieces) + ...);
  throw nb::value_error(text.c_str());
}

template <typename Op, typename What>
inline void require_size(const Op& op, const What& what, int64_t got, int64_t need) {
  require(got == need, op, ": ", what, ": got ", got, ", need ", need);
}

inline elementwise::Activation activation_of(const char* op, const std::string& name) {
  require(name == "silu" || name == "gelu_tanh", op, ": activation '", name, "', need silu or gelu_tanh");
  return name == "silu" ? elementwise::kSilu : elementwise::kGeluTanh;
}

}  // namespace tersor::ops_bindings
