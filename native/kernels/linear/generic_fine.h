// Products of a few activation rows, held in 15 bits: memory is the limit there, so that twice the dot products cost
// nothing (of 2-bit codes and fewer they would: those see 15 bits in outliers only). Codes are taken out of their
// planes in registers. Include after generic_codes.h.
//
// With q = 128 high + low of the activations, per chunk:
//   sums += s_x * s * (start + 128 sum code*high + sum code*low) + second * (s_x * sum q),  start = offset * sum q
// The inner integers are exact: at most 255 * 16256 * 32 < 2^31.
#pragma once

#include "kernels/linear/generic_codes.h"
#include "kernels/linear/generic_finish.h"

namespace tersor::linear {
namespace {

// A step and those after it, until kEnd: code * high and code * low of M rows, added to those of the steps from kFirst
// on.
template <Code kCode, int kFirst, int kEnd, bool kLow, int M, int S = kFirst>
inline void unsigned_steps(const uint8_t* p, const int8_t* x, int64_t stride, Dot (&high)[M], Dot (&low)[M]) {
  const Codes w = unsigned_step<kCode, S>(p);
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m) {
    const Four of_high = load_four(x + m * stride + 4 * S);
    high[m] = S == kFirst ? dot(w, of_high) : dot(high[m], w, of_high);
    if constexpr (kLow) {
      const Four of_low = load_four(x + m * stride + 32 + 4 * S);
      low[m] = S == kFirst ? dot(w, of_low) : dot(low[m], w, of_low);
    }
  }
  if constexpr (S + 1 < kEnd) unsigned_steps<kCode, kFirst, kEnd, kLow, M, S + 1>(p, x, stride, high, low);
}

template <Code kCode, int S, int kEnd, bool kLow, int M>
inline void signed_steps(const uint8_t* p, const Table& table, const int8_t* x, int64_t stride, I (&high)[M],
                         I (&low)[M]) {
  const Signed w = signed_step<kCode, S>(p, table);
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m) {
    high[m] = dot_signed(high[m], w, load_four(x + m * stride + 4 * S));
    if constexpr (kLow) low[m] = dot_signed(low[m], w, load_four(x + m * stride + 32 + 4 * S));
  }
  if constexpr (S + 1 < kEnd) signed_steps<kCode, S + 1, kEnd, kLow, M>(p, table, x, stride, high, low);
}

// out[m] = 128 sum code*high + sum code*low over steps kFirst .. kEnd.
template <Code kCode, int kFirst, int kEnd, bool kLow, int M>
inline void fine_dots(const uint8_t* p, const Table& table, const int8_t* x, int64_t stride, I (&out)[M]) {
  if constexpr (code_class(kCode) == 2) {
    I high[M], low[M];
    for (int m = 0; m < M; ++m) high[m] = low[m] = int_zero();
    signed_steps<kCode, kFirst, kEnd, kLow, M>(p, table, x, stride, high, low);
    for (int m = 0; m < M; ++m) out[m] = kLow ? add(times128(high[m]), low[m]) : times128(high[m]);
  } else {
    constexpr int kHeld = kDotSteps < code_class(kCode) == 0 ? 4 : 6 >,
                  kStop = kEnd - kFirst > kHeld ? kFirst + kHeld : kEnd;
    Dot high[M], low[M];
    unsigned_steps<kCode, kFirst, kStop, kLow, M>(p, x, stride, high, low);
    for (int m = 0; m < M; ++m) out[m] = kLow ? add(times128(widen(high[m])), widen(low[m])) : times128(widen(high[m]));
    if constexpr (kStop < kEnd) {
      I rest[M];
      fine_dots<kCode, kStop, kEnd, kLow, M>(p, table, x, stride, rest);
      for (int m = 0; m < M; ++m) out[m] = add(out[m], rest[m]);
    }
  }
}

// The dots of a chunk: out[part * M + m], 16 rows each.
template <Code kCode, int kParts, bool kLow, int M>
inline void chunk_dots(const uint8_t* p, const Table& table, const int8_t* x, int64_t stride, int32_t* out) {
  I dots[M];
  fine_dots<kCode, 0, 8 / kParts, kLow, M>(p, table, x, stride, dots);
  for (int m = 0; m < M; ++m) store_int(out + 16 * m, dots[m]);
  if constexpr (kParts == 2) {
    fine_dots<kCode, 4, 8, kLow, M>(p, table, x, stride, dots);
    for (int m = 0; m < M; ++m) store_int(out + 16 * (M + m), dots[m]);
  }
}

// The codes of M rows from a chunk on.
struct FineCodes {
  const int8_t* codes;  // 64 per chunk, rows 64 * chunks apart
  const uint8_t* low;   // one per chunk, rows `chunks` apart
  int64_t chunks;
};

