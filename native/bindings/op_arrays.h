// Array arguments of the ops, and their checks. Errors say which argument, what was got and what is needed.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>
#include <string>

namespace tersor::ops_bindings {

namespace nb = nanobind;

template <typename T, int kDimensions>
using Array = nb::ndarray<T, nb::ndim<kDimensions>, nb::c_contig, nb::device::cpu>;

inline void require(bool good, const std::string& text) {
  if (!good) throw nb::value_error(text.c_str());
}

inline void require_size(const char* what, int64_t got, int64_t need) {
  if (got != need) require(false, std::string(what) + ": got " + std::to_string(got) + ", need " + std::to_string(need));
}

}  // namespace tersor::ops_bindings
