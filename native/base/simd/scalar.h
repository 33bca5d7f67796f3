// Sixteen floats at a time in plain C++: the meaning of every name in base/simd/, and the code for any other CPU.
//
// Each header of this directory defines the same names in an unnamed namespace. A kernel's ISA file includes one of
// them and then the kernel's generic.h, so that no two ISA files share a symbol.
//
//   F: 16 floats     I: 16 int32     Codes: 16 rows x 4 bytes, one k4-step of a weight panel (byte row*4 + j is column
//   j)
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "base/float16.h"
#include "base/simd/ahead.h"

namespace tersor {
namespace {

struct F {
  float v[16];
};
struct I {
  int32_t v[16];
};
struct Codes {
  uint8_t v[64];
};

#define TERSOR_EACH for (int i = 0; i < 16; ++i)

inline F set(float x) {
  F r;
  TERSOR_EACH r.v[i] = x;
  return r;
}
inline F zero() { return set(0); }
inline F load(const float* p) {
  F r;
  memcpy(r.v, p, 64);
  return r;
}
// The first n (0..16) values, the others 0.
inline F load_n(const float* p, int n) {
  F r = zero();
  memcpy(r.v, p, n * 4);
  return r;
}
inline F load_f16(const uint16_t* p) {
  F r;
  TERSOR_EACH r.v[i] = f16_to_f32(p[i]);
  return r;
}
inline F load_e4m3(const uint8_t* p) {  // / 256, and not of NaN: base/float16.h
  F r;
  TERSOR_EACH r.v[i] = f16_to_f32(e4m3_to_f16_256th(p[i]));
  return r;
}
inline F load_bf16(const uint16_t* p) {
  F r;
  TERSOR_EACH r.v[i] = bf16_to_f32(p[i]);
  return r;
}
inline void store(float* p, const F& a) { memcpy(p, a.v, 64); }
inline void store_n(float* p, const F& a, int n) { memcpy(p, a.v, n * 4); }
inline void store_f16(uint16_t* p, const F& a) { TERSOR_EACH p[i] = f32_to_f16(a.v[i]); }

inline F add(F a, const F& b) {
  TERSOR_EACH a.v[i] += b.v[i];
  return a;
}
inline F sub(F a, const F& b) {
  TERSOR_EACH a.v[i] -= b.v[i];
  return a;
}
inline F mul(F a, const F& b) {
  TERSOR_EACH a.v[i] *= b.v[i];
  return a;
}
inline F div(F a, const F& b) {
  TERSOR_EACH a.v[i] /= b.v[i];
  return a;
}
// x / y up to two more roundings, where that is faster; y is normal.
inline F near_div(const F& x, const F& y) { return div(x, y); }
// a * b + c; fused where the CPU does it.
inline F fma(F a, const F& b, const F& c) {
  TERSOR_EACH a.v[i] = a.v[i] * b.v[i] + c.v[i];
  return a;
}
// The second argument when either is NaN.
inline F max(F a, const F& b) {
  TERSOR_EACH a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
  return a;
}
inline F min(F a, const F& b) {
  TERSOR_EACH a.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i];
  return a;
}
inline F abs(F a) {
  TERSOR_EACH a.v[i] = std::fabs(a.v[i]);
  return a;
}
// x < y ? a : b, lane by lane.
inline F select_less(const F& x, const F& y, const F& a, F b) {
  TERSOR_EACH b.v[i] = x.v[i] < y.v[i] ? a.v[i] : b.v[i];
  return b;
}
inline bool any_less(const F& x, const F& y) {
  bool any = false;
  TERSOR_EACH any |= x.v[i] < y.v[i];
  return any;
}
inline float sum(F a) {
  for (int half = 8; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) a.v[i] += a.v[i + half];
  return a.v[0];
}
inline float max_of(F a) {
  for (int half = 8; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) a.v[i] = a.v[i] > a.v[i + half] ? a.v[i] : a.v[i + half];
  return a.v[0];
}
// Sum of the 16 values in float64.
inline double sum_f64(const F& a) {
  double s = 0;
  TERSOR_EACH s += a.v[i];
  return s;
}

// Nearest integer, ties to even.
inline I round_to_int(const F& a) {
  I r;
  TERSOR_EACH r.v[i] = int32_t(std::nearbyint(a.v[i]));
  return r;
}
inline F to_float(const I& a) {
  F r;
  TERSOR_EACH r.v[i] = float(a.v[i]);
  return r;
}
// a * 2^n for -126 <= n <= 127.
inline F scale_by_power(F a, const I& n) {
  TERSOR_EACH a.v[i] *= bits_to_float(uint32_t(n.v[i] + 127) << 23);
  return a;
}
// Nearest integer as a float, ties to even.
inline F round(F a) {
  TERSOR_EACH a.v[i] = std::nearbyint(a.v[i]);
  return a;
}
// a * 2^n for whole n <= 127 and a near 1; 0 or subnormal below -126.
inline F scale_by_power(F a, const F& n) {
  TERSOR_EACH a.v[i] = n.v[i] < -126 ? 0.0f : a.v[i] * bits_to_float(uint32_t(int32_t(n.v[i]) + 127) << 23);
  return a;
}
// Sixteen integers in [-128, 127] to bytes.
inline void store_i8(int8_t* p, const I& a) { TERSOR_EACH p[i] = int8_t(a.v[i]); }
// Sixteen integers in [-32768, 32767] to int16.
inline void store_i16(int16_t* p, const I& a) { TERSOR_EACH p[i] = int16_t(a.v[i]); }

// ---- Integer dot products of a weight panel: 16 rows by 4 columns at a time ----

// Four activations, the same for all rows.
struct Four {
  int8_t v[4];
};
inline Four load_four(const int8_t* p) {
  Four r;
  memcpy(r.v, p, 4);
  return r;
}

// Unsigned codes < 64. `Dot` holds kDotSteps<bits> k4-steps without overflow; `widen` gives the sums.
using Dot = I;
inline constexpr bool kDotIsInt = true;  // Dot is I, so that a sum may begin with any number
template <int kBits>
inline constexpr int kDotSteps = 8;
inline Codes load_codes(const uint8_t* p) {
  Codes r;
  memcpy(r.v, p, 64);
  return r;
}
inline void store_codes(uint8_t* p, const Codes& c) { memcpy(p, c.v, 64); }
// Every byte shifted right by N (left by -N) and masked, N in -7..7.
template <int N>
inline Codes bits_of(Codes c, int mask) {
  for (uint8_t& v : c.v) v = (N >= 0 ? v >> (N >= 0 ? N : 0) : v << (N < 0 ? -N : 0)) & mask;
  return c;
}
inline Codes join(Codes a, const Codes& b) {
  for (int i = 0; i < 64; ++i) a.v[i] |= b.v[i];
  return a;
}
inline Dot dot(Dot sum, const Codes& w, const Four& x) {
  for (int i = 0; i < 64; ++i) sum.v[i / 4] += int32_t(w.v[i]) * x.v[i % 4];
  return sum;
}
inline Dot dot(const Codes& w, const Four& x) { return dot(Dot{}, w, x); }
inline I widen(const Dot& d) { return d; }
inline I add(I a, const I& b) {
  TERSOR_EACH a.v[i] += b.v[i];
  return a;
}
inline I set_int(int32_t x) {
  I r;
  TERSOR_EACH r.v[i] = x;
  return r;
}
// a * 128
inline I times128(I a) {
  TERSOR_EACH a.v[i] *= 128;
  return a;
}
inline I load_int(const int32_t* p) {
  I r;
  memcpy(r.v, p, 64);
  return r;
}
inline void store_int(int32_t* p, const I& a) { memcpy(p, a.v, 64); }
inline int32_t sum_int(const I& a) {
  int32_t s = 0;
  TERSOR_EACH s += a.v[i];
  return s;
}
inline I mul(I a, const I& b) {
  TERSOR_EACH a.v[i] *= b.v[i];
  return a;
}
// Sixteen bytes as integers: signed, unsigned, and the low and the high nibbles.
inline I widen_i8(const int8_t* p) {
  I r;
  TERSOR_EACH r.v[i] = p[i];
  return r;
}
inline I widen_u8(const uint8_t* p) {
  I r;
  TERSOR_EACH r.v[i] = p[i];
  return r;
}
inline I widen_low(const uint8_t* p) {
  I r;
  TERSOR_EACH r.v[i] = p[i] & 15;
  return r;
}
inline I widen_high(const uint8_t* p) {
  I r;
  TERSOR_EACH r.v[i] = p[i] >> 4;
  return r;
}

// Signed codes: dot_signed sums (w + kSignedBias) * x.
using Signed = Codes;
inline constexpr int kSignedBias = 0;
inline I int_zero() { return I{}; }
inline Signed load_signed(const uint8_t* p) { return load_codes(p); }
// Signed codes of a step as many rows are multiplied by them: 64 * kSignedBytes bytes that store_opened writes and
// load_opened reads. dot_opened is dot_signed with four activations as int8 at x, or, where kSignedBytes is 2, as int16
// in the order in which `widen_fours` puts them.
inline constexpr int kSignedBytes = 1;
using Opened = Signed;
inline void store_opened(uint8_t* p, const Signed& w) { store_codes(p, w); }
inline Opened load_opened(const uint8_t* p) { return load_codes(p); }
// 16 signed bytes, indexed by 4-bit codes.
struct Table {
  uint8_t v[16];
};
inline Table load_table(const int8_t* p) {
  Table r;
  memcpy(r.v, p, 16);
  return r;
}
inline Signed lookup(const Table& t, Codes c) {
  for (int i = 0; i < 64; ++i) c.v[i] = t.v[c.v[i]];
  return c;
}
inline I dot_signed(I sum, const Signed& w, const Four& x) {
  for (int i = 0; i < 64; ++i) sum.v[i / 4] += int32_t(int8_t(w.v[i])) * x.v[i % 4];
  return sum;
}
inline I dot_opened(const I& sum, const Opened& w, const int8_t* x) { return dot_signed(sum, w, load_four(x)); }
inline constexpr void (*widen_fours)(const int8_t*, int64_t, int8_t*) = nullptr;

// Columns of a step as many rows are multiplied: 4, or 8, where two steps of codes are joined to one. store_joined then
// writes their 128 bytes, signed or below 64; joined_dots sums kSteps of those times the codes of kIntTile activation
// rows at x, of kRows that are 8 bytes apart.
inline constexpr int kStepColumns = 4;

// Sixteen pairs of int16: of int8 in memory, or one pair for all.
struct Pairs {
  int16_t v[32];
};
inline Pairs load_pairs(const int8_t* p) {
  Pairs r;
  for (int i = 0; i < 32; ++i) r.v[i] = p[i];
  return r;
}
// Of 16 bytes: the low half of each and then its high half, unsigned.
inline Pairs load_nibble_pairs(const uint8_t* p) {
  Pairs r;
  for (int i = 0; i < 32; ++i) r.v[i] = p[i / 2] >> (i % 2 * 4) & 15;
  return r;
}
inline Pairs set_pair(const int16_t* p) {
  Pairs r;
  for (int i = 0; i < 32; ++i) r.v[i] = p[i % 2];
  return r;
}
inline I dot_pairs(I sum, const Pairs& x, const Pairs& y) {
  TERSOR_EACH sum.v[i] += int32_t(x.v[2 * i]) * y.v[2 * i] + int32_t(x.v[2 * i + 1]) * y.v[2 * i + 1];
  return sum;
}

#undef TERSOR_EACH

inline constexpr Ahead kAhead = {8, 1536, 0, 0};

// Register tiles: activation rows by 16 outputs. Without vector registers there is nothing to keep in them.
inline constexpr int kIntTile = 1;   // of 8-bit activations
inline constexpr int kFineTile = 1;  // of 15-bit activations
inline constexpr int kFloatTile = 1;

// Register tiles of attention: rows by vectors of 16, when the rows are few and when they are many.
inline constexpr int kWideRows = 1, kWideVectors = 1;
inline constexpr int kTallRows = 1, kTallVectors = 1;

}  // namespace
}  // namespace tersor