// Asks for what lies further on than these bytes of a panel whose codes have so many bits.
//
// A Zen 3 begins anew at every page, 1.13 times the speed of decoding with 4 bits on two threads. On a Granite Rapids
// it is 1.25 times with 4 bits or 2, from memory; 2 to 3 KiB ahead are best; asking for the scales too gives 4 % more
// with 2 or 6 bits, asking from the outer cache into the inner one 4 to 6 % with all. On a Zen 4 bytes gain 1.5, and
// asking for fewer bits is slower. Inlined always: GCC takes a call of this for one without effect and drops it.
[[gnu::always_inline]] inline void read_ahead(const uint8_t* p, int64_t bytes, int bits) {
  if (bits < kAhead.least_bits) return;
  for (int64_t i = 0; i < bytes; i += 64) {
    __builtin_prefetch(p + i + kAhead.codes, 0, 2);
    if constexpr (kAhead.near > 0) __builtin_prefetch(p + i + kAhead.near, 0, 3);
  }
}

// The dots of a block, chunk after chunk.
template <Code kCode, int kParts, int M>
void block_dots(const uint8_t* p, int64_t chunks, const Table& table, const FineCodes& x, int32_t* out) {
  const int8_t* codes = x.codes;
  for (int64_t c = 0; c < chunks; ++c, p += 64 * code_bits(kCode), codes += 64, out += 16 * kParts * M) {
    if constexpr (M == 1) read_ahead(p, 64 * code_bits(kCode), code_bits(kCode));
    if constexpr (code_bits(kCode) <= kCoarseBits) {
      uint8_t low = 0;
      for (int m = 0; m < M; ++m) low |= x.low[m * x.chunks + c];
      if (!low) {
        chunk_dots<kCode, kParts, false, M>(p, table, codes, 64 * x.chunks, out);
        continue;
      }
    }
    chunk_dots<kCode, kParts, true, M>(p, table, codes, 64 * x.chunks, out);
  }
}

template <int kParts, int M>
using BlockDots = void (*)(const uint8_t* p, int64_t chunks, const Table& table, const FineCodes& x, int32_t* out);
template <int kParts, int M>
const BlockDots<kParts, M> kBlockDots[kCodes] = {
    block_dots<kU1, kParts, M>, block_dots<kU2, kParts, M>, block_dots<kU3, kParts, M>, block_dots<kU4, kParts, M>,
    block_dots<kU5, kParts, M>, block_dots<kU6, kParts, M>, block_dots<kS8, kParts, M>, block_dots<kT4, kParts, M>};

// The activations of M rows from a chunk on.
struct FineRows {
  const float* scale;    // at [m * chunks + chunk]
  const int32_t* start;  // at [m * starts + kParts * chunk + part], and so sums
  const float* sums;
  int64_t chunks, starts;
};

// Adds a block's dots, times its scales at p, to the sums of M rows.
template <Scales kScales, Second kSecond, int kParts, int M>
inline void scale_block(const Layout& l, const uint8_t* p, int64_t chunks, const int32_t* dots, const FineRows& x,
                        F (&sums)[M]) {
  const int64_t groups = group_count(l, 32 * chunks);
  constexpr bool kPerGroup = per_group(kScales);
  const uint8_t* seconds = p + (kScales == kSingles ? 64 : 32) * groups;  // if kPerGroup; below of the others
  F total[M], minima[M];                                                  // of kSuper and kNibbles, without d and dmin
  const F d = kPerGroup ? zero() : load_f16((const uint16_t*)p);
  const F dmin = !kPerGroup && kSecond == kMin ? load_f16((const uint16_t*)(p + 32)) : zero();
  if constexpr (!kPerGroup) {
    p += kSecond == kMin ? 64 : 32;
    seconds = p + 16 * groups;
    for (int m = 0; m < M; ++m) total[m] = minima[m] = zero();
  }
  const F offset = set(float(l.offset));
  for (int64_t c = 0; c < chunks; ++c) {
    F t[M];
    I products[M];
    for (int m = 0; m < M; ++m) {
      t[m] = zero();
      products[m] = int_zero();
    }
#pragma GCC unroll 2
    for (int part = 0; part < kParts; ++part) {
      const int64_t g = kParts == 2 ? 2 * c + part : c * 32 / l.group;
      if constexpr (kPerGroup) {
        const F s = load_floats<kScales>(p, g);
        F second = zero();
        if constexpr (kSecond == kMin) second = load_floats<kScales>(seconds, g);
        if constexpr (kSecond == kZero) second = mul(s, sub(offset, to_float(widen_u8(seconds + 16 * g))));
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m, dots += 16) {
          const int64_t at = m * x.starts + kParts * c + part;
          const F value = to_float(add(load_int(dots), set_int(x.start[at])));
          t[m] = fma(value, s, t[m]);
          if constexpr (kSecond != kNone) sums[m] = fma(set(x.sums[at]), second, sums[m]);
        }
      } else {  // |dots * sub| < 2^31 for every type, both parts together
        const I scale = kScales == kNibbles ? widen_low(p + 16 * g) : widen_i8((const int8_t*)(p + 16 * g));
        F second = zero();
        if constexpr (kSecond == kMin)
          second = to_float(kScales == kNibbles ? widen_high(p + 16 * g) : widen_u8(seconds + 16 * g));
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m, dots += 16) {
          const int64_t at = m * x.starts + kParts * c + part;
          const I product = mul(add(load_int(dots), set_int(x.start[at])), scale);
          products[m] = add(products[m], product);
          if constexpr (kSecond == kMin) minima[m] = fma(set(x.sums[at]), second, minima[m]);
        }
      }
    }
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      const F factor = set(x.scale[m * x.chunks + c]);
      if constexpr (kPerGroup)
        sums[m] = fma(factor, t[m], sums[m]);
      else
        total[m] = fma(factor, to_float(products[m]), total[m]);
    }
  }
  if constexpr (!kPerGroup) {
    for (int m = 0; m < M; ++m) {
      sums[m] = fma(d, total[m], sums[m]);
      if constexpr (kSecond == kMin) sums[m] = sub(sums[m], mul(dmin, minima[m]));
    }
  }
}

