#include <nanobind/nanobind.h>

namespace nb = nanobind;

void bind_formats(nb::module_& m) { (void)m; }
