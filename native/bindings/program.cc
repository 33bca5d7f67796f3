// A recorded sequence of ops on fixed arrays, replayed by one call: for a few tokens, calling every op from Python
// costs about as much as a tenth of the products. Recorded by tersor.ops.program for `rows` tokens and replayed for as
// many or fewer; the positions come from the caches at every replay, or, where another library holds the keys and
// values (step), the angles and that memory are given.
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <functional>
#include <vector>

#include "bindings/embedding.h"
#include "bindings/op_arrays.h"
#include "kernels/attention/attention.h"
#include "kernels/elementwise/elementwise.h"
#include "kernels/linear/linear.h"
#include "kernels/logits/logits.h"
#include "kernels/plain_attention/plain_attention.h"

namespace nb = nanobind;
using namespace tersor;
using namespace tersor::ops_bindings;
using attention::Cache;
using linear::Weight;

namespace {

// (n, heads, head_dim); the rows may be apart, so that q, k and v can be views of one product.
template <typename T>
using Heads = nb::ndarray<T, nb::ndim<3>, nb::device::cpu>;

// What another library holds: a layer's keys and values, and the cosines and sines of the rows' positions.
struct Given {
  plain_attention::Memory memory;
  const float* cosines;
  const float* sines;
  int64_t angle_stride;  // from row to row; 0 = all rows have the same
};

// One replay: n tokens, at these positions of the spans' caches, or of what is given.
struct Turn {
  int64_t n;
  const int32_t* tokens;
  std::vector<attention::Span> spans;
  std::vector<int32_t> positions;  // (n)
  const Given* given;
};

struct Program {
  int layers, kv_heads, head_dim;
  int64_t rows;
  int64_t vocabulary = 0;     // of the embedding, when there is one
  bool wants_caches = false;  // has ops that want caches and tokens
  bool wants_given = false;   // has ops that want what is given
  std::vector<std::function<void(const Turn&)>> steps;
  std::vector<nb::object> kept;  // the arrays and weights whose memory the steps use

