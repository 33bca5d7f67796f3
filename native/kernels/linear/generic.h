// The algorithm of `linear`, once. Included by one file per instruction set, after its base/simd/ header: everything
// here has internal linkage, so that no instruction leaks into another file.
//
// Every output is summed over k in ascending order by one accumulator, whatever the number of activation rows: a row
// of a large product has the same bits as that row alone.
#pragma once

#include "base/simd/product.h"
#include "kernels/linear/kernels.h"

namespace tersor::linear {
namespace {

inline void finish_row(const F& sums, const Finish& f, int64_t row) {
  F y = mul(sums, load(f.scale));
  if (f.bias) y = add(y, load(f.bias));
  const int64_t at = row * f.stride;
  if (f.rows == kPanelRows) {
    if (f.residual) y = add(y, load(f.residual + at));
    store(f.y + at, y);
  } else {
    if (f.residual) y = add(y, load_n(f.residual + at, f.rows));
    store_n(f.y + at, y, f.rows);
  }
}

// ---- Integer panels ----

// dots[m] = sum over one group of code * x of row m. The loops over lines are kept as loops: GCC 12 then knows which
// sums are hot and keeps them in registers (AVX2, u4, 4 rows: 80 instead of 62 GMAC/s).
template <Code kCode, int kGroup, int M>
inline void group_dots(const uint8_t* codes, const Table& table, const int8_t* x, int64_t stride, I (&dots)[M]) {
  if constexpr (kCode == kU4) {
    Dot sums[M];
    for (int m = 0; m < M; ++m) sums[m] = dot_zero();
#pragma GCC unroll 1
    for (int line = 0; line < kGroup / 8; ++line) {
      const Codes low = load_low(codes + 64 * line), high = load_high(codes + 64 * line);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        const int8_t* at = x + m * stride + 8 * line;
        sums[m] = dot(dot(sums[m], low, load_four(at)), high, load_four(at + 4));
      }
    }
    for (int m = 0; m < M; ++m) dots[m] = widen(sums[m]);
  } else if constexpr (kCode == kU6) {
    constexpr int kSteps = kDotSteps<6> < kGroup / 4 ? kDotSteps<6> : kGroup / 4;
    for (int m = 0; m < M; ++m) dots[m] = int_zero();
#pragma GCC unroll 4
    for (int first = 0; first < kGroup / 4; first += kSteps) {
      Dot sums[M];
      for (int m = 0; m < M; ++m) sums[m] = dot_zero();
#pragma GCC unroll 8
      for (int step = first; step < first + kSteps; ++step) {
        const Codes w = load_codes(codes + 64 * step);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) sums[m] = dot(sums[m], w, load_four(x + m * stride + 4 * step));
      }
      for (int m = 0; m < M; ++m) dots[m] = add(dots[m], widen(sums[m]));
    }
  } else if constexpr (kCode == kS8) {
    for (int m = 0; m < M; ++m) dots[m] = int_zero();
#pragma GCC unroll 1
    for (int step = 0; step < kGroup / 4; ++step) {
      const Signed w = load_signed(codes + 64 * step);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) dots[m] = dot_signed(dots[m], w, load_four(x + m * stride + 4 * step));
    }
  } else {
    for (int m = 0; m < M; ++m) dots[m] = int_zero();
#pragma GCC unroll 1
    for (int line = 0; line < kGroup / 8; ++line) {
      const Signed low = lookup(table, load_low(codes + 64 * line));
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) dots[m] = dot_signed(dots[m], low, load_four(x + m * stride + 8 * line));
      const Signed high = lookup(table, load_high(codes + 64 * line));
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) dots[m] = dot_signed(dots[m], high, load_four(x + m * stride + 8 * line + 4));
    }
  }
}

// M activation rows by the 16 rows of a panel. Per group g, with s_x, q of the activations and s, second of the panel:
//   sums += s_x * (s * (sum code*q + offset * sum q) + second * sum q)        kMin; kNone without the last term
//   sums += s_x * s * (sum code*q + (offset - second) * sum q)                kZero
// The inner integers are below 2^24, so float32 holds them exactly.
template <Code kCode, int kGroup, Second kSecond, int M>
void integer_tile(const IntegerPanel& p, const Activations& x, int64_t row, const Finish& finish) {
  constexpr bool kSignedCode = kCode == kS8 || kCode == kT4;
  constexpr bool kOffset = kSignedCode ? kSignedBias != 0 || kSecond == kMin : kSecond == kNone;
  const F offset = set(p.offset - (kSignedCode ? kSignedBias : 0));
  const Table table = kCode == kT4 ? load_table(p.table) : Table{};
  const uint8_t* block = p.blocks;
  const int64_t stride = 32 * x.groups;
  const int8_t* codes = x.codes + row * stride;
  const float* scale = x.scale + row * x.groups;
  const int64_t sum_stride = kGroup == 32 ? x.groups : 2 * x.groups;
  const float* sum = x.sums[kGroup == 32] + row * sum_stride;
  F sums[M];
  for (int m = 0; m < M; ++m) sums[m] = zero();
  for (int64_t g = 0; g < p.groups; ++g) {
    I dots[M];
    group_dots<kCode, kGroup, M>(block, table, codes + kGroup * g, stride, dots);
    block += code_bytes(kCode) * kGroup;
    const F s = load_f16((const uint16_t*)block);
    block += 2 * kPanelRows;
    F second = zero();
    if constexpr (kSecond != kNone) {
      second = load_f16((const uint16_t*)block);
      block += 2 * kPanelRows;
    }
    if constexpr (kSecond == kZero) second = sub(offset, second);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const F sum_q = set(sum[m * sum_stride + g]);
      F t = to_float(dots[m]);
      if constexpr (kSecond == kZero)
        t = fma(second, sum_q, t);
      else if constexpr (kOffset)
        t = fma(offset, sum_q, t);
      t = mul(t, s);
      if constexpr (kSecond == kMin) t = fma(second, sum_q, t);
      sums[m] = fma(set(scale[m * x.groups + (kGroup == 32 ? g : g / 2)]), t, sums[m]);
    }
  }
  for (int m = 0; m < M; ++m) finish_row(sums[m], finish, row + m);
}

