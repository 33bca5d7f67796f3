// Whole arrays of floats, and encoding and decoding of ggml's blocks: checks shapes, calls native/formats.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>

#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "formats/floats.h"
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

// A new array of the same length, each value converted.
template <typename From, typename To, void convert(const From*, int64_t, To*)>
nb::ndarray<nb::numpy, To, nb::ndim<1>, nb::c_contig> converted(
    nb::ndarray<const From, nb::ndim<1>, nb::c_contig, nb::device::cpu> values) {
  To* data = new To[values.shape(0)];
  nb::capsule owner(data, [](void* p) noexcept { delete[] static_cast<To*>(p); });
  {
    nb::gil_scoped_release release;
    convert(values.data(), static_cast<int64_t>(values.shape(0)), data);
  }
  return nb::ndarray<nb::numpy, To, nb::ndim<1>, nb::c_contig>(data, {values.shape(0)}, owner);
}

float largest_magnitude(Vector w) {
  nb::gil_scoped_release release;
  return tersor::largest_magnitude(w.data(), static_cast<int64_t>(w.shape(0)));
}

std::pair<double, double> square_sums(Vector w, Vector decoded) {
  if (w.shape(0) != decoded.shape(0))
    throw nb::value_error(("square_sums: " + std::to_string(decoded.shape(0)) + " decoded values for " +
                           std::to_string(w.shape(0)) + " weights")
                              .c_str());
  nb::gil_scoped_release release;
  const tersor::SquareSums sums = tersor::square_sums(w.data(), decoded.data(), static_cast<int64_t>(w.shape(0)));
  return {sums.w, sums.error};
}

}  // namespace

void bind_formats(nb::module_& m) {
  m.def("widen_f16", &converted<uint16_t, float, tersor::widen_f16>, "values"_a,
        "Returns float32 (n,) of float16 bits, uint16 (n,); a NaN keeps its payload.");
  m.def("widen_bf16", &converted<uint16_t, float, tersor::widen_bf16>, "values"_a,
        "Returns float32 (n,) of bfloat16 bits, uint16 (n,).");
  m.def("narrow_f16", &converted<float, uint16_t, tersor::narrow_f16>, "w"_a,
        "Returns float16 bits, uint16 (n,), nearest to float32 (n,), ties to even.");
  m.def("largest_magnitude", &largest_magnitude, "w"_a,
        "Returns the largest |w| of float32 (n,): 0 of nothing, NaN when there is one.");
  m.def("square_sums", &square_sums, "w"_a, "decoded"_a,
        "Returns the sums of w^2 and of (decoded - w)^2; float32 (n,) both, summed in float32 256 by 256, then in "
        "float64.");
  m.def("ggml_decode", &decode, "name"_a, "blocks"_a, "columns"_a,
        "Returns float32 (rows, columns) of ggml blocks, uint8 (rows, row_bytes), of the type with this name.");
  m.def("ggml_encode", &encode, "name"_a, "w"_a, "importance"_a.none(),
        "Returns ggml blocks, uint8 (rows, row_bytes), of w float32 (rows, columns); importance: float32 (columns,) >= "
        "0, or None.");
}
