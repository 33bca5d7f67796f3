// The ops that touch every value once, and the statistics of logits.
#include <nanobind/stl/string.h>

#include "bindings/op_arrays.h"
#include "kernels/elementwise/elementwise.h"
#include "kernels/logits/logits.h"

namespace nb = nanobind;
using namespace tersor;
using namespace tersor::ops_bindings;

namespace {

void rms_norm(AnyArray<const float> x, Array<const float, 1> weight, float eps, AnyArray<float> y) {
  const auto d = int64_t(weight.shape(0));
  require(x.ndim() > 0, "rms_norm: x is a scalar");
  require_size("rms_norm", "last axis of x", int64_t(x.shape(x.ndim() - 1)), d);
  require_size("rms_norm", "values of y", int64_t(y.size()), int64_t(x.size()));
  nb::gil_scoped_release release;
  if (d > 0) elementwise::rms_norm(x.data(), int64_t(x.size()) / d, d, weight.data(), eps, y.data());
}

void gated(Array<const float, 2> x, const std::string& activation, Array<float, 2> y) {
  const auto n = int64_t(x.shape(0)), f = int64_t(y.shape(1));
  const elementwise::Activation kind = activation_of("gated", activation);
  require_size("gated", "columns of x", int64_t(x.shape(1)), 2 * f);
  require_size("gated", "rows of y", int64_t(y.shape(0)), n);
  nb::gil_scoped_release release;
  if (n * f > 0) elementwise::gated(x.data(), n, f, kind, y.data());
}

void add(AnyArray<float> x, AnyArray<const float> y) {
  require_size("add", "values of y", int64_t(y.size()), int64_t(x.size()));
  nb::gil_scoped_release release;
  elementwise::add(x.data(), y.data(), int64_t(x.size()));
}

void softcap(AnyArray<float> x, float cap) {
  require(cap > 0, "softcap: cap must be positive");
  nb::gil_scoped_release release;
  elementwise::softcap(x.data(), int64_t(x.size()), cap);
}

// (n, heads, head_dim); the rows may be apart.
using Heads = nb::ndarray<float, nb::ndim<3>, nb::device::cpu>;

void check_rope(const char* what, const Heads& x, const Array<const float, 1>& inv_freq) {
  require_size(what, "head_dim", int64_t(x.shape(2)), 2 * int64_t(inv_freq.shape(0)));
  require(x.stride(2) == 1 && x.stride(1) == int64_t(x.shape(2)), what, ": heads of a row are not contiguous");
}

void rope(const Heads& x, int64_t start, Array<const float, 1> inv_freq, float scale) {
  check_rope("rope", x, inv_freq);
  require(start >= 0 && start + int64_t(x.shape(0)) <= INT32_MAX, "rope: start ", start, ", need 0 to 2^31");
  nb::gil_scoped_release release;
  elementwise::rope_from(x.data(), int64_t(x.shape(0)), x.stride(0), int64_t(x.shape(1)), int64_t(x.shape(2)) / 2,
                         start, inv_freq.data(), scale);
}

void rope_batch(const Heads& x, Array<const int32_t, 1> positions, Array<const float, 1> inv_freq, float scale) {
  check_rope("rope_batch", x, inv_freq);
  require_size("rope_batch", "positions", int64_t(positions.shape(0)), int64_t(x.shape(0)));
  nb::gil_scoped_release release;
  elementwise::rope(x.data(), int64_t(x.shape(0)), x.stride(0), int64_t(x.shape(1)), int64_t(x.shape(2)) / 2,
                    positions.data(), inv_freq.data(), scale);
}

// Checks logits (n, vocab) with targets (n).
void check_targets(const char* what, const Array<const float, 2>& x, const Array<const int32_t, 1>& targets) {
  const auto n = int64_t(x.shape(0)), vocab = int64_t(x.shape(1));
  require_size(what, "targets", int64_t(targets.shape(0)), n);
  for (int64_t i = 0; i < n; ++i) {
    const int32_t t = targets.data()[i];
    require(t >= 0 && t < vocab, what, ": target ", t, ", need 0 to ", vocab - 1);
  }
}

void nll(Array<const float, 2> logits, Array<const int32_t, 1> targets, Array<double, 1> out) {
  check_targets("nll", logits, targets);
  require_size("nll", "out", int64_t(out.shape(0)), int64_t(logits.shape(0)));
  nb::gil_scoped_release release;
  logits::nll(logits.data(), int64_t(logits.shape(0)), int64_t(logits.shape(1)), targets.data(), out.data());
}

void compare_logits(Array<const float, 2> p, Array<const float, 2> q, Array<const int32_t, 1> targets,
                    Array<double, 2> out) {
  check_targets("compare_logits", p, targets);
  require_size("compare_logits", "rows of q", int64_t(q.shape(0)), int64_t(p.shape(0)));
  require_size("compare_logits", "columns of q", int64_t(q.shape(1)), int64_t(p.shape(1)));
  require_size("compare_logits", "rows of out", int64_t(out.shape(0)), int64_t(p.shape(0)));
  require_size("compare_logits", "columns of out", int64_t(out.shape(1)), 5);
  static_assert(sizeof(logits::Comparison) == 5 * sizeof(double));
  nb::gil_scoped_release release;
  logits::compare(p.data(), q.data(), int64_t(p.shape(0)), int64_t(p.shape(1)), targets.data(),
                  reinterpret_cast<logits::Comparison*>(out.data()));
}

double weigh(Array<const float, 1> x, double temperature, Array<double, 1> out) {
  const auto n = int64_t(x.shape(0));
  require(n > 0, "weigh: no logits");
  require(temperature > 0, "weigh: temperature must be positive");
  require_size("weigh", "values of out", int64_t(out.shape(0)), n);
  nb::gil_scoped_release release;
  return logits::weigh(x.data(), n, temperature, out.data());
}

}  // namespace

void bind_ops(nb::module_& m) {
  m.def("rms_norm", &rms_norm, nb::arg("x"), nb::arg("weight"), nb::arg("eps"), nb::arg("y"),
        "y = x / sqrt(mean(x^2) + eps) * weight");
  m.def("gated", &gated, nb::arg("x"), nb::arg("activation"), nb::arg("y"), "y = act(first half of x) * second half");
  m.def("add", &add, nb::arg("x"), nb::arg("y"), "x += y");
  m.def("softcap", &softcap, nb::arg("x"), nb::arg("cap"), "x = cap * tanh(x / cap)");
  m.def("rope", &rope, nb::arg("x"), nb::arg("start"), nb::arg("inv_freq"), nb::arg("scale"),
        "Rotates x in place; see tersor.ops.rope");
  m.def("rope_batch", &rope_batch, nb::arg("x"), nb::arg("positions"), nb::arg("inv_freq"), nb::arg("scale"),
        "Rotates x in place, row i for positions[i]; see tersor.ops.rope_batch");
  m.def("nll", &nll, nb::arg("logits"), nb::arg("targets"), nb::arg("out"), "out = -log softmax(logits)[target]");
  m.def("weigh", &weigh, nb::arg("logits"), nb::arg("temperature"), nb::arg("out"),
        "out = exp((logits - the largest) / temperature) in float64; returns their sum.");
  m.def("compare_logits", &compare_logits, nb::arg("p"), nb::arg("q"), nb::arg("targets"), nb::arg("out"),
        "See tersor.ops.compare_logits");
}
