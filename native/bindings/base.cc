#include <nanobind/nanobind.h>

namespace nb = nanobind;

void bind_base(nb::module_& m) { (void)m; }
