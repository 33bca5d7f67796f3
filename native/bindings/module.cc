// The extension module: checks shapes and dtypes, calls dispatch, does no arithmetic.
#include <nanobind/nanobind.h>

namespace nb = nanobind;

void bind_base(nb::module_& m);       // bindings/base.cc: ISA and threads
void bind_formats(nb::module_& m);    // bindings/formats.cc: float arrays, ggml blocks
void bind_affine(nb::module_& m);     // bindings/affine.cc: bit packing, affine fit/encode/decode
void bind_linear(nb::module_& m);     // bindings/linear.cc: packed weights, products, embedding
void bind_attention(nb::module_& m);  // bindings/attention.cc: key-value cache, attention
void bind_ops(nb::module_& m);        // bindings/ops.cc: the ops that models call
void bind_program(nb::module_& m);    // bindings/program.cc: recorded ops
void bind_methods(nb::module_& m);    // bindings/methods.cc: rounding column by column

NB_MODULE(_native, m) {
  m.doc() = "Native kernels of tersor. Use the Python wrappers; this module checks shapes and nothing else.";
  bind_base(m);
  bind_formats(m);
  bind_affine(m);
  bind_linear(m);
  bind_attention(m);
  bind_ops(m);
  bind_program(m);
  bind_methods(m);
}
