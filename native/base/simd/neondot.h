// NEON with sdot. Names and meanings: base/simd/scalar.h. Include only from *arm_neondot.cc files.
#pragma once

#include "base/simd/neon_vectors.h"

namespace tersor {
namespace {

inline constexpr int kStepColumns = 4;

}  // namespace
}  // namespace tersor
