// Sixteen floats as four NEON registers, with sdot: what all ARM sets share. Names and meanings: base/simd/scalar.h.
// Included by neondot.h and neoni8mm.h.
#pragma once

#include <arm_neon.h>

#include <cstdint>
#include <cstring>

#include "base/simd/ahead.h"

namespace tersor {
namespace {

struct F {
  float32x4_t a, b, c, d;  // values 0..3, 4..7, 8..11, 12..15
};
struct I {
  int32x4_t a, b, c, d;
};
struct Codes {
  uint8x16_t a, b, c, d;  // rows 0..3, 4..7, 8..11, 12..15
};

// f of the quarters of x (and y).
#define TERSOR_QUARTERS1(f, x) {f((x).a), f((x).b), f((x).c), f((x).d)}
#define TERSOR_QUARTERS2(f, x, y) {f((x).a, (y).a), f((x).b, (y).b), f((x).c, (y).c), f((x).d, (y).d)}

inline F set(float x) { return {vdupq_n_f32(x), vdupq_n_f32(x), vdupq_n_f32(x), vdupq_n_f32(x)}; }
inline F zero() { return set(0); }
inline F load(const float* p) { return {vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)}; }
inline F load_n(const float* p, int n) {
  float v[16] = {};
  for (int i = 0; i < n; ++i) v[i] = p[i];
  return load(v);
}
inline float32x4_t from_f16(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
inline F load_f16(const uint16_t* p) { return {from_f16(p), from_f16(p + 4), from_f16(p + 8), from_f16(p + 12)}; }
inline float16x8_t from_e4m3(uint16x8_t x) {
  const uint16x8_t sign = vandq_u16(vshlq_n_u16(x, 8), vdupq_n_u16(0x8000));
  return vreinterpretq_f16_u16(vorrq_u16(sign, vandq_u16(vshlq_n_u16(x, 7), vdupq_n_u16(0x3f80))));
}
inline F load_e4m3(const uint8_t* p) {
  const uint8x16_t x = vld1q_u8(p);
  const float16x8_t low = from_e4m3(vmovl_u8(vget_low_u8(x))), high = from_e4m3(vmovl_high_u8(x));
  return {vcvt_f32_f16(vget_low_f16(low)), vcvt_high_f32_f16(low), vcvt_f32_f16(vget_low_f16(high)),
          vcvt_high_f32_f16(high)};
}
inline float32x4_t from_bf16(const uint16_t* p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }
inline F load_bf16(const uint16_t* p) { return {from_bf16(p), from_bf16(p + 4), from_bf16(p + 8), from_bf16(p + 12)}; }
inline void store(float* p, F x) {
  vst1q_f32(p, x.a);
  vst1q_f32(p + 4, x.b);
  vst1q_f32(p + 8, x.c);
  vst1q_f32(p + 12, x.d);
}
inline void store_n(float* p, F x, int n) {
  float v[16];
  store(v, x);
  for (int i = 0; i < n; ++i) p[i] = v[i];
}
// The rounding mode of the CPU: to nearest, ties to even, unless the program changed it.
inline uint16x4_t to_f16(float32x4_t x) { return vreinterpret_u16_f16(vcvt_f16_f32(x)); }
inline void store_f16(uint16_t* p, F x) {
  vst1_u16(p, to_f16(x.a));
  vst1_u16(p + 4, to_f16(x.b));
  vst1_u16(p + 8, to_f16(x.c));
  vst1_u16(p + 12, to_f16(x.d));
}

inline F add(F x, F y) { return TERSOR_QUARTERS2(vaddq_f32, x, y); }
inline F sub(F x, F y) { return TERSOR_QUARTERS2(vsubq_f32, x, y); }
inline F mul(F x, F y) { return TERSOR_QUARTERS2(vmulq_f32, x, y); }
inline F div(F x, F y) { return TERSOR_QUARTERS2(vdivq_f32, x, y); }
inline F near_div(F x, F y) { return div(x, y); }
inline F fma(F x, F y, F z) {
  return {vfmaq_f32(z.a, x.a, y.a), vfmaq_f32(z.b, x.b, y.b), vfmaq_f32(z.c, x.c, y.c), vfmaq_f32(z.d, x.d, y.d)};
}
// Not vmaxq and vminq, which give NaN when either is NaN.
inline float32x4_t larger(float32x4_t x, float32x4_t y) { return vbslq_f32(vcgtq_f32(x, y), x, y); }
inline float32x4_t smaller(float32x4_t x, float32x4_t y) { return vbslq_f32(vcltq_f32(x, y), x, y); }
inline F max(F x, F y) { return TERSOR_QUARTERS2(larger, x, y); }
inline F min(F x, F y) { return TERSOR_QUARTERS2(smaller, x, y); }
inline F abs(F x) { return TERSOR_QUARTERS1(vabsq_f32, x); }
inline F select_less(F x, F y, F a, F b) {
  return {vbslq_f32(vcltq_f32(x.a, y.a), a.a, b.a), vbslq_f32(vcltq_f32(x.b, y.b), a.b, b.b),
          vbslq_f32(vcltq_f32(x.c, y.c), a.c, b.c), vbslq_f32(vcltq_f32(x.d, y.d), a.d, b.d)};
}
inline bool any_less(F x, F y) {
  const uint32x4_t low = vorrq_u32(vcltq_f32(x.a, y.a), vcltq_f32(x.b, y.b)),
                   high = vorrq_u32(vcltq_f32(x.c, y.c), vcltq_f32(x.d, y.d));
  return vmaxvq_u32(vorrq_u32(low, high)) != 0;
}
inline float sum(F x) { return vaddvq_f32(vaddq_f32(vaddq_f32(x.a, x.c), vaddq_f32(x.b, x.d))); }
inline float max_of(F x) {
  float32x4_t m = larger(larger(x.a, x.c), larger(x.b, x.d));
  m = larger(m, vextq_f32(m, m, 2));
  return vgetq_lane_f32(larger(m, vextq_f32(m, m, 1)), 0);
}
inline float64x2_t pairs_f64(float32x4_t x) { return vaddq_f64(vcvt_f64_f32(vget_low_f32(x)), vcvt_high_f64_f32(x)); }
inline double sum_f64(F x) {
  return vaddvq_f64(vaddq_f64(vaddq_f64(pairs_f64(x.a), pairs_f64(x.b)), vaddq_f64(pairs_f64(x.c), pairs_f64(x.d))));
}

inline I round_to_int(F x) { return TERSOR_QUARTERS1(vcvtnq_s32_f32, x); }
inline F to_float(I x) { return TERSOR_QUARTERS1(vcvtq_f32_s32, x); }
inline float32x4_t power(int32x4_t n) { return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(n, vdupq_n_s32(127)), 23)); }
inline F scale_by_power(F x, I n) {
  return {vmulq_f32(x.a, power(n.a)), vmulq_f32(x.b, power(n.b)), vmulq_f32(x.c, power(n.c)),
          vmulq_f32(x.d, power(n.d))};
}
inline F round(F x) { return TERSOR_QUARTERS1(vrndnq_f32, x); }
inline F scale_by_power(F x, F n) {  // the power of -127 is 0
  const F bounded = max(set(-127), n);
  return scale_by_power(x, round_to_int(bounded));
}
inline int16x8_t low_i16(I x) { return vcombine_s16(vqmovn_s32(x.a), vqmovn_s32(x.b)); }
inline int16x8_t high_i16(I x) { return vcombine_s16(vqmovn_s32(x.c), vqmovn_s32(x.d)); }
inline void store_i8(int8_t* p, I x) { vst1q_s8(p, vcombine_s8(vqmovn_s16(low_i16(x)), vqmovn_s16(high_i16(x)))); }
inline void store_i16(int16_t* p, I x) {
  vst1q_s16(p, low_i16(x));
  vst1q_s16(p + 8, high_i16(x));
}

