// One group's grid by search; the same code for each instruction set (affine_search.inc), chosen by affine_fit.
#pragma once

#include "formats/affine.h"

namespace tersor {

// affine_ratio(k) = 0.8^(k / kAffineRatioSteps), 0 <= k < kAffineRatios; the last one is 0.8^16 = 0.028.
constexpr int kAffineRatioSteps = 16;
constexpr int kAffineRatios = 16 * kAffineRatioSteps + 1;
double affine_ratio(int step);

AffineGrid affine_search_scalar(const AffineGroup& group, AffineKind kind, int max_code, bool search);
AffineGrid affine_search_avx2(const AffineGroup& group, AffineKind kind, int max_code, bool search);

}  // namespace tersor
