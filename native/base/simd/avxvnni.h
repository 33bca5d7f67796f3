// AVX-VNNI: AVX2 with vpdpbusd, as Intel's CPUs without AVX-512 have it since 2021. Names and meanings:
// base/simd/scalar.h. Include only from *x86_avxvnni.cc files. Without the compiler's -mavxvnni vpdpbusd is made of
// AVX2, for tests on other CPUs.
#pragma once

#include "base/simd/ahead.h"
#include "base/simd/avx2_vectors.h"

namespace tersor {
namespace {

inline __m256i dot_half(__m256i s, __m256i w, __m256i x) {
#ifdef __AVXVNNI__  // from the intrinsic, GCC 12 copies every sum to another register and back
  asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(s) : "x"(w), "x"(x));
  return s;
#else
  const __m256i even =
      _mm256_madd_epi16(_mm256_and_si256(w, _mm256_set1_epi16(255)), _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8));
  const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(w, 8), _mm256_srai_epi16(x, 8));
  return _mm256_add_epi32(s, _mm256_add_epi32(even, odd));
#endif
}

// vpdpbusd sums in int32: nothing overflows within a group.
using Dot = I;
inline constexpr bool kDotIsInt = true;
template <int kBits>
inline constexpr int kDotSteps = 8;
inline Dot dot(Dot s, Codes w, Four x) { return {dot_half(s.a, w.a, x), dot_half(s.b, w.b, x)}; }
inline Dot dot(Codes w, Four x) { return dot(int_zero(), w, x); }
inline I widen(Dot d) { return d; }

// vpdpbusd wants unsigned codes: w + 128 is w with its top bit flipped.
using Signed = Codes;
inline constexpr int kSignedBias = 128;
inline Signed load_signed(const uint8_t* p) {
  const __m256i top = _mm256_set1_epi8(-128);
  const Codes c = load_codes(p);
  return {_mm256_xor_si256(c.a, top), _mm256_xor_si256(c.b, top)};
}
using Table = __m256i;
inline Table load_table(const int8_t* p) {
  return _mm256_broadcastsi128_si256(_mm_xor_si128(_mm_loadu_si128((const __m128i*)p), _mm_set1_epi8(-128)));
}
inline Signed lookup(Table t, Codes c) { return {_mm256_shuffle_epi8(t, c.a), _mm256_shuffle_epi8(t, c.b)}; }
inline I dot_signed(I s, Signed w, Four x) { return dot(s, w, x); }

inline constexpr int kSignedBytes = 1;
using Opened = Signed;
inline void store_opened(uint8_t* p, Signed w) { store_codes(p, w); }
inline Opened load_opened(const uint8_t* p) { return load_codes(p); }
inline I dot_opened(I s, Opened w, const int8_t* x) { return dot(s, w, load_four(x)); }
inline constexpr void (*widen_fours)(const int8_t*, int64_t, int8_t*) = nullptr;

inline constexpr Ahead kAhead = {8, 1536, 0, 0};

inline constexpr int kIntTile = 4;   // 8 registers of dots, 2 of codes, the activations; sums wait in memory
inline constexpr int kFineTile = 2;  // 8 registers of dots

}  // namespace
}  // namespace tersor
