// Bit packing, affine integers and lookup tables.
#include "formats/affine.h"

#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <string>
#include <tuple>

#include "base/threads.h"
#include "bindings/arrays.h"
#include "formats/affine_bits.h"
#include "formats/lookup.h"

namespace nb = nanobind;

namespace tersor::bindings {
namespace {

constexpr int64_t kGrain = 1 << 14;  // values worth handing to a thread

int64_t rows_per_part(int64_t columns) { return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, columns)); }

NewMatrix<uint8_t> pack_bits(const Matrix<uint8_t>& codes, int bits) {
  require(bits >= 1 && bits <= 8, "pack_bits: bits must be 1 to 8");
  const int64_t rows = codes.shape(0), n = codes.shape(1), row_bytes = packed_bytes(n, bits);
  Result<uint8_t> packed(rows, row_bytes);
  {
    nb::gil_scoped_release release;
    parallel_for(rows, rows_per_part(n), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; row++)
        pack_row(codes.data() + row * n, n, bits, packed.get() + row * row_bytes);
    });
  }
  return std::move(packed).array();
}

NewMatrix<uint8_t> unpack_bits(const Matrix<uint8_t>& packed, int bits, int64_t n) {
  require(bits >= 1 && bits <= 8, "unpack_bits: bits must be 1 to 8");
  require(n >= 0 && packed_bytes(n, bits) == static_cast<int64_t>(packed.shape(1)),
          "unpack_bits: rows must have ceil(n * bits / 8) bytes");
  const int64_t rows = packed.shape(0), row_bytes = packed.shape(1);
  Result<uint8_t> codes(rows, n);
  {
    nb::gil_scoped_release release;
    parallel_for(rows, rows_per_part(n), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; row++)
        unpack_row(packed.data() + row * row_bytes, n, bits, codes.get() + row * n);
    });
  }
  return std::move(codes).array();
}

AffineKind kind_of(const std::string& name) {
  if (name == "asymmetric") return AffineKind::kAsymmetric;
  if (name == "symmetric") return AffineKind::kSymmetric;
  require(name == "minimum", "affine_fit: kind must be asymmetric, symmetric or minimum");
  return AffineKind::kMinimum;
}

// group: columns that share a grid; 0: the whole tensor does.
std::tuple<NewMatrix<float>, NewMatrix<float>> affine_fit(const Matrix<float>& w, int64_t group,
                                                          const std::string& kind_name, int max_code,
                                                          const std::optional<Vector<float>>& importance, bool search,
                                                          bool single) {
  const int64_t rows = w.shape(0), columns = w.shape(1);
  const AffineKind kind = kind_of(kind_name);
  require(rows > 0 && columns > 0 && group >= 0 && (group == 0 || columns % group == 0),
          "affine_fit: group must divide the columns");
  require(max_code >= 1 && max_code <= 255, "affine_fit: max_code must be 1 to 255");
  require(!importance || static_cast<int64_t>(importance->shape(0)) == columns,
          "affine_fit: importance must have one value per column");
  const bool whole = group == 0;
  const int64_t n = whole ? columns : group, segments = whole ? rows : 1;
  const int64_t groups_in_row = columns / n, out_rows = whole ? 1 : rows;
  Result<float> scale(out_rows, groups_in_row), offset(out_rows, groups_in_row);
  {
    nb::gil_scoped_release release;
    parallel_for(out_rows * groups_in_row, rows_per_part(n), [&](int64_t begin, int64_t end) {
      for (int64_t g = begin; g < end; g++) {
        const float* h = importance ? importance->data() + g % groups_in_row * n : nullptr;
        const AffineGroup members{w.data() + g * n, h, segments, n, single};
        const AffineGrid grid = affine_fit(members, kind, max_code, search);
        scale.get()[g] = grid.scale;
        offset.get()[g] = grid.offset;
      }
    });
  }
  return {std::move(scale).array(), std::move(offset).array()};
}

// (1, 1) stands for every group of every row.
AffineParams params_of(const Matrix<float>& values, int64_t rows, int64_t groups) {
  const int64_t r = values.shape(0), g = values.shape(1);
  if (r == 1 && g == 1) return {values.data(), 0, 0};
  require(r == rows && g == groups, "affine: scale and offset must be (rows, groups) or (1, 1)");
  return {values.data(), groups, 1};
}

AffineMatrix matrix_of(int64_t rows, int64_t columns, int64_t groups, const Matrix<float>& scale,
                       const Matrix<float>& offset, bool minimum, int bits, int max_code) {
  require(groups >= 1 && columns % groups == 0, "affine: groups must divide the columns");
  require(bits >= 1 && bits <= 8 && max_code >= 1 && max_code < (1 << bits),
          "affine: bits must be 1 to 8, max_code below 2^bits");
  return {
      rows, columns, groups, minimum, bits, max_code, params_of(scale, rows, groups), params_of(offset, rows, groups)};
}

