// Packing of weights, matrix products and embedding lookups.
#include "kernels/linear/linear.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <cstring>
#include <limits>
#include <memory>
#include <optional>
#include <vector>

#include "base/bandwidth.h"
#include "base/float16.h"
#include "base/threads.h"
#include "bindings/embedding.h"
#include "bindings/op_arrays.h"
#include "kernels/linear/pack.h"

namespace nb = nanobind;
using namespace tersor;
using namespace tersor::ops_bindings;
using linear::Field;
using linear::Scheme;
using linear::Weight;

namespace {

using Bytes = nb::ndarray<const uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

int find_float(const std::string& format) {
  if (format == "f32") return kF32;
  if (format == "f16") return kF16;
  if (format == "bf16") return kBF16;
  return format == "fp8_c" || format == "fp8_t" ? kE4M3 : -1;
}

std::vector<Field> float_fields(Float type, int64_t columns, bool shared_scale) {
  if (type == kE4M3) return {{"codes", columns}, {"scale", 4, shared_scale}};
  return {{"values", columns * float_bytes(type)}};
}

// A stored tensor as Python hands it over: (format, rows, columns, {field: uint8 (rows, bytes of a row)}).
struct Stored {
  std::string format;
  int64_t rows, columns;
  std::optional<Scheme> scheme;  // of integer formats
  int floating;                  // of float formats, else -1
  bool shared_scale;             // of E4M3
  std::vector<Bytes> owners;
  std::vector<const uint8_t*> fields;
};

Stored read_stored(const std::string& format, int64_t rows, int64_t columns, nb::dict arrays) {
  Stored t{format, rows, columns, linear::find_scheme(format, columns), find_float(format), format == "fp8_t", {}, {}};
  require(t.scheme || t.floating >= 0, format, ": no native kernel for ", columns, " columns");
  const std::vector<Field> need =
      t.scheme ? t.scheme->fields : float_fields(Float(t.floating), columns, t.shared_scale);
  for (const Field& field : need) {
    require(arrays.contains(field.name.c_str()), format, ": field '", field.name, "' is missing");
    t.owners.push_back(nb::cast<Bytes>(arrays[field.name.c_str()]));
    const Bytes& bytes = t.owners.back();
    require_size(format, "rows of " + field.name, int64_t(bytes.shape(0)), field.shared ? 1 : rows);
    require_size(format, "bytes of a row of " + field.name, int64_t(bytes.shape(1)), field.row_bytes);
    t.fields.push_back(bytes.data());
  }
  return t;
}

linear::Rounding rounding_of(const std::string& name, float value) {
  if (name == "groups") return {linear::kGroups, 0};
  if (name == "token") return {linear::kToken, 0};
  require(name == "tensor" || name == "outlier", "pack: rounding '", name, "', need groups, token, tensor or outlier");
  require(value > 0 && value < std::numeric_limits<float>::infinity(),
          "pack: ", name == "tensor" ? "scale" : "threshold", " ", value, ", need a positive number");
  return {name == "tensor" ? linear::kTensor : linear::kOutlier, value};
}

// Checks that order names every column once, and keeps it.
void set_order(Weight& weight, const Array<const int32_t, 1>& order) {
  require_size("pack", "order", int64_t(order.shape(0)), weight.columns);
  weight.order.assign(order.data(), order.data() + order.shape(0));
  std::vector<bool> seen(weight.columns);
  for (const int32_t column : weight.order) {
    require(column >= 0 && column < weight.columns && !seen[column], "pack: order is no permutation of the columns");
    seen[column] = true;
  }
}

std::vector<Stored> read_list(nb::list tensors) {
  std::vector<Stored> stored;
  for (nb::handle h : tensors) {
    auto t = nb::cast<nb::tuple>(h);
    stored.push_back(read_stored(nb::cast<std::string>(t[0]), nb::cast<int64_t>(t[1]), nb::cast<int64_t>(t[2]),
                                 nb::cast<nb::dict>(t[3])));
  }
  return stored;
}

// Checks that the tensors are columns of the weight's rows in one float format, and adds them.
void set_apart(Weight& weight, const std::vector<Stored>& apart, bool has_order) {
  const int64_t columns = apart[0].columns;
  require(has_order && columns > 0, "pack: ", columns, " columns apart; they need an order, and to be at least one");
  std::vector<linear::Source> sources;
  int64_t rows = 0;
  for (const Stored& t : apart) {
    require(t.floating >= 0 && t.format == apart[0].format, "pack: columns apart are ", t.format, " and ",
            apart[0].format, ", need one float format");
    require_size("pack", "columns apart", t.columns, columns);
    sources.push_back({t.fields, t.rows});
    rows += t.rows;
  }
  require_size("pack", "rows of columns apart", rows, weight.rows);
  weight.columns += columns;
  weight.apart.push_back(linear::pack_floats(Float(apart[0].floating), sources, columns));
}

Weight* pack(nb::list tensors, nb::object bias, const std::string& rounding, float value, nb::object order,
             nb::list apart_tensors) {
  const std::vector<Stored> stored = read_list(tensors), apart = read_list(apart_tensors);
  require(!stored.empty(), "pack: no tensors");
  auto weight = std::make_unique<Weight>();
  weight->rounding = rounding_of(rounding, value);
  weight->columns = stored[0].columns;
  for (const Stored& t : stored) {
    require_size("pack", "columns", t.columns, weight->columns);
    require(t.columns > 0, "pack: a tensor without columns");
    weight->rows += t.rows;
  }
  if (!apart.empty()) set_apart(*weight, apart, !order.is_none());
  if (!order.is_none()) set_order(*weight, nb::cast<Array<const int32_t, 1>>(order));
  std::vector<float> all_bias;
  if (!bias.is_none()) {
    auto values = nb::cast<Array<const float, 1>>(bias);
    require_size("pack", "bias", int64_t(values.shape(0)), weight->rows);
    all_bias.assign(values.data(), values.data() + weight->rows);
  }
  nb::gil_scoped_release release;
  int64_t row = 0;
  for (size_t i = 0; i < stored.size();) {  // neighbours of one format become one part
    std::vector<linear::Source> sources;
    const Stored& first = stored[i];
    for (; i < stored.size() && stored[i].format == first.format; ++i)
      sources.push_back({stored[i].fields, stored[i].rows});
    weight->parts.push_back(
        first.scheme ? linear::pack_integers(*first.scheme, sources, first.columns)
                     : linear::pack_floats(Float(first.floating), sources, first.columns, first.shared_scale));
    linear::Part& part = weight->parts.back();
    if (!all_bias.empty()) {
      part.bias.assign(part.panel_count() * linear::kPanelRows, 0.0f);
      memcpy(part.bias.data(), all_bias.data() + row, part.rows * sizeof(float));
    }
    row += part.rows;
  }
  return weight.release();
}

void multiply(Array<const float, 2> x, const Weight& weight, Array<float, 2> y,
              std::optional<Array<const float, 2>> residual) {
  const auto n = int64_t(x.shape(0));
  require_size("linear", "columns of x", int64_t(x.shape(1)), weight.columns);
  require_size("linear", "rows of y", int64_t(y.shape(0)), n);
  require_size("linear", "columns of y", int64_t(y.shape(1)), weight.rows);
  if (residual) {
    require_size("linear", "rows of residual", int64_t(residual->shape(0)), n);
    require_size("linear", "columns of residual", int64_t(residual->shape(1)), weight.rows);
  }
  nb::gil_scoped_release release;
  linear::multiply(x.data(), n, weight, residual ? residual->data() : nullptr, y.data());
}

void multiply_gated(Array<const float, 2> x, const Weight& weight, const std::string& activation, Array<float, 2> y) {
  const auto n = int64_t(x.shape(0));
  const elementwise::Activation kind = activation_of("gated_linear", activation);
  require_size("gated_linear", "columns of x", int64_t(x.shape(1)), weight.columns);
  require_size("gated_linear", "rows of y", int64_t(y.shape(0)), n);
  require_size("gated_linear", "rows of the weight", weight.rows, 2 * int64_t(y.shape(1)));
  nb::gil_scoped_release release;
  linear::multiply_gated(x.data(), n, weight, kind, y.data());
}

Stored read_embedding(const std::string& format, int64_t rows, int64_t columns, nb::dict arrays) {
  Stored t = read_stored(format, rows, columns, arrays);
  require(t.floating != kE4M3, format, ": no native embedding");
  return t;
}

void float_row(int type, const uint8_t* bytes, int64_t columns, float* out) {
  if (type == kF32) {
    memcpy(out, bytes, columns * 4);
    return;
  }
  for (int64_t i = 0; i < columns; ++i) {
    uint16_t h;
    memcpy(&h, bytes + 2 * i, 2);
    out[i] = type == kF16 ? f16_to_f32(h) : bf16_to_f32(h);
  }
}

// Decodes the rows that the tokens name.
void decode_rows(const Stored& t, const int32_t* tokens, int64_t n, float scale, float* out) {
  parallel_for(n, 16, [&](int64_t begin, int64_t end) {
    linear::RowBuffer buffer;
    std::vector<const uint8_t*> at(t.fields.size());
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = tokens[i], columns = t.columns;
      float* values = out + i * columns;
      if (t.scheme) {
        for (size_t f = 0; f < at.size(); ++f)
          at[f] = t.fields[f] + (t.scheme->fields[f].shared ? 0 : row * t.scheme->fields[f].row_bytes);
        linear::decode_row(*t.scheme, at.data(), columns, buffer, values);
      } else {
        float_row(t.floating, t.fields[0] + row * columns * float_bytes(Float(t.floating)), columns, values);
      }
      if (scale != 1.0f) {
        for (int64_t k = 0; k < columns; ++k) values[k] *= scale;
      }
    }
  });
}