using Four = int8x16_t;
inline Four load_four(const int8_t* p) {
  int32_t x;
  memcpy(&x, p, 4);
  return vreinterpretq_s8_s32(vdupq_n_s32(x));
}

// sdot sums in int32: nothing overflows within a group. Unsigned codes are below 64, so they are signed bytes as well.
using Dot = I;
inline constexpr bool kDotIsInt = true;
template <int kBits>
inline constexpr int kDotSteps = 8;
inline I int_zero() { return {vdupq_n_s32(0), vdupq_n_s32(0), vdupq_n_s32(0), vdupq_n_s32(0)}; }
inline Codes load_codes(const uint8_t* p) {
  return {vld1q_u8(p), vld1q_u8(p + 16), vld1q_u8(p + 32), vld1q_u8(p + 48)};
}
inline void store_codes(uint8_t* p, Codes x) {
  vst1q_u8(p, x.a);
  vst1q_u8(p + 16, x.b);
  vst1q_u8(p + 32, x.c);
  vst1q_u8(p + 48, x.d);
}
template <int N>
inline uint8x16_t shift_and_mask(uint8x16_t x, uint8x16_t mask) {
  if constexpr (N > 0) x = vshrq_n_u8(x, N);
  if constexpr (N < 0) x = vshlq_n_u8(x, -N);
  return vandq_u8(x, mask);
}
template <int N>
inline Codes bits_of(Codes x, int mask) {
  const uint8x16_t m = vdupq_n_u8(uint8_t(mask));
  return {shift_and_mask<N>(x.a, m), shift_and_mask<N>(x.b, m), shift_and_mask<N>(x.c, m), shift_and_mask<N>(x.d, m)};
}
inline Codes join(Codes x, Codes y) { return TERSOR_QUARTERS2(vorrq_u8, x, y); }
struct Signed {
  int8x16_t a, b, c, d;
};
inline Signed as_signed(Codes c) { return TERSOR_QUARTERS1(vreinterpretq_s8_u8, c); }
inline I dot_signed(I s, Signed w, Four x) {
  return {vdotq_s32(s.a, w.a, x), vdotq_s32(s.b, w.b, x), vdotq_s32(s.c, w.c, x), vdotq_s32(s.d, w.d, x)};
}
inline Dot dot(Dot s, Codes w, Four x) { return dot_signed(s, as_signed(w), x); }
inline Dot dot(Codes w, Four x) { return dot(int_zero(), w, x); }
inline I widen(Dot d) { return d; }
inline I add(I x, I y) { return TERSOR_QUARTERS2(vaddq_s32, x, y); }

