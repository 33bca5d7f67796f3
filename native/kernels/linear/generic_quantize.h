// Activations to integers. Include after a header of base/simd/; see kernels.h.
//
// A group whose largest magnitude is below 1e-30 becomes 0, since the inverse of its scale might be infinite.
#pragma once

#include "kernels/linear/kernels.h"

namespace tersor::linear {
namespace {

inline constexpr float kTiny = 1e-30f;
inline constexpr float kHigh = 127, kBoth = 127 * 128;  // largest q in 8 bits, and in 15
// A chunk holds outliers when its largest square is above so many times the mean of those of the row's chunks: on
// SmolLM2 2 % of the chunks, which make half of the error of 8 bits.
inline constexpr float kOutlier = 8;

// The 32 values of chunk c, 0 beyond k.
inline void load_chunk(const float* x, int64_t k, int64_t c, F& a, F& b) {
  const int64_t left = k - c * 32;
  a = left >= 16 ? load(x + c * 32) : load_n(x + c * 32, int(left));
  b = left >= 32 ? load(x + c * 32 + 16) : left > 16 ? load_n(x + c * 32 + 16, int(left - 16)) : zero();
}

inline float largest_of(const F& a, const F& b) { return max_of(max(abs(a), abs(b))); }

// q = 128 high + low of sixteen values, high = round(q / 128), so that both fit a byte. Returns the sum of q.
inline int32_t split(const F& x, const F& inverse, int8_t* high, int8_t* low) {
  const I q = round_to_int(mul(x, inverse));
  const I h = round_to_int(mul(to_float(q), set(1.0f / 128)));
  store_i8(high, h);
  store_i8(low, round_to_int(fma(to_float(h), set(-128.0f), to_float(q))));  // exact
  return sum_int(q);
}

// Writes the 32 codes of a row to an entry of a tile: kStepColumns columns a step.
inline void spread(const int8_t* codes, int row, int8_t* entry) {
  constexpr int kColumns = kStepColumns;
  for (int c = 0; c < 32; c += kColumns) memcpy(entry + kTileRows * c + kColumns * row, codes + c, kColumns);
}

// The largest magnitude of every chunk of a row. Returns the mean of their squares.
inline double largest_of_chunks(const float* x, int64_t k, float* largest) {
  const int64_t chunks = (k + 31) / 32;
  double squares = 0;
  for (int64_t c = 0; c < chunks; ++c) {
    F a, b;
    load_chunk(x, k, c, a, b);
    largest[c] = largest_of(a, b);
    squares += double(largest[c]) * largest[c];
  }
  return squares / double(chunks);
}

// inverse[c] = range / largest[c], 0 for a tiny one; 16 values at a time, beyond the chunks too.
inline void invert(const float* largest, int64_t chunks, float range, float* inverse) {
  for (int64_t c = 0; c < chunks; c += 16) {
    const F m = load(largest + c);
    store(inverse + c, select_less(set(kTiny), m, div(set(range), m), zero()));
  }
}

// sums (2, kTileRows) of an entry: over each half of the 32 columns of every row. A line of 64 bytes is two steps of
// four columns, or one of eight.
inline void sum_entry(const int8_t* codes, int32_t* sums) {
  static constexpr int8_t kOnes[4] = {1, 1, 1, 1};
  static_assert(kTileRows == 8);
  alignas(64) int32_t lanes[16];
  for (int half = 0; half < 2; ++half) {
    I total = int_zero();
    for (int line = 2 * half; line < 2 * half + 2; ++line)
      total = dot_signed(total, load_signed((const uint8_t*)codes + 64 * line), load_four(kOnes));
    store_int(lanes, total);
    for (int row = 0; row < 8; ++row) {
      const int32_t both = kStepColumns == 4 ? lanes[row] + lanes[8 + row] : lanes[2 * row] + lanes[2 * row + 1];
      sums[8 * half + row] = both - 16 * kSignedBias;
    }
  }
}

void quantize_fine(const float* x, int64_t k, bool always_low, int8_t* codes, uint8_t* low, float* scale,
                   int32_t* sums) {
  const auto limit = float(always_low ? -1 : kOutlier * largest_of_chunks(x, k, scale));
  for (int64_t c = 0; c * 32 < k; ++c, codes += 64, sums += 2) {
    F a, b;
    load_chunk(x, k, c, a, b);
    const float largest = largest_of(a, b);
    const bool tiny = !(largest > kTiny);
    scale[c] = largest / kBoth;
    low[c] = largest * largest > limit && !tiny;
    if (low[c]) {
      const F inverse = set(kBoth / largest);
      sums[0] = split(a, inverse, codes, codes + 32);
      sums[1] = split(b, inverse, codes + 16, codes + 48);
      continue;
    }
    const F inverse = set(tiny ? 0.0f : kHigh / largest);
    const I qa = round_to_int(mul(a, inverse)), qb = round_to_int(mul(b, inverse));
    store_i8(codes, qa);
    store_i8(codes + 16, qb);
    memset(codes + 32, 0, 32);
    sums[0] = 128 * sum_int(qa);
    sums[1] = 128 * sum_int(qb);
  }
}

int64_t quantize_tile(const float* x, int64_t stride, int n, int64_t k, const TileBuffers& to) {
  const int64_t chunks = (k + 31) / 32, padded = (chunks + 15) / 16 * 16;
  float* largest = to.scratch;
  float* inverse = to.scratch + padded;
  if (n < kTileRows) {
    memset(to.codes, 0, chunks * 32 * kTileRows);
    memset(to.scale, 0, chunks * kTileRows * sizeof(float));
  }
  int64_t entries = chunks;
  for (int64_t c = 0; c < chunks; ++c) to.chunk[c] = 0;  // until the end: a bit for every row with outliers in c
  for (int row = 0; row < n; ++row) {
    const float* values = x + row * stride;
    const auto limit = float(kOutlier * largest_of_chunks(values, k, largest));
    invert(largest, chunks, kHigh, inverse);
    for (int64_t c = 0; c < chunks; ++c) {
      to.scale[c * kTileRows + row] = largest[c] / kHigh;
      if (largest[c] * largest[c] > limit && inverse[c] != 0) {
        to.chunk[c] |= 1 << row;
        continue;
      }
      alignas(32) int8_t bytes[32];
      F a, b;
      load_chunk(values, k, c, a, b);
      const F factor = set(inverse[c]);
      store_i8(bytes, round_to_int(mul(a, factor)));
      store_i8(bytes + 16, round_to_int(mul(b, factor)));
      spread(bytes, row, to.codes + c * 32 * kTileRows);
    }
  }
  for (int64_t c = 0; c < chunks; ++c) {
    const int32_t rows = to.chunk[c];
    to.chunk[c] = int32_t(c);
    if (rows == 0) continue;
    const int64_t e = entries++;
    to.chunk[e] = int32_t(c);
    int8_t* codes = to.codes + e * 32 * kTileRows;
    memset(codes, 0, 32 * kTileRows);
    for (int row = 0; row < kTileRows; ++row) {
      to.scale[e * kTileRows + row] = 0;
      if (!(rows >> row & 1)) continue;
      alignas(32) int8_t high[32], low[32];
      F a, b;
      load_chunk(x + row * stride, k, c, a, b);
      const float most = largest_of(a, b);
      const F factor = set(kBoth / most);
      split(a, factor, high, low);
      split(b, factor, high + 16, low + 16);
      spread(high, row, to.codes + c * 32 * kTileRows);
      spread(low, row, codes);
      to.scale[e * kTileRows + row] = most / kBoth;
    }
  }
  for (int64_t e = 0; e < entries; ++e) sum_entry(to.codes + e * 32 * kTileRows, to.sums + 2 * e * kTileRows);
  return entries;
}

}  // namespace
}  // namespace tersor::linear
