#include "formats/ggml_extremes.h"

#include <cmath>

#include "formats/ggml_half.h"
#include "formats/ggml_pack.h"
#include "formats/ggml_tables.h"

namespace tersor {

// 1 / d, or 0 where that is not finite.
static float reciprocal(float d) {
  const float inverse = 1.f / d;
  return std::abs(inverse) <= 0x1.fffffep127f ? inverse : 0.f;
}

static float largest_magnitude(const float* w, int n) {
  float top = 0.f;
  for (int i = 0; i < n; ++i) top = std::abs(w[i]) > top ? std::abs(w[i]) : top;
  return top;
}

// Truncation of t, clamped to 0..highest; a NaN gives 0.
static uint8_t truncated(float t, float highest) {
  t = t > 0.f ? t : 0.f;
  return static_cast<uint8_t>(t < highest ? t : highest);
}

// The value of largest magnitude, the first of equals, becomes code 0; code = trunc(w / d + half + 1/2).
template <int kHalf>
static float signed_codes(const float* w, uint8_t* codes) {
  float extreme = w[0];
  for (int i = 0; i < 32; ++i) extreme = std::abs(w[i]) > std::abs(extreme) ? w[i] : extreme;
  const float d = extreme / -kHalf, inverse = reciprocal(d);
  for (int i = 0; i < 32; ++i) codes[i] = truncated(w[i] * inverse + (kHalf + 0.5f), 2 * kHalf - 1);
  return d;
}

// Minimum to code 0, maximum to code kTop; code = trunc((w - min) / d + 1/2).
template <int kTop>
static float affine_codes(const float* w, uint8_t* codes, float& min) {
  float max = min = w[0];
  for (int i = 1; i < 32; ++i) {
    min = w[i] < min ? w[i] : min;
    max = w[i] > max ? w[i] : max;
  }
  const float d = (max - min) / kTop, inverse = reciprocal(d);
  for (int i = 0; i < 32; ++i) codes[i] = truncated((w[i] - min) * inverse + 0.5f, kTop);
  return d;
}

void encode_extremes(const float* w, BlockQ4_0& b) {
  uint8_t codes[32];
  b.d = f16_saturated(signed_codes<8>(w, codes));
  place(codes, b);
}

void encode_extremes(const float* w, BlockQ5_0& b) {
  uint8_t codes[32];
  b.d = f16_saturated(signed_codes<16>(w, codes));
  place(codes, b);
}

void encode_extremes(const float* w, BlockQ4_1& b) {
  uint8_t codes[32];
  float min;
  b.d = f16_saturated(affine_codes<15>(w, codes, min));
  b.m = f16_saturated(min);
  place(codes, b);
}

void encode_extremes(const float* w, BlockQ5_1& b) {
  uint8_t codes[32];
  float min;
  b.d = f16_saturated(affine_codes<31>(w, codes, min));
  b.m = f16_saturated(min);
  place(codes, b);
}

// Rounds to nearest, halves away from zero, clamped to -limit..limit; a NaN gives limit.
static int rounded_away(float t, int limit) {
  const float top = static_cast<float>(limit);
  const float magnitude = std::abs(t) < top ? std::abs(t) : top;
  const int whole = static_cast<int>(magnitude);
  const int n = whole + (magnitude - static_cast<float>(whole) >= 0.5f);
  return t < 0.f ? -n : n;
}

void encode_extremes(const float* w, BlockQ8_0& b) {
  const float d = largest_magnitude(w, 32) / 127, inverse = reciprocal(d);
  b.d = f16_saturated(d);
  for (int i = 0; i < 32; ++i) b.qs[i] = static_cast<int8_t>(rounded_away(w[i] * inverse, 127));
}

static float ternary_codes(const float* w, uint8_t* codes) {
  const float d = largest_magnitude(w, 256), inverse = reciprocal(d);
  for (int i = 0; i < 256; ++i) codes[i] = static_cast<uint8_t>(rounded_away(w[i] * inverse, 1) + 1);
  return d;
}

void encode_extremes(const float* w, BlockTQ1_0& b) {
  uint8_t codes[256];
  b.d = f16_saturated(ternary_codes(w, codes));
  place(codes, b);
}

void encode_extremes(const float* w, BlockTQ2_0& b) {
  uint8_t codes[256];
  b.d = f16_saturated(ternary_codes(w, codes));
  place(codes, b);
}

void encode_extremes(const float* w, BlockMXFP4& b) {
  // The exponent that puts the largest magnitude into [4, 8) of the undoubled levels, as OCP MX says.
  const float top = largest_magnitude(w, 32);
  const float exponent = top > 0.f ? std::floor(std::log2(top)) + 125.f : 0.f;
  uint8_t codes[32];
  b.e = truncated(exponent, 254.f);
  mxfp4_codes(w, b.e, codes);
  place(codes, b);
}

void mxfp4_codes(const float* w, uint8_t e, uint8_t* codes) {
  const float d = mxfp4_step(e);
  float middles[7];  // between neighbouring magnitudes; a value in the middle gets the smaller one
  for (int k = 0; k < 7; ++k) middles[k] = d * static_cast<float>(kLevelsE2M1[k] + kLevelsE2M1[k + 1]) * 0.5f;
  for (int i = 0; i < 32; ++i) {
    int magnitude = 0;
    for (int k = 0; k < 7; ++k) magnitude += std::abs(w[i]) > middles[k];
    codes[i] = static_cast<uint8_t>(w[i] < 0.f && magnitude > 0 ? magnitude + 8 : magnitude);
  }
}

}  // namespace tersor
