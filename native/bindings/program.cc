// A recorded sequence of ops on fixed arrays, replayed by one call: for one token, calling every op from Python costs
// about as much as a tenth of the products. Recorded by tersor.ops.program; the position comes from the cache at every
// replay.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <functional>
#include <optional>
#include <vector>

#include "bindings/op_arrays.h"
#include "kernels/attention/attention.h"
#include "kernels/elementwise/elementwise.h"
#include "kernels/linear/linear.h"

namespace nb = nanobind;
using namespace tersor;
using namespace tersor::ops_bindings;
using attention::Cache;
using linear::Weight;

namespace {

// (n, heads, head_dim); the rows may be apart, so that q, k and v can be views of one product.
template <typename T>
using Heads = nb::ndarray<T, nb::ndim<3>, nb::device::cpu>;

struct Program {
  int layers, kv_heads, head_dim;
  int64_t rows;
  std::vector<std::function<void(Cache&)>> steps;
  std::vector<nb::object> kept;  // the arrays and weights whose memory the steps use

  void add(std::initializer_list<nb::handle> owners, std::function<void(Cache&)> step) {
    for (nb::handle owner : owners) kept.push_back(nb::borrow(owner));
    steps.push_back(std::move(step));
  }
};

// Casts an argument that the program keeps; never makes a copy, whose memory would be gone.
template <typename T>
T as(nb::handle h) {
  return nb::cast<T>(h, false);
}

template <typename T>
void check_heads(const Program& p, const char* op, const Heads<T>& x) {
  require_size(op, "rows", int64_t(x.shape(0)), p.rows);
  require_size(op, "head_dim", int64_t(x.shape(2)), p.head_dim);
  require(x.stride(2) == 1 && x.stride(1) == p.head_dim, op, ": heads of a row are not contiguous");
}

void add_linear(Program& p, nb::handle x_object, nb::handle weight_object, nb::handle y_object,
                nb::handle residual_object) {
  const auto x = as<Array<const float, 2>>(x_object);
  const auto y = as<Array<float, 2>>(y_object);
  const Weight& weight = as<const Weight&>(weight_object);
  require_size("linear", "rows of x", int64_t(x.shape(0)), p.rows);
  require_size("linear", "columns of x", int64_t(x.shape(1)), weight.columns);
  require_size("linear", "rows of y", int64_t(y.shape(0)), p.rows);
  require_size("linear", "columns of y", int64_t(y.shape(1)), weight.rows);
  const float* residual = nullptr;
  if (!residual_object.is_none()) {
    const auto r = as<Array<const float, 2>>(residual_object);
    require_size("linear", "rows of residual", int64_t(r.shape(0)), p.rows);
    require_size("linear", "columns of residual", int64_t(r.shape(1)), weight.rows);
    residual = r.data();
  }
  p.add({x_object, weight_object, y_object, residual_object},
        [from = x.data(), n = p.rows, &weight, residual, to = y.data()](Cache&) {
          linear::multiply(from, n, weight, residual, to);
        });
}

void add_rms_norm(Program& p, nb::handle x_object, nb::handle weight_object, float eps, nb::handle y_object) {
  const auto x = as<AnyArray<const float>>(x_object);
  const auto weight = as<Array<const float, 1>>(weight_object);
  const auto y = as<AnyArray<float>>(y_object);
  const auto d = int64_t(weight.shape(0));
  require(d > 0 && x.size() % d == 0 && x.size() == y.size(), "rms_norm: x and y must be rows of ", d,
          " values, as many");
  p.add({x_object, weight_object, y_object},
        [from = x.data(), rows = int64_t(x.size()) / d, d, w = weight.data(), eps, to = y.data()](Cache&) {
          elementwise::rms_norm(from, rows, d, w, eps, to);
        });
}

void add_gated(Program& p, nb::handle x_object, const std::string& activation, nb::handle y_object) {
  const auto x = as<Array<const float, 2>>(x_object);
  const auto y = as<Array<float, 2>>(y_object);
  require(activation == "silu" || activation == "gelu_tanh", "gated: activation '", activation,
          "', need silu or gelu_tanh");
  const elementwise::Activation kind = activation == "silu" ? elementwise::kSilu : elementwise::kGeluTanh;
  require_size("gated", "rows of y", int64_t(y.shape(0)), int64_t(x.shape(0)));
  require_size("gated", "columns of x", int64_t(x.shape(1)), 2 * int64_t(y.shape(1)));
  p.add({x_object, y_object}, [from = x.data(), rows = int64_t(y.shape(0)), f = int64_t(y.shape(1)), kind,
                               to = y.data()](Cache&) { elementwise::gated(from, rows, f, kind, to); });
}

void add_add(Program& p, nb::handle x_object, nb::handle y_object) {
  const auto x = as<AnyArray<float>>(x_object);
  const auto y = as<AnyArray<const float>>(y_object);
  require_size("add", "values of y", int64_t(y.size()), int64_t(x.size()));
  p.add({x_object, y_object},
        [to = x.data(), from = y.data(), n = int64_t(x.size())](Cache&) { elementwise::add(to, from, n); });
}

void add_rope(Program& p, nb::handle x_object, nb::handle inv_freq_object, float scale) {
  const auto x = as<Heads<float>>(x_object);
  const auto inv_freq = as<Array<const float, 1>>(inv_freq_object);
  check_heads(p, "rope", x);
  require_size("rope", "values of inv_freq", int64_t(inv_freq.shape(0)), p.head_dim / 2);
  p.add({x_object, inv_freq_object}, [at = x.data(), n = p.rows, stride = x.stride(0), heads = int64_t(x.shape(1)),
                                      half = p.head_dim / 2, f = inv_freq.data(), scale](Cache& cache) {
    elementwise::rope_from(at, n, stride, heads, half, cache.length, f, scale);
  });
}

void add_append(Program& p, int layer, nb::handle k_object, nb::handle v_object) {
  const auto k = as<Heads<const float>>(k_object);
  const auto v = as<Heads<const float>>(v_object);
  require(layer >= 0 && layer < p.layers, "append: layer ", layer, ", need 0 to ", p.layers - 1);
  for (const auto* x : {&k, &v}) {
    check_heads(p, "append", *x);
    require_size("append", "heads", int64_t(x->shape(1)), p.kv_heads);
  }
  const attention::Rows keys{k.data(), p.rows, k.stride(0)}, values{v.data(), p.rows, v.stride(0)};
  p.add({k_object, v_object}, [layer, keys, values](Cache& cache) {
    const attention::Span span{&cache, 0, keys.n};
    attention::append({&span, 1}, layer, keys, values);
  });
}

void add_attention(Program& p, nb::handle q_object, int layer, float scale, float softcap, int64_t window,
                   nb::handle out_object) {
  const auto q = as<Heads<const float>>(q_object);
  const auto out = as<Array<float, 2>>(out_object);
  const auto heads = int64_t(q.shape(1));
  require(layer >= 0 && layer < p.layers, "attention: layer ", layer, ", need 0 to ", p.layers - 1);
  check_heads(p, "attention", q);
  require(heads > 0 && heads % p.kv_heads == 0, "attention: ", heads, " heads, need a multiple of ", p.kv_heads);
  require_size("attention", "rows of out", int64_t(out.shape(0)), p.rows);
  require_size("attention", "columns of out", int64_t(out.shape(1)), heads * p.head_dim);
  const attention::Rows queries{q.data(), p.rows, q.stride(0)};
  p.add({q_object, out_object}, [layer, queries, heads, scale, softcap, window, to = out.data()](Cache& cache) {
    const attention::Span span{&cache, 0, queries.n};
    attention::attend({&span, 1}, layer, queries, int(heads), scale, softcap, window, to);
  });
}

void run(const Program& p, Cache& cache) {
  require(cache.layers == p.layers && cache.kv_heads == p.kv_heads && cache.head_dim == p.head_dim,
          "run: a cache of another model");
  require(cache.length + p.rows <= cache.capacity, "run: position ", cache.length + p.rows, ", the cache holds ",
          cache.capacity);
  nb::gil_scoped_release release;
  for (const auto& step : p.steps) step(cache);
}

}  // namespace

