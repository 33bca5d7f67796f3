#include <nanobind/nanobind.h>

namespace nb = nanobind;

void bind_affine(nb::module_& m) { (void)m; }
