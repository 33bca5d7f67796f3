#include <nanobind/nanobind.h>

namespace nb = nanobind;

void bind_ops(nb::module_& m) { (void)m; }
