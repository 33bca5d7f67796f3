// Repacks stored tensors into the panels of kernels.h.
#pragma once

#include "kernels/linear/linear.h"
#include "kernels/linear/scheme.h"

namespace tersor::linear {

// Rows of integers. fields[i] is the first row of scheme.fields[i].
Part pack_integers(const Scheme& scheme, const uint8_t* const* fields, int64_t rows, int64_t columns);

// Rows of floats: float32, float16 or bfloat16 values (rows, columns).
Part pack_floats(Float type, const void* values, int64_t rows, int64_t columns);

}  // namespace tersor::linear
