// Matrix tiles (AMX): eight registers of 16 rows of 64 bytes, and their products of bfloat16. Intel SDM vol. 1, chapter
// 18. Include only from *x86_amx.cc files.
#pragma once

#include "base/simd/ahead.h"
#include "base/simd/avx512_vectors.h"

namespace tersor {
namespace {

inline constexpr Ahead kAhead = {1, 3072, 640, 2048};

// 32 bfloat16.
struct Halves {
  __m512i a;
};
inline void store_halves(uint16_t* p, Halves h) { _mm512_storeu_si512(p, h.a); }

}  // namespace
}  // namespace tersor

#ifdef TERSOR_EMULATE
#include "base/simd/emulated_amx.h"
#endif

namespace tersor {
namespace {

#ifndef TERSOR_EMULATE

// What every thread needs before it uses tiles. What the thread had before comes back with the end of this: another
// library may set its tiles once and count on them (llama.cpp does).
class TilesInUse {
 public:
  TilesInUse() {
    asm volatile("sttilecfg %0" : "=m"(before_));
    Configuration ours;
    ours.palette = 1;
    for (int t = 0; t < 8; ++t) ours.bytes[t] = 64, ours.lines[t] = 16;
    asm volatile("ldtilecfg %0" ::"m"(ours) : "memory");
  }
  ~TilesInUse() {
    if (before_.palette)
      asm volatile("ldtilecfg %0" ::"m"(before_) : "memory");
    else
      asm volatile("tilerelease" ::: "memory");  // so that switches of threads stay cheap
  }

 private:
  struct alignas(64) Configuration {
    uint8_t palette = 0, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t lines[16] = {};
  };
  Configuration before_;
};

template <int T>
inline void clear_tile() {
  asm volatile("tilezero %%tmm%c0" ::"i"(T));
}
template <int T>
inline void load_tile(const void* p, int64_t line = 64) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(line), "i"(T) : "memory");
}
template <int T>
inline void store_tile(void* p, int64_t line = 64) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(line), "i"(T) : "memory");
}
// sums[m][n] += sum over k of x[m][k] w[k][n]; w's line k / 2 holds the pair of k and k + 1 of every n.
template <int kSums, int kX, int kW>
inline void multiply_tiles_bf16() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSums), "i"(kX), "i"(kW));
}
// The same of signed bytes, w's line k / 4 holding four k of every n, summed in int32.
template <int kSums, int kX, int kW>
inline void multiply_tiles_i8() {
  asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSums), "i"(kX), "i"(kW));
}

// Two times 16 floats as bfloat16, those of x first.
inline Halves to_bf16(F x, F y) { return {(__m512i)_mm512_cvtne2ps_pbh(y.a, x.a)}; }
// 0, 16, 1, 17, ..: from one vector after the other to pairs.
inline Halves paired(Halves h) {
  alignas(64) static constexpr uint16_t kOrder[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return {_mm512_permutexvar_epi16(_mm512_load_si512(kOrder), h.a)};
}

// From a tile of pairs, line p holding pair p of 16 columns, to one of 16 rows, line i holding the pairs of column i.
inline void transpose_pairs(const uint16_t* from, uint16_t* to) {
  __m512i x[16], y[16];
  for (int i = 0; i < 16; ++i) x[i] = _mm512_loadu_si512(from + 32 * i);
  for (int i = 0; i < 16; i += 2) {
    y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
    y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {  // to x[i + j]: of the lines i .. i + 3, in lane l, column 4 l + j
    x[i] = _mm512_unpacklo_epi64(y[i], y[i + 2]);
    x[i + 1] = _mm512_unpackhi_epi64(y[i], y[i + 2]);
    x[i + 2] = _mm512_unpacklo_epi64(y[i + 1], y[i + 3]);
    x[i + 3] = _mm512_unpackhi_epi64(y[i + 1], y[i + 3]);
  }
  for (int j = 0; j < 4; ++j) {
    const __m512i even = _mm512_shuffle_i32x4(x[j], x[4 + j], 0x88), odd = _mm512_shuffle_i32x4(x[j], x[4 + j], 0xdd);
    const __m512i later_even = _mm512_shuffle_i32x4(x[8 + j], x[12 + j], 0x88);
    const __m512i later_odd = _mm512_shuffle_i32x4(x[8 + j], x[12 + j], 0xdd);
    _mm512_storeu_si512(to + 32 * j, _mm512_shuffle_i32x4(even, later_even, 0x88));
    _mm512_storeu_si512(to + 32 * (4 + j), _mm512_shuffle_i32x4(odd, later_odd, 0x88));
    _mm512_storeu_si512(to + 32 * (8 + j), _mm512_shuffle_i32x4(even, later_even, 0xdd));
    _mm512_storeu_si512(to + 32 * (12 + j), _mm512_shuffle_i32x4(odd, later_odd, 0xdd));
  }
}

#endif  // TERSOR_EMULATE

inline F first_half(Halves h) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(h.a)), 16))};
}
inline F second_half(Halves h) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(h.a, 1)), 16))};
}

