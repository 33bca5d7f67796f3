// Activations to integers with one scale for a whole row (Rounding: kToken, kTensor, kOutlier). Include after
// generic_quantize.h.
#pragma once

#include "kernels/linear/generic_quantize.h"

namespace tersor::linear {
namespace {

// x where its magnitude is below the threshold, else 0.
inline F below(const F& x, const F& threshold) { return select_less(abs(x), threshold, x, zero()); }

float largest_below(const float* x, int64_t k, float threshold) {
  const F limit = set(threshold);
  F largest = zero();
  int64_t i = 0;
  for (; i + 16 <= k; i += 16) largest = max(largest, below(abs(load(x + i)), limit));
  if (i < k) largest = max(largest, below(abs(load_n(x + i, int(k - i))), limit));
  return max_of(largest);
}

// round(x / step), cut off at 127; 0 for a tiny step.
inline I round_steps(const F& x, float step) {
  if (!(step > kTiny / kHigh)) return int_zero();
  return round_to_int(max(min(div(x, set(step)), set(kHigh)), set(-kHigh)));
}

void quantize_fine_row(const float* x, int64_t k, float step, int8_t* codes, uint8_t* low, float* scale,
                       int32_t* sums) {
  for (int64_t c = 0; c * 32 < k; ++c, codes += 64, sums += 2) {
    F a, b;
    load_chunk(x, k, c, a, b);
    const I qa = round_steps(a, step), qb = round_steps(b, step);
    store_i8(codes, qa);
    store_i8(codes + 16, qb);
    memset(codes + 32, 0, 32);
    low[c] = 0;
    scale[c] = step / 128;  // the codes are the high ones of q = 128 high + low
    sums[0] = 128 * sum_int(qa);
    sums[1] = 128 * sum_int(qb);
  }
}

// The outliers of one row and chunk in 15 bits: high and low codes as two entries of a tile, from entry e on.
inline void put_outliers(const F& a, const F& b, int row, int64_t e, const TileBuffers& to) {
  alignas(32) int8_t high[32], low[32];
  const float most = largest_of(a, b);
  const F factor = set(kBoth / most);
  split(a, factor, high, low);
  split(b, factor, high + 16, low + 16);
  spread(high, row, to.codes + e * 32 * kTileRows);
  spread(low, row, to.codes + (e + 1) * 32 * kTileRows);
  to.scale[e * kTileRows + row] = most / kHigh;
  to.scale[(e + 1) * kTileRows + row] = most / kBoth;
}

int64_t quantize_tile_rows(const float* x, int64_t stride, int n, int64_t k, const float* steps, float threshold,
                           const TileBuffers& to) {
  const int64_t chunks = (k + 31) / 32;
  const F limit = set(threshold);
  if (n < kTileRows) {
    memset(to.codes, 0, chunks * 32 * kTileRows);
    memset(to.scale, 0, chunks * kTileRows * sizeof(float));
  }
  int64_t entries = chunks;
  for (int64_t c = 0; c < chunks; ++c) {
    F apart[kTileRows][2];
    int rows = 0;  // a bit for every row with outliers here
    for (int row = 0; row < n; ++row) {
      alignas(32) int8_t bytes[32];
      F a, b;
      load_chunk(x + row * stride, k, c, a, b);
      const F low_a = below(a, limit), low_b = below(b, limit);
      apart[row][0] = sub(a, low_a);
      apart[row][1] = sub(b, low_b);
      if (largest_of(apart[row][0], apart[row][1]) > 0) rows |= 1 << row;
      store_i8(bytes, round_steps(low_a, steps[row]));
      store_i8(bytes + 16, round_steps(low_b, steps[row]));
      spread(bytes, row, to.codes + c * 32 * kTileRows);
      to.scale[c * kTileRows + row] = steps[row];
    }
    to.chunk[c] = int32_t(c);
    if (rows == 0) continue;
    memset(to.codes + entries * 32 * kTileRows, 0, 2 * 32 * kTileRows);
    for (int row = 0; row < kTileRows; ++row) {
      to.scale[entries * kTileRows + row] = to.scale[(entries + 1) * kTileRows + row] = 0;
      if (rows >> row & 1) put_outliers(apart[row][0], apart[row][1], row, entries, to);
    }
    to.chunk[entries] = to.chunk[entries + 1] = int32_t(c);
    entries += 2;
  }
  for (int64_t e = 0; e < entries; ++e) sum_entry(to.codes + e * 32 * kTileRows, to.sums + 2 * e * kTileRows);
  return entries;
}

}  // namespace
}  // namespace tersor::linear
