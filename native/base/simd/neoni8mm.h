// NEON with smmla, which multiplies two rows of 8 bytes by two others: twice the products of an sdot. Names and
// meanings: base/simd/scalar.h. Include only from *arm_neoni8mm.cc files.
#pragma once

#include "base/simd/neon_vectors.h"

namespace tersor {
namespace {

inline constexpr int kStepColumns = 8;

inline void store_joined_quarter(uint8_t* p, uint8x16_t x, uint8x16_t y) {
  const uint32x4_t a = vreinterpretq_u32_u8(x), b = vreinterpretq_u32_u8(y);
  vst1q_u8(p, vreinterpretq_u8_u32(vzip1q_u32(a, b)));
  vst1q_u8(p + 16, vreinterpretq_u8_u32(vzip2q_u32(a, b)));
}
inline void store_joined(uint8_t* p, Codes x, Codes y) {
  store_joined_quarter(p, x.a, y.a);
  store_joined_quarter(p + 32, x.b, y.b);
  store_joined_quarter(p + 64, x.c, y.c);
  store_joined_quarter(p + 96, x.d, y.d);
}
inline Codes as_codes(Signed s) {
  return {vreinterpretq_u8_s8(s.a), vreinterpretq_u8_s8(s.b), vreinterpretq_u8_s8(s.c), vreinterpretq_u8_s8(s.d)};
}
inline void store_joined(uint8_t* p, Signed x, Signed y) { store_joined(p, as_codes(x), as_codes(y)); }

// An smmla has of rows r, r + 1 and activations m, m + 1: r m, r (m + 1), (r + 1) m, (r + 1) (m + 1).
inline I even_of(const int32x4_t (&s)[8]) {
  return {vuzp1q_s32(s[0], s[1]), vuzp1q_s32(s[2], s[3]), vuzp1q_s32(s[4], s[5]), vuzp1q_s32(s[6], s[7])};
}
inline I odd_of(const int32x4_t (&s)[8]) {
  return {vuzp2q_s32(s[0], s[1]), vuzp2q_s32(s[2], s[3]), vuzp2q_s32(s[4], s[5]), vuzp2q_s32(s[6], s[7])};
}
template <int kSteps, int kRows>
inline void joined_dots(const uint8_t* codes, const int8_t* x, I (&out)[kIntTile]) {
  static_assert(kIntTile == 4);
  int32x4_t first[8], second[8];
  for (int i = 0; i < 8; ++i) first[i] = second[i] = vdupq_n_s32(0);
#pragma GCC unroll 1
  for (int step = 0; step < kSteps; ++step, codes += 128, x += 8 * kRows) {
    const int8x16_t x0 = vld1q_s8(x), x1 = vld1q_s8(x + 16);
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      const int8x16_t w = vld1q_s8((const int8_t*)codes + 16 * i);
      first[i] = vmmlaq_s32(first[i], w, x0);
      second[i] = vmmlaq_s32(second[i], w, x1);
    }
  }
  out[0] = even_of(first);
  out[1] = odd_of(first);
  out[2] = even_of(second);
  out[3] = odd_of(second);
}

}  // namespace
}  // namespace tersor
