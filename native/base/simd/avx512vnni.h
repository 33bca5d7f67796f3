// AVX-512 with VNNI. Names and meanings: base/simd/scalar.h. Include only from *x86_avx512vnni.cc.
#pragma once

#include "base/simd/avx512_vectors.h"

namespace tersor {
namespace {

inline constexpr int kAheadBits = 8;  // of codes that are asked for before they are read,
inline constexpr int kAhead = 1536;   // and so many bytes before

}  // namespace
}  // namespace tersor