void embed(const std::string& format, int64_t rows, int64_t columns, nb::dict arrays, Array<const int32_t, 1> tokens,
           float scale, Array<float, 2> out) {
  const Stored t = read_embedding(format, rows, columns, arrays);
  const auto n = int64_t(tokens.shape(0));
  require_size("embed", "rows of out", int64_t(out.shape(0)), n);
  require_size("embed", "columns of out", int64_t(out.shape(1)), columns);
  require_tokens("embed", tokens.data(), n, rows);
  nb::gil_scoped_release release;
  decode_rows(t, tokens.data(), n, scale, out.data());
}

}  // namespace

ops_bindings::Embed ops_bindings::embedding(const std::string& format, int64_t rows, int64_t columns, nb::dict arrays,
                                            float scale) {
  return [t = read_embedding(format, rows, columns, arrays), scale](const int32_t* tokens, int64_t n, float* out) {
    decode_rows(t, tokens, n, scale, out);
  };
}

namespace {

uint64_t read_words_of(const Weight& weight) {
  nb::gil_scoped_release release;
  uint64_t sum = 0;
  for (const auto* parts : {&weight.parts, &weight.apart}) {
    for (const linear::Part& part : *parts)
      sum += read_words(reinterpret_cast<const uint64_t*>(part.panels.data()), part.panels.size() / 8);
  }
  return sum;
}

}  // namespace

