// AVX-512 intrinsics in plain C++ for tests on CPUs without them: SIMDe (https://github.com/simd-everywhere/simde), and
// what version 0.7 of it lacks, after the Intel intrinsics guide. Only kernel_test is built with this, by
// tests/unit/test_native_builds.py.
#pragma once

#define SIMDE_NO_NATIVE
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>
#include <simde/x86/fma.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#include "base/float16.h"

using __mmask16 = uint16_t;

// Applies f(lane) to sixteen lanes of a result.
template <typename Vector, typename Lane, typename Function>
inline Vector emulate(Function f) {
  Lane lanes[16];
  for (int i = 0; i < 16; ++i) lanes[i] = Lane(f(i));
  Vector v;
  static_assert(sizeof(v) == sizeof(lanes));
  memcpy(&v, lanes, sizeof(v));
  return v;
}

template <typename Lane, typename Vector>
inline Lane lane_of(const Vector& v, int i) {
  Lane lane;
  memcpy(&lane, reinterpret_cast<const char*>(&v) + i * sizeof(Lane), sizeof(Lane));
  return lane;
}

inline simde__m512 _mm512_maskz_loadu_ps(__mmask16 mask, const float* p) {
  return emulate<simde__m512, float>([&](int i) { return mask >> i & 1 ? p[i] : 0.0f; });
}
inline void _mm512_mask_storeu_ps(float* p, __mmask16 mask, const simde__m512& v) {
  for (int i = 0; i < 16; ++i) {
    if (mask >> i & 1) p[i] = lane_of<float>(v, i);
  }
}
inline simde__m512i _mm512_cvtps_epi32(const simde__m512& v) {
  return emulate<simde__m512i, int32_t>([&](int i) {
    const float x = lane_of<float>(v, i);
    return std::fabs(x) < 2147483648.0f ? int32_t(std::nearbyint(x)) : INT32_MIN;
  });
}
inline simde__m512 _mm512_cvtepi32_ps(const simde__m512i& v) {
  return emulate<simde__m512, float>([&](int i) { return lane_of<int32_t>(v, i); });
}
inline simde__m512i _mm512_cvtepi8_epi32(const simde__m128i& v) {
  return emulate<simde__m512i, int32_t>([&](int i) { return lane_of<int8_t>(v, i); });
}
inline simde__m512i _mm512_cvtepu8_epi32(const simde__m128i& v) {
  return emulate<simde__m512i, int32_t>([&](int i) { return lane_of<uint8_t>(v, i); });
}
inline simde__m512i _mm512_cvtepu16_epi32(const simde__m256i& v) {
  return emulate<simde__m512i, int32_t>([&](int i) { return lane_of<uint16_t>(v, i); });
}
inline simde__m512 _mm512_cvtph_ps(const simde__m256i& v) {
  return emulate<simde__m512, float>([&](int i) { return tersor::f16_to_f32(lane_of<uint16_t>(v, i)); });
}
inline simde__m256i _mm512_cvtps_ph(const simde__m512& v, int) {
  return emulate<simde__m256i, uint16_t>([&](int i) { return tersor::f32_to_f16(lane_of<float>(v, i)); });
}
