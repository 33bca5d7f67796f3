// Repacks stored tensors into the panels of kernels.h.
#pragma once

#include <vector>

#include "kernels/linear/linear.h"
#include "kernels/linear/scheme.h"

namespace tersor::linear {

// The rows of one stored tensor: fields[i] is the first row of field i.
struct Source {
  std::vector<const uint8_t*> fields;
  int64_t rows;
};

// The rows of tensors of one scheme, one after the other.
Part pack_integers(const Scheme& scheme, const std::vector<Source>& sources, int64_t columns);

// Rows of floats, the first field of a source; of E4M3 the second is the float32 scale of a row, or, shared, of all.
Part pack_floats(Float type, const std::vector<Source>& sources, int64_t columns, bool shared_scale = false);

}  // namespace tersor::linear