inline constexpr int kTile = 512;  // bfloat16 of a tile: 16 lines of 32, or of 16 pairs

// Rounds x and y to bfloat16 and stores them, x first; then what that leaves, kParts in all, each kTile further.
template <int kParts>
inline void store_parts(uint16_t* to, F x, F y) {
  const Halves h = to_bf16(x, y);
  store_halves(to, h);
  if constexpr (kParts > 1) store_parts<kParts - 1>(to + kTile, sub(x, first_half(h)), sub(y, second_half(h)));
}
// The same with those of x at the even places, those of y at the odd ones.
template <int kParts>
inline void store_paired_parts(uint16_t* to, F x, F y) {
  const Halves h = to_bf16(x, y);
  store_halves(to, paired(h));
  if constexpr (kParts > 1) store_paired_parts<kParts - 1>(to + kTile, sub(x, first_half(h)), sub(y, second_half(h)));
}

// Pairs of x at the even places and y at the odd ones in two parts, kTile apart: the first rounded, half way away from
// 0, the second cut off, so that it costs no move between lanes and NaN stays NaN.
inline void store_parted_pairs(uint16_t* to, F x, F y) {
  const __m512i upper = _mm512_set1_epi32(int32_t(0xffff0000)), half = _mm512_set1_epi32(0x8000);
  const auto bits = [](F v) { return _mm512_castps_si512(v.a); };
  const auto rounded = [&](F v) { return _mm512_and_si512(_mm512_add_epi32(bits(v), half), upper); };
  const auto pairs = [&](__m512i even, __m512i odd) {
    return Halves{_mm512_or_si512(_mm512_srli_epi32(even, 16), _mm512_and_si512(odd, upper))};
  };
  const __m512i a = rounded(x), b = rounded(y);
  store_halves(to, pairs(a, b));
  store_halves(to + kTile, pairs(bits(sub(x, {_mm512_castsi512_ps(a)})), bits(sub(y, {_mm512_castsi512_ps(b)}))));
}

// Up to 16 floats, the others 0.
inline F load_least(const float* p, int64_t n) { return n >= 16 ? load(p) : n > 0 ? load_n(p, int(n)) : zero(); }

// The codes of one of four columns, 16 rows.
template <int kColumn>
inline I column_of(Codes c) {
  if constexpr (kColumn == 3) return {_mm512_srli_epi32(c.a, 24)};
  const __m512i shifted = kColumn ? _mm512_srli_epi32(c.a, 8 * kColumn) : c.a;
  return {_mm512_and_si512(shifted, _mm512_set1_epi32(255))};
}

// Entry i % 16 of a table of 16 floats.
inline F lookup_float(F table, I i) { return {_mm512_permutexvar_ps(i.a, table.a)}; }
template <int kBits>
inline I shifted_right(Codes c) {
  return {kBits ? _mm512_srli_epi32(c.a, kBits) : c.a};
}

}  // namespace
}  // namespace tersor
