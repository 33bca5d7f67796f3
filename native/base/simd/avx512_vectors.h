// Sixteen floats as one AVX-512 register. Names and meanings: base/simd/scalar.h. Included by avx512vnni.h and amx.h.
#pragma once

#ifdef TERSOR_EMULATE
#include "base/simd/emulated_avx512.h"
#else
#include <immintrin.h>
#endif

#include <cstdint>
#include <cstring>

namespace tersor {
namespace {

struct F {
  __m512 a;
};
struct I {
  __m512i a;
};
struct Codes {
  __m512i a;
};

inline F set(float x) { return {_mm512_set1_ps(x)}; }
inline F zero() { return {_mm512_setzero_ps()}; }
inline F load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline __mmask16 first_lanes(int n) { return __mmask16((1u << n) - 1); }
inline F load_n(const float* p, int n) { return {_mm512_maskz_loadu_ps(first_lanes(n), p)}; }
inline F load_f16(const uint16_t* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))}; }
inline F load_e4m3(const uint8_t* p) {
  const __m256i x = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)p));
  const __m256i sign = _mm256_and_si256(_mm256_slli_epi16(x, 8), _mm256_set1_epi16(int16_t(0x8000)));
  return {_mm512_cvtph_ps(_mm256_or_si256(sign, _mm256_and_si256(_mm256_slli_epi16(x, 7), _mm256_set1_epi16(0x3f80))))};
}
inline F load_bf16(const uint16_t* p) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16))};
}
inline void store(float* p, F x) { _mm512_storeu_ps(p, x.a); }
inline void store_n(float* p, F x, int n) { _mm512_mask_storeu_ps(p, first_lanes(n), x.a); }
inline void store_f16(uint16_t* p, F x) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(x.a, _MM_FROUND_TO_NEAREST_INT));
}

inline F add(F x, F y) { return {_mm512_add_ps(x.a, y.a)}; }
inline F sub(F x, F y) { return {_mm512_sub_ps(x.a, y.a)}; }
inline F mul(F x, F y) { return {_mm512_mul_ps(x.a, y.a)}; }
inline F div(F x, F y) { return {_mm512_div_ps(x.a, y.a)}; }
inline F fma(F x, F y, F z) { return {_mm512_fmadd_ps(x.a, y.a, z.a)}; }
inline F near_div(F x, F y) {
#ifdef TERSOR_EMULATE
  return div(x, y);
#else  // Newton's step doubles the 14 bits
  const __m512 r = _mm512_rcp14_ps(y.a);
  return mul(x, {_mm512_fmadd_ps(r, _mm512_fnmadd_ps(y.a, r, _mm512_set1_ps(1.0f)), r)});
#endif
}
inline F max(F x, F y) { return {_mm512_max_ps(x.a, y.a)}; }
inline F min(F x, F y) { return {_mm512_min_ps(x.a, y.a)}; }
inline F abs(F x) { return {_mm512_abs_ps(x.a)}; }
inline F select_less(F x, F y, F a, F b) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(x.a, y.a, _CMP_LT_OQ), b.a, a.a)};
}
inline bool any_less(F x, F y) { return _mm512_cmp_ps_mask(x.a, y.a, _CMP_LT_OQ) != 0; }
inline __m256 low_half(F x) { return _mm512_castps512_ps256(x.a); }
inline __m256 high_half(F x) { return _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(x.a), 1)); }
inline float sum(F x) {
  const __m256 s = _mm256_add_ps(low_half(x), high_half(x));
  __m128 h = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
  h = _mm_add_ps(h, _mm_movehl_ps(h, h));
  return _mm_cvtss_f32(_mm_add_ss(h, _mm_movehdup_ps(h)));
}
inline float max_of(F x) {
  const __m256 s = _mm256_max_ps(low_half(x), high_half(x));
  __m128 h = _mm_max_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
  h = _mm_max_ps(h, _mm_movehl_ps(h, h));
  return _mm_cvtss_f32(_mm_max_ss(h, _mm_movehdup_ps(h)));
}
inline double sum_f64(F x) {
  alignas(64) float v[16];
  _mm512_store_ps(v, x.a);
  double s = 0;
  for (float one : v) s += one;
  return s;
}

inline I round_to_int(F x) { return {_mm512_cvtps_epi32(x.a)}; }
inline F to_float(I x) { return {_mm512_cvtepi32_ps(x.a)}; }
inline F scale_by_power(F x, I n) {
  return mul(x, {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(n.a, _mm512_set1_epi32(127)), 23))});
}
inline F round(F x) { return {_mm512_roundscale_ps(x.a, _MM_FROUND_TO_NEAREST_INT)}; }
inline F scale_by_power(F x, F n) { return {_mm512_scalef_ps(x.a, n.a)}; }
inline void store_i8(int8_t* p, I x) { _mm_storeu_si128((__m128i*)p, _mm512_cvtsepi32_epi8(x.a)); }

inline void store_i16(int16_t* p, I x) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtsepi32_epi16(x.a)); }

using Four = __m512i;
inline Four load_four(const int8_t* p) {
  int32_t x;
  memcpy(&x, p, 4);
  return _mm512_set1_epi32(x);
}

