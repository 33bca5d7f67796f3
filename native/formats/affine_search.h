// One group's grid by search; the same code for each instruction set (affine_search.inc), chosen by affine_fit.
#pragma once

#include "formats/affine.h"

namespace tersor {

AffineGrid affine_search_scalar(const AffineGroup& group, AffineKind kind, int max_code, bool search);
AffineGrid affine_search_avx2(const AffineGroup& group, AffineKind kind, int max_code, bool search);

}  // namespace tersor