inline I set_int(int32_t x) { return {vdupq_n_s32(x), vdupq_n_s32(x), vdupq_n_s32(x), vdupq_n_s32(x)}; }
inline int32x4_t quarter128(int32x4_t x) { return vshlq_n_s32(x, 7); }
inline I times128(I x) { return TERSOR_QUARTERS1(quarter128, x); }
inline I load_int(const int32_t* p) { return {vld1q_s32(p), vld1q_s32(p + 4), vld1q_s32(p + 8), vld1q_s32(p + 12)}; }
inline void store_int(int32_t* p, I x) {
  vst1q_s32(p, x.a);
  vst1q_s32(p + 4, x.b);
  vst1q_s32(p + 8, x.c);
  vst1q_s32(p + 12, x.d);
}
inline int32_t sum_int(I x) { return vaddvq_s32(vaddq_s32(vaddq_s32(x.a, x.b), vaddq_s32(x.c, x.d))); }
inline I mul(I x, I y) { return TERSOR_QUARTERS2(vmulq_s32, x, y); }
inline I from_i16(int16x8_t low, int16x8_t high) {
  return {vmovl_s16(vget_low_s16(low)), vmovl_high_s16(low), vmovl_s16(vget_low_s16(high)), vmovl_high_s16(high)};
}
inline I from_i8(int8x16_t x) { return from_i16(vmovl_s8(vget_low_s8(x)), vmovl_high_s8(x)); }
inline I from_u8(uint8x16_t x) {
  return from_i16(vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(x))), vreinterpretq_s16_u16(vmovl_high_u8(x)));
}
inline I widen_i8(const int8_t* p) { return from_i8(vld1q_s8(p)); }
inline I widen_u8(const uint8_t* p) { return from_u8(vld1q_u8(p)); }
inline I widen_low(const uint8_t* p) { return from_u8(vandq_u8(vld1q_u8(p), vdupq_n_u8(15))); }
inline I widen_high(const uint8_t* p) { return from_u8(vshrq_n_u8(vld1q_u8(p), 4)); }