  void add(std::initializer_list<nb::handle> owners, std::function<void(const Turn&)> step) {
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

void add_embed(Program& p, const std::string& format, int64_t rows, int64_t columns, nb::dict fields, float scale,
               nb::handle out_object) {
  const auto out = as<Array<float, 2>>(out_object);
  require_size("embed", "rows of out", int64_t(out.shape(0)), p.rows);
  require_size("embed", "columns of out", int64_t(out.shape(1)), columns);
  p.vocabulary = rows;
  p.wants_caches = true;
  p.add({out_object}, [look_up = embedding(format, rows, columns, fields, scale), to = out.data()](const Turn& turn) {
    look_up(turn.tokens, turn.n, to);
  });
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
        [from = x.data(), &weight, residual, to = y.data()](const Turn& turn) {
          linear::multiply(from, turn.n, weight, residual, to);
        });
}

void add_gated_linear(Program& p, nb::handle x_object, nb::handle weight_object, const std::string& activation,
                      nb::handle y_object) {
  const auto x = as<Array<const float, 2>>(x_object);
  const auto y = as<Array<float, 2>>(y_object);
  const Weight& weight = as<const Weight&>(weight_object);
  const elementwise::Activation kind = activation_of("gated_linear", activation);
  require_size("gated_linear", "rows of x", int64_t(x.shape(0)), p.rows);
  require_size("gated_linear", "columns of x", int64_t(x.shape(1)), weight.columns);
  require_size("gated_linear", "rows of y", int64_t(y.shape(0)), p.rows);
  require_size("gated_linear", "rows of the weight", weight.rows, 2 * int64_t(y.shape(1)));
  p.add({x_object, weight_object, y_object}, [from = x.data(), &weight, kind, to = y.data()](const Turn& turn) {
    linear::multiply_gated(from, turn.n, weight, kind, to);
  });
}

// x: (rows, d), or (rows, heads, d) whose rows may be apart.
void add_rms_norm(Program& p, nb::handle x_object, nb::handle weight_object, float eps, nb::handle y_object) {
  const auto x = as<nb::ndarray<const float, nb::device::cpu>>(x_object);
  const auto weight = as<Array<const float, 1>>(weight_object);
  const auto y = as<AnyArray<float>>(y_object);
  const auto d = int64_t(weight.shape(0));
  require(x.ndim() == 2 || x.ndim() == 3, "rms_norm: x has ", int64_t(x.ndim()), " axes, need 2 or 3");
  const int64_t heads = x.ndim() == 3 ? int64_t(x.shape(1)) : 1, stride = x.stride(0);
  require_size("rms_norm", "rows of x", int64_t(x.shape(0)), p.rows);
  require_size("rms_norm", "last axis of x", int64_t(x.shape(x.ndim() - 1)), d);
  require(x.stride(x.ndim() - 1) == 1 && (x.ndim() == 2 || x.stride(1) == d), "rms_norm: a row is not contiguous");
  require_size("rms_norm", "values of y", int64_t(y.size()), p.rows * heads * d);
  p.add({x_object, weight_object, y_object},
        [from = x.data(), heads, stride, d, w = weight.data(), eps, to = y.data()](const Turn& turn) {
          if (stride == heads * d) return elementwise::rms_norm(from, turn.n * heads, d, w, eps, to);
          for (int64_t i = 0; i < turn.n; ++i)
            elementwise::rms_norm(from + i * stride, heads, d, w, eps, to + i * heads * d);
        });
}

void add_gated(Program& p, nb::handle x_object, const std::string& activation, nb::handle y_object) {
  const auto x = as<Array<const float, 2>>(x_object);
  const auto y = as<Array<float, 2>>(y_object);
  const elementwise::Activation kind = activation_of("gated", activation);
  require_size("gated", "rows of x", int64_t(x.shape(0)), p.rows);
  require_size("gated", "rows of y", int64_t(y.shape(0)), p.rows);
  require_size("gated", "columns of x", int64_t(x.shape(1)), 2 * int64_t(y.shape(1)));
  p.add({x_object, y_object}, [from = x.data(), f = int64_t(y.shape(1)), kind, to = y.data()](const Turn& turn) {
    elementwise::gated(from, turn.n, f, kind, to);
  });
}

void add_add(Program& p, nb::handle x_object, nb::handle y_object) {
  const auto x = as<Array<float, 2>>(x_object);
  const auto y = as<Array<const float, 2>>(y_object);
  require_size("add", "rows of x", int64_t(x.shape(0)), p.rows);
  require_size("add", "values of y", int64_t(y.size()), int64_t(x.size()));
  p.add({x_object, y_object}, [to = x.data(), from = y.data(), width = int64_t(x.shape(1))](const Turn& turn) {
    elementwise::add(to, from, turn.n * width);
  });
}

void add_rope(Program& p, nb::handle x_object, nb::handle inv_freq_object, float scale) {
  const auto x = as<Heads<float>>(x_object);
  const auto inv_freq = as<Array<const float, 1>>(inv_freq_object);
  check_heads(p, "rope", x);
  require_size("rope", "values of inv_freq", int64_t(inv_freq.shape(0)), p.head_dim / 2);
  p.wants_caches = true;
  p.add({x_object, inv_freq_object}, [at = x.data(), stride = x.stride(0), heads = int64_t(x.shape(1)),
                                      half = p.head_dim / 2, f = inv_freq.data(), scale](const Turn& turn) {
    elementwise::rope(at, turn.n, stride, heads, half, turn.positions.data(), f, scale);
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
  p.wants_caches = true;
  p.add({k_object, v_object},
        [layer, keys, values](const Turn& turn) { attention::append(turn.spans, layer, keys, values); });
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
  p.wants_caches = true;
  p.add({q_object, out_object}, [layer, from = q.data(), stride = q.stride(0), heads, scale, softcap, window,
                                 to = out.data()](const Turn& turn) {
    attention::attend(turn.spans, layer, {from, turn.n, stride}, int(heads), scale, softcap, window, to);
  });
}

void add_rotate(Program& p, nb::handle x_object) {
  const auto x = as<Heads<float>>(x_object);
  check_heads(p, "rotate", x);
  p.wants_given = true;
  p.add({x_object},
        [at = x.data(), stride = x.stride(0), heads = int64_t(x.shape(1)), half = p.head_dim / 2](const Turn& turn) {
          const Given& g = *turn.given;
          elementwise::rotate(at, turn.n, stride, heads, half, g.cosines, g.sines, g.angle_stride);
        });
}

void add_plain_attention(Program& p, nb::handle q_object, nb::handle k_object, nb::handle v_object, float scale,
                         nb::handle out_object) {
  const auto q = as<Heads<const float>>(q_object), k = as<Heads<const float>>(k_object),
             v = as<Heads<const float>>(v_object);
  const auto out = as<Array<float, 2>>(out_object);
  const auto heads = int64_t(q.shape(1));
  for (const auto* x : {&q, &k, &v}) check_heads(p, "plain_attention", *x);
  for (const auto* x : {&k, &v}) require_size("plain_attention", "heads", int64_t(x->shape(1)), p.kv_heads);
  require(heads > 0 && heads % p.kv_heads == 0, "plain_attention: ", heads, " heads, need a multiple of ", p.kv_heads);
  require_size("plain_attention", "rows of out", int64_t(out.shape(0)), p.rows);
  require_size("plain_attention", "columns of out", int64_t(out.shape(1)), heads * p.head_dim);
  p.wants_given = true;
  const attention::Rows queries{q.data(), p.rows, q.stride(0)}, keys{k.data(), p.rows, k.stride(0)},
      values{v.data(), p.rows, v.stride(0)};
  p.add({q_object, k_object, v_object, out_object},
        [queries, keys, values, heads, scale, to = out.data()](const Turn& turn) {
          const plain_attention::Memory& memory = turn.given->memory;
          plain_attention::append(memory, keys.data, keys.stride, values.data, values.stride);
          plain_attention::attend(memory, queries.data, queries.stride, heads, scale, to);
        });
}

void add_softcap(Program& p, nb::handle x_object, float cap) {
  const auto x = as<Array<float, 2>>(x_object);
  require_size("softcap", "rows of x", int64_t(x.shape(0)), p.rows);
  require(cap > 0, "softcap: cap must be positive");
  p.add({x_object}, [at = x.data(), width = int64_t(x.shape(1)), cap](const Turn& turn) {
    elementwise::softcap(at, turn.n * width, cap);
  });
}

void add_top(Program& p, nb::handle x_object, nb::handle out_object) {
  const auto x = as<Array<const float, 2>>(x_object);
  const auto out = as<Array<int32_t, 1>>(out_object);
  require_size("top", "rows of x", int64_t(x.shape(0)), p.rows);
  require_size("top", "values of out", int64_t(out.shape(0)), p.rows);
  require(x.shape(1) > 0, "top: x has no columns");
  p.add({x_object, out_object}, [from = x.data(), width = int64_t(x.shape(1)), to = out.data()](const Turn& turn) {
    logits::top(from, turn.n, width, to);
  });
}

void run(const Program& p, const std::vector<Cache*>& caches, Array<const int32_t, 1> tokens) {
  const auto n = int64_t(tokens.shape(0));
  require(n >= 1 && n <= p.rows, "run: ", n, " rows, need 1 to ", p.rows);
  const auto count = int64_t(caches.size());
  require(count == 1 || count == n, "run: ", n, " rows and ", count, " caches, need one cache, or as many");
  if (p.vocabulary > 0) require_tokens("run", tokens.data(), n, p.vocabulary);
  require(!p.wants_given, "run: the program was recorded for step");
  Turn turn{n, tokens.data(), {}, {}, nullptr};
  for (Cache* cache : caches) {
    require(cache->layers == p.layers && cache->kv_heads == p.kv_heads && cache->head_dim == p.head_dim,
            "run: a cache of another model");
    for (const attention::Span& other : turn.spans) require(other.cache != cache, "run: a cache is given twice");
    const int64_t rows = n / count, end = cache->length + rows;
    require(end <= cache->capacity, "run: position ", end, ", the cache holds ", cache->capacity);
    turn.spans.push_back({cache, int64_t(turn.positions.size()), rows});
    for (int64_t at = cache->length; at < end; ++at) turn.positions.push_back(int32_t(at));
  }
  nb::gil_scoped_release release;
  for (const auto& step : p.steps) step(turn);
}

void step(const Program& p, const Array<float, 4>& keys, const Array<float, 4>& values, int64_t length,
          const Array<const float, 2>& cosines, const Array<const float, 2>& sines) {
  require(!p.wants_caches, "step: the program was recorded for run");
  const auto n = int64_t(keys.shape(0)), angles = int64_t(cosines.shape(0));
  require(n >= 1 && n <= p.rows, "step: ", n, " rows, need 1 to ", p.rows);
  for (int axis = 0; axis < 4; ++axis) {
    require_size("step", "an axis of values", int64_t(values.shape(axis)), int64_t(keys.shape(axis)));
  }
  require_size("step", "heads of keys", int64_t(keys.shape(1)), p.kv_heads);
  require_size("step", "head_dim of keys", int64_t(keys.shape(3)), p.head_dim);
  require(length >= 0 && length < int64_t(keys.shape(2)), "step: position ", length, ", there is room for ",
          int64_t(keys.shape(2)));
  require(angles == 1 || angles == n, "step: ", angles, " rows of cosines, need 1 or ", n);
  require_size("step", "columns of cosines", int64_t(cosines.shape(1)), p.head_dim);
  require_size("step", "rows of sines", int64_t(sines.shape(0)), angles);
  require_size("step", "columns of sines", int64_t(sines.shape(1)), p.head_dim);
  const Given given{{keys.data(), values.data(), n, p.kv_heads, int64_t(keys.shape(2)), p.head_dim, length},
                    cosines.data(),
                    sines.data(),
                    angles == 1 ? 0 : p.head_dim};
  const Turn turn{n, nullptr, {}, {}, &given};
  nb::gil_scoped_release release;
  for (const auto& one : p.steps) one(turn);
}

}  // namespace

void bind_program(nb::module_& m) {
  nb::class_<Program>(
      m, "Program",
      "Ops on fixed arrays of `rows` rows, replayed in order by run. Arguments as of the ops of the same names.")
      .def(
          "__init__",
          [](Program* self, int layers, int kv_heads, int head_dim, int64_t rows) {
            new (self) Program{layers, kv_heads, head_dim, rows, 0, false, false, {}, {}};
          },
          nb::arg("layers"), nb::arg("kv_heads"), nb::arg("head_dim"), nb::arg("rows"))
      .def("embed", &add_embed, nb::arg("format"), nb::arg("rows"), nb::arg("columns"), nb::arg("fields"),
           nb::arg("scale"), nb::arg("out"), "Of the tokens that run is given.")
      .def("linear", &add_linear, nb::arg("x"), nb::arg("weight"), nb::arg("y"), nb::arg("residual").none())
      .def("rms_norm", &add_rms_norm, nb::arg("x"), nb::arg("weight"), nb::arg("eps"), nb::arg("y"))
      .def("gated_linear", &add_gated_linear, nb::arg("x"), nb::arg("weight"), nb::arg("activation"), nb::arg("y"))
      .def("gated", &add_gated, nb::arg("x"), nb::arg("activation"), nb::arg("y"))
      .def("add", &add_add, nb::arg("x"), nb::arg("y"))
      .def("rope", &add_rope, nb::arg("x"), nb::arg("inv_freq"), nb::arg("scale"), "At the positions of the rows.")
      .def("append", &add_append, nb::arg("layer"), nb::arg("k"), nb::arg("v"))
      .def("attention", &add_attention, nb::arg("q"), nb::arg("layer"), nb::arg("scale"), nb::arg("softcap"),
           nb::arg("window"), nb::arg("out"))
      .def("rotate", &add_rotate, nb::arg("x"), "By the angles that step is given.")
      .def("plain_attention", &add_plain_attention, nb::arg("q"), nb::arg("k"), nb::arg("v"), nb::arg("scale"),
           nb::arg("out"), "Appends k and v to the memory that step is given, and attends to all of it.")
      .def("softcap", &add_softcap, nb::arg("x"), nb::arg("cap"))
      .def("top", &add_top, nb::arg("x"), nb::arg("out"),
           "out[i], int32, = the place of the first largest value of row i.")
      .def(
          "run", &run, nb::arg("caches"), nb::arg("tokens"),
          "Replays all steps for n tokens, (n) int32, in the first n rows: at positions length and on of one cache, or "
          "token i at caches[i].length. The lengths stay as they are.")
      .def("step", &step, nb::arg("keys"), nb::arg("values"), nb::arg("length"), nb::arg("cosines"), nb::arg("sines"),
           "Replays all steps for a token of each of n sequences, at position `length` of the memory given: keys and "
           "values (n, kv_heads, capacity, head_dim), cosines and sines (1 or n, head_dim) with equal halves.");
}