NewMatrix<uint8_t> encode(const Matrix<float>& w, const Matrix<float>& scale, const Matrix<float>& offset,
                          int64_t groups, bool minimum, int bits, int max_code) {
  const int64_t rows = w.shape(0), columns = w.shape(1);
  const AffineMatrix m = matrix_of(rows, columns, groups, scale, offset, minimum, bits, max_code);
  Result<uint8_t> packed(rows, packed_bytes(columns, bits));
  {
    nb::gil_scoped_release release;
    affine_encode(m, w.data(), packed.get());
  }
  return std::move(packed).array();
}

NewMatrix<float> decode(const Matrix<uint8_t>& packed, const Matrix<float>& scale, const Matrix<float>& offset,
                        int64_t columns, int64_t groups, bool minimum, int bits) {
  const int64_t rows = packed.shape(0);
  const AffineMatrix m = matrix_of(rows, columns, groups, scale, offset, minimum, bits, (1 << bits) - 1);
  require(packed_bytes(columns, bits) == static_cast<int64_t>(packed.shape(1)),
          "affine_decode: rows must have ceil(columns * bits / 8) bytes");
  Result<float> w(rows, columns);
  {
    nb::gil_scoped_release release;
    affine_decode(m, packed.data(), w.get());
  }
  return std::move(w).array();
}

NewMatrix<uint8_t> encode_lookup(const Matrix<float>& w, const Matrix<float>& absmax, const Vector<float>& bounds,
                                 const Vector<uint8_t>& code_of_level) {
  const int64_t rows = w.shape(0), columns = w.shape(1), blocks = absmax.shape(1);
  require(static_cast<int64_t>(absmax.shape(0)) == rows && blocks > 0 && columns % (2 * blocks) == 0,
          "lookup_encode: absmax must be (rows, blocks)");
  require(bounds.shape(0) <= 15 && code_of_level.shape(0) == bounds.shape(0) + 1,
          "lookup_encode: at most 15 bounds, one code more");
  LookupEncoder encoder = {};
  std::fill(std::begin(encoder.bounds), std::end(encoder.bounds), std::numeric_limits<float>::infinity());
  std::copy_n(bounds.data(), bounds.shape(0), encoder.bounds);
  std::copy_n(code_of_level.data(), code_of_level.shape(0), encoder.code_of_level);
  Result<uint8_t> codes(rows, columns / 2);
  {
    nb::gil_scoped_release release;
    lookup_encode(w.data(), rows * blocks, columns / blocks, absmax.data(), encoder, codes.get());
  }
  return std::move(codes).array();
}

NewMatrix<float> decode_lookup(const Matrix<uint8_t>& codes, const Matrix<float>& absmax, const Vector<float>& table) {
  const int64_t rows = codes.shape(0), columns = 2 * codes.shape(1), blocks = absmax.shape(1);
  require(static_cast<int64_t>(absmax.shape(0)) == rows && blocks > 0 && columns % (2 * blocks) == 0,
          "lookup_decode: absmax must be (rows, blocks)");
  require(table.shape(0) == 16, "lookup_decode: a table has 16 values");
  Result<float> w(rows, columns);
  {
    nb::gil_scoped_release release;
    lookup_decode(codes.data(), rows * blocks, columns / blocks, absmax.data(), table.data(), w.get());
  }
  return std::move(w).array();
}

}  // namespace
}  // namespace tersor::bindings

void bind_affine(nb::module_& m) {
  namespace b = tersor::bindings;
  m.def("pack_bits", &b::pack_bits, nb::arg("codes"), nb::arg("bits"),
        "Codes (rows, n) uint8 as dense LSB-first bit streams, one per row.");
  m.def("unpack_bits", &b::unpack_bits, nb::arg("packed"), nb::arg("bits"), nb::arg("n"),
        "The codes (rows, n) uint8 of pack_bits.");
  m.def("affine_fit", &b::affine_fit, nb::arg("w"), nb::arg("group"), nb::arg("kind"), nb::arg("max_code"),
        nb::arg("importance").none(), nb::arg("search"), nb::arg("single"),
        "(scale, offset), float32 (rows, groups), of the min-max grids, or with search of the clipped grids of least "
        "error.");
  m.def("affine_encode", &b::encode, nb::arg("w"), nb::arg("scale"), nb::arg("offset"), nb::arg("groups"),
        nb::arg("minimum"), nb::arg("bits"), nb::arg("max_code"), "Packed codes of w on the given grids.");
  m.def("affine_decode", &b::decode, nb::arg("packed"), nb::arg("scale"), nb::arg("offset"), nb::arg("columns"),
        nb::arg("groups"), nb::arg("minimum"), nb::arg("bits"), "float32 values of packed codes.");
  m.def("lookup_encode", &b::encode_lookup, nb::arg("w"), nb::arg("absmax"), nb::arg("bounds"),
        nb::arg("code_of_level"),
        "Two codes a byte, the first in the high nibble, of w / absmax among the levels that the bounds separate.");
  m.def("lookup_decode", &b::decode_lookup, nb::arg("codes"), nb::arg("absmax"), nb::arg("table"),
        "table[code] * absmax, float32.");
}