void bind_linear(nb::module_& m) {
  nb::class_<Weight>(m, "Weight", "Matrices joined along rows, repacked for this CPU. Made by pack.")
      .def_ro("rows", &Weight::rows, "Outputs of linear.")
      .def_ro("columns", &Weight::columns, "Inputs of linear.")
      .def_prop_ro("nbytes", &Weight::nbytes, "Bytes held.")
      .def("read_words", &read_words_of,
           "Reads the packed panels once, in whole 8-byte words, and does nothing else: the floor of linear.")
      .def_prop_ro("kernel", &Weight::kernel,
                   "What multiplies: ISA, then code x group and second parameter of every different part.");
  m.def(
      "has_scheme",
      [](const std::string& format, int64_t columns) {
        return find_float(format) >= 0 || linear::find_scheme(format, columns).has_value();
      },
      nb::arg("format"), nb::arg("columns"),
      "Whether pack reads this format for rows of this many columns, and embed, but for fp8.");
  m.def("pack", &pack, nb::arg("tensors"), nb::arg("bias").none(), nb::arg("rounding") = "groups",
        nb::arg("value") = 0.0f, nb::arg("order") = nb::none(), nb::arg("apart") = nb::list(),
        nb::rv_policy::take_ownership,
        "tensors: list of (format, rows, columns, {field: uint8 (rows, bytes of a row)}) -> Weight\n\n"
        "rounding of the input: groups, token, tensor (value: its scale) or outlier (value: the threshold); see "
        "tersor.ops.pack.\norder: int32 (columns,), the input that each column multiplies, None = its own."
        "\napart: like tensors, all rows in one float format: the columns after theirs, multiplied by x as it is.");
  m.def("linear", &multiply, nb::arg("x"), nb::arg("weight"), nb::arg("y"), nb::arg("residual").none(),
        "y = x W^T + bias + residual");
  m.def("gated_linear", &multiply_gated, nb::arg("x"), nb::arg("weight"), nb::arg("activation"), nb::arg("y"),
        "y = act(first half of x W^T + bias) * second half");
  m.def("embed", &embed, nb::arg("format"), nb::arg("rows"), nb::arg("columns"), nb::arg("fields"), nb::arg("tokens"),
        nb::arg("scale"), nb::arg("out"), "out[i] = scale * row tokens[i]");
}
