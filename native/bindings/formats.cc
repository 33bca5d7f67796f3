// Encoding and decoding of ggml's blocks: checks shapes, calls native/formats.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <memory>
#include <optional>
#include <string>

#include "formats/ggml.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

template <typename T>
using Matrix = nb::ndarray<const T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Vector = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

template <typename T>
using Result = nb::ndarray<nb::numpy, T, nb::ndim<2>, nb::c_contig>;

// A new matrix that numpy owns.
template <typename T>
Result<T> new_matrix(size_t rows, size_t columns) {
  T* data = new T[rows * columns];
  nb::capsule owner(data, [](void* p) noexcept { delete[] static_cast<T*>(p); });
  return Result<T>(data, {rows, columns}, owner);
}

const tersor::GgmlType& checked_type(const std::string& name, int64_t columns) {
  const tersor::GgmlType* type = tersor::ggml_type(name);
  if (type == nullptr) throw nb::value_error(("unknown ggml type '" + name + "'").c_str());
  if (columns < 0 || columns % type->values != 0)
    throw nb::value_error(
        (name + ": " + std::to_string(columns) + " columns, not a multiple of " + std::to_string(type->values))
            .c_str());
  return *type;
}

Result<float> decode(const std::string& name, Matrix<uint8_t> blocks, int64_t columns) {
  const tersor::GgmlType& type = checked_type(name, columns);
  const int64_t row_bytes = columns / type.values * type.bytes;
  if (static_cast<int64_t>(blocks.shape(1)) != row_bytes)
    throw nb::value_error(
        (name + ": rows of " + std::to_string(blocks.shape(1)) + " bytes, need " + std::to_string(row_bytes)).c_str());
  Result<float> out = new_matrix<float>(blocks.shape(0), static_cast<size_t>(columns));
  {
    nb::gil_scoped_release release;
    tersor::ggml_decode(type, blocks.data(), out.data(), static_cast<int64_t>(blocks.shape(0)), columns);
  }
  return out;
}

Result<uint8_t> encode(const std::string& name, Matrix<float> w, std::optional<Vector> importance) {
  const int64_t columns = static_cast<int64_t>(w.shape(1));
  const tersor::GgmlType& type = checked_type(name, columns);
  if (type.search == tersor::SearchType::kNone) throw nb::value_error((name + ": can only be decoded").c_str());
  if (importance && importance->shape(0) != w.shape(1))
    throw nb::value_error((name + ": " + std::to_string(importance->shape(0)) + " importances for " +
                           std::to_string(columns) + " columns")
                              .c_str());
  Result<uint8_t> out = new_matrix<uint8_t>(w.shape(0), static_cast<size_t>(columns / type.values * type.bytes));
  {
    nb::gil_scoped_release release;
    tersor::ggml_encode(type, w.data(), importance ? importance->data() : nullptr, out.data(),
                        static_cast<int64_t>(w.shape(0)), columns);
  }
  return out;
}

}  // namespace

void bind_formats(nb::module_& m) {
  m.def("ggml_decode", &decode, "name"_a, "blocks"_a, "columns"_a,
        "Returns float32 (rows, columns) of ggml blocks, uint8 (rows, row_bytes), of the type with this name.");
  m.def("ggml_encode", &encode, "name"_a, "w"_a, "importance"_a.none(),
        "Returns ggml blocks, uint8 (rows, row_bytes), of w float32 (rows, columns); importance: float32 (columns,) >= "
        "0, or None.");
}
