// The float types, and float16 (IEEE 754 binary16), bfloat16 and E4M3 to and from float32 in plain C++. Rounds to
// nearest, ties to even.
#pragma once

#include <cstdint>
#include <cstring>

namespace tersor {

// The float types that weights and caches are stored in.
enum Float { kF32, kF16, kBF16, kE4M3, kFloats };

constexpr int float_bytes(Float type) { return type == kF32 ? 4 : type == kE4M3 ? 1 : 2; }

static inline float bits_to_float(uint32_t bits) {
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

static inline uint32_t float_to_bits(float f) {
  uint32_t bits;
  memcpy(&bits, &f, 4);
  return bits;
}

// sign 1 | exponent 5 (bias 15) | fraction 10. Without branches, so that loops become vectors.
static inline float f16_to_f32(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16, magnitude = h & 0x7fff;
  // Subnormals need no case: the multiplication by 2^112 (127 - 15 = 112) normalizes them, exactly.
  const uint32_t value = float_to_bits(bits_to_float(magnitude << 13) * 0x1p112f);
  return bits_to_float(sign | value | (magnitude >= 0x7c00 ? 0x7f800000 : 0));  // inf, NaN
}

// E4M3 (sign 1 | exponent 4 (bias 7) | fraction 3) as the float16 of value / 256, whose exponent has the same bits but
// for the bias. Not of its NaN, 0x7f and 0xff, which becomes 480 / 256.
static inline uint16_t e4m3_to_f16_256th(uint8_t x) { return uint16_t((x & 0x80) << 8 | (x & 0x7f) << 7); }

static inline float e4m3_to_f32(uint8_t x) { return f16_to_f32(e4m3_to_f16_256th(x)) * 256; }

// To nearest, ties to even; a NaN becomes the quiet one of its sign. Without branches, too.
static inline uint16_t f32_to_f16(float f) {
  const uint32_t bits = float_to_bits(f), magnitude = bits & 0x7fffffff, odd = magnitude >> 13 & 1;
  const uint32_t normal = (magnitude - 0x38000000 + 0xfff + odd) >> 13;
  // Adding 0.5 leaves a subnormal in units of ulp(0.5) = 2^-24 in the low bits, rounded by the adder.
  const uint32_t subnormal = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000;
  uint32_t half = magnitude < 0x38800000 ? subnormal : normal;  // < 2^-14
  half = magnitude >= 0x477ff000 ? 0x7c00 : half;               // >= 65520 rounds to infinity
  half = magnitude > 0x7f800000 ? 0x7e00 : half;                // NaN
  return uint16_t((bits >> 16 & 0x8000) | half);
}

static inline float bf16_to_f32(uint16_t h) { return bits_to_float(uint32_t(h) << 16); }

}  // namespace tersor