template <Code kCode, int kGroup, Second kSecond, int M = kIntTile>
void integer_rows(const IntegerPanel& p, const Activations& x, int64_t row, int n, const Finish& finish) {
  for (; n - row >= M; row += M) integer_tile<kCode, kGroup, kSecond, M>(p, x, row, finish);
  if constexpr (M > 1) integer_rows<kCode, kGroup, kSecond, M / 2>(p, x, row, n, finish);
}

template <Code kCode, int kGroup, Second kSecond>
void integer_panel(const IntegerPanel& p, const Activations& x, int n, const Finish& finish) {
  integer_rows<kCode, kGroup, kSecond>(p, x, 0, n, finish);
}

// A group whose largest magnitude is below 1e-30 becomes 0, since 127 / largest might be infinite.
void quantize(const float* x, int64_t k, int8_t* codes, float* scale, float* sums16, float* sums32) {
  for (int64_t g = 0; g * 32 < k; ++g) {
    const int64_t left = k - g * 32;
    const F a = left >= 16 ? load(x + g * 32) : load_n(x + g * 32, int(left));
    const F b = left >= 32 ? load(x + g * 32 + 16) : left > 16 ? load_n(x + g * 32 + 16, int(left - 16)) : zero();
    const float largest = max_of(max(abs(a), abs(b)));
    const F inverse = set(largest > 1e-30f ? 127.0f / largest : 0.0f);
    const I qa = round_to_int(mul(a, inverse)), qb = round_to_int(mul(b, inverse));
    store_i8(codes + g * 32, qa);
    store_i8(codes + g * 32 + 16, qb);
    scale[g] = largest / 127.0f;
    sums16[2 * g] = sum(to_float(qa));
    sums16[2 * g + 1] = sum(to_float(qb));
    sums32[g] = sums16[2 * g] + sums16[2 * g + 1];
  }
}

// ---- Float panels ----

inline constexpr int kBlockK = 256;  // columns at a time: 16 KiB of float32 weights stay in the first cache

template <Float kFloat>
void float_panel(const void* panel, int64_t k, const float* x, int64_t stride, int n, const Finish& finish) {
  alignas(64) float sums[kMaxRows * 16];
  alignas(64) float converted[kBlockK * 16];
  for (int m = 0; m < n; ++m) store(sums + 16 * m, zero());
  const bool convert = kFloat != kF32 && n > kFloatTile;  // else in registers, on the way
  for (int64_t first = 0; first < k; first += kBlockK) {
    const int64_t size = k - first < kBlockK ? k - first : kBlockK;
    const void* block = (const char*)panel + first * 16 * float_bytes(kFloat);
    if (convert) {
      for (int64_t i = 0; i < size; ++i) store(converted + 16 * i, load_as<kFloat>(block, 16 * i));
      product<kF32>({converted, 16, size, x + first, stride, sums, 16}, 0, n);
    } else {
      product<kFloat>({block, 16, size, x + first, stride, sums, 16}, 0, n);
    }
  }
  for (int m = 0; m < n; ++m) finish_row(load(sums + 16 * m), finish, m);
}

#define TERSOR_SECONDS(code, group) \
  {integer_panel<code, group, kNone>, integer_panel<code, group, kMin>, integer_panel<code, group, kZero>}
#define TERSOR_GROUPS(code) {TERSOR_SECONDS(code, 16), TERSOR_SECONDS(code, 32)}
#define TERSOR_LINEAR_KERNELS                                                                                   \
  {                                                                                                             \
      quantize,                                                                                                 \
      {TERSOR_GROUPS(kU4),                                                                                      \
       TERSOR_GROUPS(kU6),                                                                                      \
       TERSOR_GROUPS(kS8),                                                                                      \
       {{integer_panel<kT4, 16, kNone>, nullptr, nullptr}, {integer_panel<kT4, 32, kNone>, nullptr, nullptr}}}, \
      {float_panel<kF32>, float_panel<kF16>, float_panel<kBF16>},                                               \
  }

}  // namespace
}  // namespace tersor::linear