// Rows [row, row + M).
template <Scales kScales, Second kSecond, int kParts, int M>
void fine_rows(const IntegerPanel& panel, const FineActivations& x, int64_t row, const Finish& finish) {
  const Layout& l = panel.layout;
  const Table table = table_of(l);
  const uint8_t* p = panel.blocks;
  const int64_t starts = kParts * x.chunks;
  alignas(64) int32_t dots[kBlockChunks * kParts * M * 16];
  F sums[M];
  for (int m = 0; m < M; ++m) sums[m] = zero();
  for (int64_t first = 0; first < panel.chunks; first += kBlockChunks) {
    const int64_t chunks = panel.chunks - first < kBlockChunks ? panel.chunks - first : kBlockChunks;
    const int64_t chunk = row * x.chunks + first;
    kBlockDots<kParts, M>[l.code](p, chunks, table, {x.codes + 64 * chunk, x.low + chunk, x.chunks}, dots);
    p += code_bytes(l, 32 * chunks);
    if constexpr (M == 1) read_ahead(p, scale_bytes(l, 32 * chunks), code_bits(l.code));
    const int64_t at = row * starts + kParts * first;
    scale_block<kScales, kSecond, kParts, M>(l, p, chunks, dots,
                                             {x.scale + chunk, x.start + at, x.sums + at, x.chunks, starts}, sums);
    p += scale_bytes(l, 32 * chunks);
  }
  for (int m = 0; m < M; ++m) finish_row(sums[m], finish, row + m);
}

template <Scales kScales, Second kSecond, int kParts, int M = kFineTile>
void fine_from(const IntegerPanel& panel, const FineActivations& x, int64_t row, int n, const Finish& finish) {
  for (; n - row >= M; row += M) fine_rows<kScales, kSecond, kParts, M>(panel, x, row, finish);
  if constexpr (M > 1) fine_from<kScales, kSecond, kParts, M / 2>(panel, x, row, n, finish);
}

template <Scales kScales, Second kSecond>
void fine_of(const IntegerPanel& panel, const FineActivations& x, int n, const Finish& finish) {
  panel.layout.group == 16 ? fine_from<kScales, kSecond, 2>(panel, x, 0, n, finish)
                           : fine_from<kScales, kSecond, 1>(panel, x, 0, n, finish);
}

void fine(const IntegerPanel& panel, const FineActivations& x, int n, const Finish& finish) {
  static constexpr FineKernel kOf[kScaleKinds][kSeconds] = {
      {fine_of<kHalves, kNone>, fine_of<kHalves, kMin>, fine_of<kHalves, kZero>},
      {fine_of<kSingles, kNone>, fine_of<kSingles, kMin>, fine_of<kSingles, kZero>},
      {fine_of<kSuper, kNone>, fine_of<kSuper, kMin>, nullptr},
      {nullptr, fine_of<kNibbles, kMin>, nullptr}};
  kOf[panel.layout.scales][panel.layout.second](panel, x, n, finish);
}

}  // namespace
}  // namespace tersor::linear
