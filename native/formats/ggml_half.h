// IEEE binary16 <-> binary32 in plain integer code, for any CPU. Exact; rounding to nearest, ties to even.
#pragma once

#include <bit>
#include <cstdint>

namespace tersor {

inline float f32_from_f16(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16;
  const uint32_t rest = static_cast<uint32_t>(h & 0x7fff) << 13;
  if (rest >= 0x0f800000) return std::bit_cast<float>(sign | 0x7f800000 | rest);  // infinity and NaN
  // The exponent is 112 short; a multiplication mends it for subnormal numbers too.
  return std::bit_cast<float>(std::bit_cast<uint32_t>(std::bit_cast<float>(rest) * 0x1p112f) | sign);
}

inline uint16_t f16_from_f32(float f) {
  const uint32_t bits = std::bit_cast<uint32_t>(f);
  const uint32_t sign = bits >> 16 & 0x8000;
  const uint32_t rest = bits & 0x7fffffff;
  if (rest > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00 | (rest >> 13 & 0x3ff));  // NaN, made quiet
  if (rest >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // >= 65520 rounds to infinity
  if (rest < 0x38800000) {  // below 2^-14: adding 1/2 leaves the multiple of 2^-24 in the last bits of the sum
    const float sum = std::bit_cast<float>(rest) + 0.5f;
    return static_cast<uint16_t>(sign | (std::bit_cast<uint32_t>(sum) - 0x3f000000));
  }
  return static_cast<uint16_t>(sign | ((rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13));
}

// As f16_from_f32, but a finite value too large becomes the largest finite number instead of infinity.
inline uint16_t f16_saturated(float f) {
  if (f > 65504.f && f < __builtin_inff()) return 0x7bff;
  if (f < -65504.f && f > -__builtin_inff()) return 0xfbff;
  return f16_from_f32(f);
}

}  // namespace tersor