void bind_program(nb::module_& m) {
  nb::class_<Program>(m, "Program",
                      "Ops on fixed arrays, replayed in order by run. Arguments as of the ops of the same names.")
      .def(
          "__init__",
          [](Program* self, int layers, int kv_heads, int head_dim, int64_t rows) {
            new (self) Program{layers, kv_heads, head_dim, rows, {}, {}};
          },
          nb::arg("layers"), nb::arg("kv_heads"), nb::arg("head_dim"), nb::arg("rows"))
      .def("linear", &add_linear, nb::arg("x"), nb::arg("weight"), nb::arg("y"), nb::arg("residual").none())
      .def("rms_norm", &add_rms_norm, nb::arg("x"), nb::arg("weight"), nb::arg("eps"), nb::arg("y"))
      .def("gated", &add_gated, nb::arg("x"), nb::arg("activation"), nb::arg("y"))
      .def("add", &add_add, nb::arg("x"), nb::arg("y"))
      .def("rope", &add_rope, nb::arg("x"), nb::arg("inv_freq"), nb::arg("scale"), "At the cache's length.")
      .def("append", &add_append, nb::arg("layer"), nb::arg("k"), nb::arg("v"))
      .def("attention", &add_attention, nb::arg("q"), nb::arg("layer"), nb::arg("scale"), nb::arg("softcap"),
           nb::arg("window"), nb::arg("out"))
      .def("run", &run, nb::arg("cache"), "Replays all steps at the cache's length, which stays as it is.");
}