// vpdpbusd sums in int32: nothing overflows within a group.
using Dot = I;
inline constexpr bool kDotIsInt = true;
template <int kBits>
inline constexpr int kDotSteps = 8;
inline Codes load_codes(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
inline void store_codes(uint8_t* p, Codes c) { _mm512_storeu_si512(p, c.a); }
template <int N>
inline Codes bits_of(Codes c, int mask) {
  const __m512i shifted = N > 0   ? _mm512_srli_epi16(c.a, N > 0 ? N : 0)
                          : N < 0 ? _mm512_slli_epi16(c.a, N < 0 ? -N : 0)
                                  : c.a;
  return {_mm512_and_si512(shifted, _mm512_set1_epi8(char(mask)))};
}
inline Codes join(Codes a, Codes b) { return {_mm512_or_si512(a.a, b.a)}; }
inline Dot dot(Dot s, Codes w, Four x) {
#ifdef TERSOR_EMULATE
  return {_mm512_dpbusd_epi32(s.a, w.a, x)};
#else  // from the intrinsic, GCC 12 copies every sum to another register and back
  asm("vpdpbusd %2, %1, %0" : "+v"(s.a) : "v"(w.a), "v"(x));
  return s;
#endif
}
inline Dot dot(Codes w, Four x) { return dot({_mm512_setzero_si512()}, w, x); }
inline I widen(Dot d) { return d; }
inline I add(I x, I y) { return {_mm512_add_epi32(x.a, y.a)}; }
inline I set_int(int32_t x) { return {_mm512_set1_epi32(x)}; }
inline I times128(I x) { return {_mm512_slli_epi32(x.a, 7)}; }
inline I load_int(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
inline void store_int(int32_t* p, I x) { _mm512_storeu_si512(p, x.a); }
inline int32_t sum_int(I x) {
  const __m256i h = _mm256_add_epi32(_mm512_castsi512_si256(x.a), _mm512_extracti64x4_epi64(x.a, 1));
  __m128i q = _mm_add_epi32(_mm256_castsi256_si128(h), _mm256_extracti128_si256(h, 1));
  q = _mm_add_epi32(q, _mm_shuffle_epi32(q, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(q, _mm_shuffle_epi32(q, 0xb1)));
}
inline I mul(I x, I y) { return {_mm512_mullo_epi32(x.a, y.a)}; }
inline I widen_i8(const int8_t* p) { return {_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p))}; }
inline I widen_u8(const uint8_t* p) { return {_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p))}; }
inline I widen_low(const uint8_t* p) {
  return {_mm512_cvtepu8_epi32(_mm_and_si128(_mm_loadu_si128((const __m128i*)p), _mm_set1_epi8(15)))};
}
inline I widen_high(const uint8_t* p) {
  return {_mm512_srli_epi32(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)), 4)};
}

// vpdpbusd wants unsigned codes: w + 128 is w with its top bit flipped.
using Signed = Codes;
inline constexpr int kSignedBias = 128;
inline I int_zero() { return {_mm512_setzero_si512()}; }
inline Signed load_signed(const uint8_t* p) {
  return {_mm512_xor_si512(_mm512_loadu_si512(p), _mm512_set1_epi8(-128))};
}
inline void store_opened(uint8_t* p, Signed w) { store_codes(p, w); }
inline constexpr int kSignedBytes = 1;
using Opened = Signed;
inline Opened load_opened(const uint8_t* p) { return load_codes(p); }
using Table = __m512i;
inline Table load_table(const int8_t* p) {
  const __m128i t = _mm_xor_si128(_mm_loadu_si128((const __m128i*)p), _mm_set1_epi8(-128));
  return _mm512_broadcast_i32x4(t);
}
inline Signed lookup(Table t, Codes c) { return {_mm512_shuffle_epi8(t, c.a)}; }
inline I dot_signed(I s, Signed w, Four x) { return dot(s, w, x); }
inline I dot_opened(I s, Opened w, const int8_t* x) { return dot_signed(s, w, load_four(x)); }
inline constexpr void (*widen_fours)(const int8_t*, int64_t, int8_t*) = nullptr;

inline constexpr int kStepColumns = 4;

struct Pairs {
  __m512i a;
};
inline Pairs load_pairs(const int8_t* p) { return {_mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)p))}; }
inline Pairs load_nibble_pairs(const uint8_t* p) {
  const __m512i x = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
  return {_mm512_and_si512(_mm512_or_si512(x, _mm512_slli_epi32(x, 12)), _mm512_set1_epi32(0x000f000f))};
}
inline Pairs set_pair(const int16_t* p) {
  int32_t x;
  memcpy(&x, p, 4);
  return {_mm512_set1_epi32(x)};
}
inline I dot_pairs(I s, Pairs x, Pairs y) {
#ifdef TERSOR_EMULATE
  return {_mm512_dpwssd_epi32(s.a, x.a, y.a)};
#else  // from the intrinsic, GCC 12 copies every sum to another register and back
  asm("vpdpwssd %2, %1, %0" : "+v"(s.a) : "v"(x.a), "v"(y.a));
  return s;
#endif
}

inline constexpr int kIntTile = 8;   // 8 registers of sums, 8 of dots
inline constexpr int kFineTile = 4;  // 8 registers of dots
inline constexpr int kFloatTile = 12;

inline constexpr int kWideRows = 6, kWideVectors = 4;  // 24 registers of sums each
inline constexpr int kTallRows = 12, kTallVectors = 2;

}  // namespace
}  // namespace tersor
