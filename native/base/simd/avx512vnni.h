// AVX-512 with VNNI. Names and meanings: base/simd/scalar.h. Include only from *x86_avx512vnni.cc.
#pragma once

#include "base/simd/ahead.h"
#include "base/simd/avx512_vectors.h"

namespace tersor {
namespace {

inline constexpr Ahead kAhead = {8, 1536, 0, 0};

}  // namespace
}  // namespace tersor
