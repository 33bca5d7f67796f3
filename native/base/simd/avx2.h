// AVX2. Names and meanings: base/simd/scalar.h. Include only from *x86_avx2.cc files.
#pragma once

#include "base/simd/ahead.h"
#include "base/simd/avx2_vectors.h"

namespace tersor {
namespace {

// int16 sums of two products each, so that 8 steps of 4-bit codes fit: 8 * 2 * 15 * 127 = 30480; 2 steps of 6-bit:
// 32004.
struct Dot {
  __m256i a, b;
};
inline constexpr bool kDotIsInt = false;
template <int kBits>
inline constexpr int kDotSteps = kBits <= 4 ? 8 : 2;
inline Dot dot(Dot s, Codes w, Four x) {
  s = {_mm256_add_epi16(s.a, _mm256_maddubs_epi16(w.a, x)), _mm256_add_epi16(s.b, _mm256_maddubs_epi16(w.b, x))};
  pin(s.a);
  pin(s.b);
  return s;
}
inline Dot dot(Codes w, Four x) {
  Dot s = {_mm256_maddubs_epi16(w.a, x), _mm256_maddubs_epi16(w.b, x)};
  pin(s.a);
  pin(s.b);
  return s;
}
inline I widen(Dot d) {
  const __m256i ones = _mm256_set1_epi16(1);
  return {_mm256_madd_epi16(d.a, ones), _mm256_madd_epi16(d.b, ones)};
}

// |w| * (x with the sign of w): |w| <= 128 and |x| <= 127, so two products are at most 32512 and do not saturate.
struct Signed {
  Codes w, magnitude;
};
inline constexpr int kSignedBias = 0;
inline Signed to_signed(Codes c) { return {c, {_mm256_abs_epi8(c.a), _mm256_abs_epi8(c.b)}}; }
inline Signed load_signed(const uint8_t* p) { return to_signed(load_codes(p)); }
using Table = __m256i;
inline Table load_table(const int8_t* p) { return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)p)); }
inline Signed lookup(Table t, Codes c) { return to_signed({_mm256_shuffle_epi8(t, c.a), _mm256_shuffle_epi8(t, c.b)}); }
inline __m256i dot_signed_half(__m256i s, __m256i w, __m256i magnitude, __m256i x) {
  const __m256i pairs = _mm256_maddubs_epi16(magnitude, _mm256_sign_epi8(x, w));
  return _mm256_add_epi32(s, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
inline I dot_signed(I s, Signed w, Four x) {
  s = {dot_signed_half(s.a, w.w.a, w.magnitude.a, x), dot_signed_half(s.b, w.w.b, w.magnitude.b, x)};
  pin(s.a);
  pin(s.b);
  return s;
}

// Codes and activations as int16, columns 0 and 2 of every row and columns 1 and 3: as many instructions as with bytes,
// which need the signs of the codes put on the activations, but fewer for the multipliers.
inline constexpr int kSignedBytes = 2;
struct Opened {
  __m256i even_a, even_b, odd_a, odd_b;
};
inline __m256i even_columns(__m256i w) { return _mm256_srai_epi16(_mm256_slli_epi16(w, 8), 8); }
inline void store_opened(uint8_t* p, Signed w) {
  _mm256_storeu_si256((__m256i*)p, even_columns(w.w.a));
  _mm256_storeu_si256((__m256i*)(p + 32), even_columns(w.w.b));
  _mm256_storeu_si256((__m256i*)(p + 64), _mm256_srai_epi16(w.w.a, 8));
  _mm256_storeu_si256((__m256i*)(p + 96), _mm256_srai_epi16(w.w.b, 8));
}
inline Opened load_opened(const uint8_t* p) {
  const Codes even = load_codes(p), odd = load_codes(p + 64);
  return {even.a, even.b, odd.a, odd.b};
}
inline I dot_opened(I s, Opened w, const int8_t* x) {
  const __m256i even = load_four(x);
  s = {_mm256_add_epi32(s.a, _mm256_madd_epi16(w.even_a, even)),
       _mm256_add_epi32(s.b, _mm256_madd_epi16(w.even_b, even))};
  pin(s.a);
  pin(s.b);
  const __m256i odd = load_four(x + 4);
  s = {_mm256_add_epi32(s.a, _mm256_madd_epi16(w.odd_a, odd)), _mm256_add_epi32(s.b, _mm256_madd_epi16(w.odd_b, odd))};
  pin(s.a);
  pin(s.b);
  return s;
}
// Of every four activations 0, 2, 1 and 3. n: a multiple of 16.
inline void widen_fours(const int8_t* x, int64_t n, int8_t* to) {
  const __m256i order =
      _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15));
  for (int64_t i = 0; i < n; i += 16) {
    const __m256i words = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)(x + i)));
    _mm256_storeu_si256((__m256i*)(to + 2 * i), _mm256_shuffle_epi8(words, order));
  }
}

inline constexpr Ahead kAhead = {1, 1536, 0, 0};

inline constexpr int kIntTile = 4;   // 8 registers of sums, 4 of codes, the activations
inline constexpr int kFineTile = 2;  // 8 registers of dots

}  // namespace
}  // namespace tersor