inline constexpr int kSignedBias = 0;
inline Signed load_signed(const uint8_t* p) { return as_signed(load_codes(p)); }
inline void store_opened(uint8_t* p, Signed w) {
  vst1q_s8((int8_t*)p, w.a);
  vst1q_s8((int8_t*)p + 16, w.b);
  vst1q_s8((int8_t*)p + 32, w.c);
  vst1q_s8((int8_t*)p + 48, w.d);
}
inline constexpr int kSignedBytes = 1;
using Opened = Signed;
inline Opened load_opened(const uint8_t* p) { return load_signed(p); }
inline I dot_opened(I s, Opened w, const int8_t* x) { return dot_signed(s, w, load_four(x)); }
inline constexpr void (*widen_fours)(const int8_t*, int64_t, int8_t*) = nullptr;
using Table = int8x16_t;
inline Table load_table(const int8_t* p) { return vld1q_s8(p); }
inline Signed lookup(Table t, Codes c) {
  return {vqtbl1q_s8(t, c.a), vqtbl1q_s8(t, c.b), vqtbl1q_s8(t, c.c), vqtbl1q_s8(t, c.d)};
}

struct Pairs {
  int16x8_t a, b, c, d;
};
inline Pairs load_pairs(const int8_t* p) {
  const int8x16_t low = vld1q_s8(p), high = vld1q_s8(p + 16);
  return {vmovl_s8(vget_low_s8(low)), vmovl_high_s8(low), vmovl_s8(vget_low_s8(high)), vmovl_high_s8(high)};
}
inline int16x8_t widen_codes(uint8x8_t x) { return vreinterpretq_s16_u16(vmovl_u8(x)); }
inline Pairs load_nibble_pairs(const uint8_t* p) {
  const uint8x16_t x = vld1q_u8(p), low = vandq_u8(x, vdupq_n_u8(15)), high = vshrq_n_u8(x, 4);
  const uint8x16_t first = vzip1q_u8(low, high), second = vzip2q_u8(low, high);
  return {widen_codes(vget_low_u8(first)), widen_codes(vget_high_u8(first)), widen_codes(vget_low_u8(second)),
          widen_codes(vget_high_u8(second))};
}
inline Pairs set_pair(const int16_t* p) {
  int32_t x;
  memcpy(&x, p, 4);
  const int16x8_t v = vreinterpretq_s16_s32(vdupq_n_s32(x));
  return {v, v, v, v};
}
inline int32x4_t dot_pairs_quarter(int32x4_t s, int16x8_t x, int16x8_t y) {
  return vaddq_s32(s, vpaddq_s32(vmull_s16(vget_low_s16(x), vget_low_s16(y)), vmull_high_s16(x, y)));
}
inline I dot_pairs(I s, Pairs x, Pairs y) {
  return {dot_pairs_quarter(s.a, x.a, y.a), dot_pairs_quarter(s.b, x.b, y.b), dot_pairs_quarter(s.c, x.c, y.c),
          dot_pairs_quarter(s.d, x.d, y.d)};
}

#undef TERSOR_QUARTERS1
#undef TERSOR_QUARTERS2

inline constexpr Ahead kAhead = {8, 1536, 0, 0};

inline constexpr int kIntTile = 4;    // 16 registers of sums, 8 of codes, the activations; of 32
inline constexpr int kFineTile = 2;   // 16 registers of dots, 4 of codes, the activations
inline constexpr int kFloatTile = 6;  // 24 registers of sums, 4 of weights, the activation

inline constexpr int kWideRows = 3, kWideVectors = 2;  // 24 registers of sums each
inline constexpr int kTallRows = 6, kTallVectors = 1;

}  // namespace
}  // namespace tersor
