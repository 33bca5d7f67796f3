// Products of many activation rows in 8 bits: a panel is opened once, to bytes and float32 scales, and then multiplied
// by every tile of rows. Include after generic_codes.h.
//
// Per entry of the tile (a chunk, or the second 8 bits of a chunk with outliers):
//   sums += s_x * s * (start + sum code*q) + second * (s_x * sum q)
// start = offset * sum q, so that the offset costs nothing. The inner integers are below 2^24: float32 holds them
// exactly. With 16 columns to a scale both halves are summed before s_x comes in.
#pragma once

#include "kernels/linear/generic_codes.h"
#include "kernels/linear/generic_finish.h"

namespace tersor::linear {
namespace {

// dots[m] = start[m] + sum of code * x over kSteps steps of kIntTile rows. Int is I, a parameter so that what an
// instruction set lacks is not compiled for it.
template <int kClass, int kSteps, typename Int>
inline void tile_dots(const uint8_t* codes, const int8_t* x, const int32_t* start, Int (&dots)[kIntTile]) {
  if constexpr (kClass == 2 || kDotIsInt) {
#pragma GCC unroll 8
    for (int m = 0; m < kIntTile; ++m) dots[m] = set_int(start[m]);
#pragma GCC unroll 1
    for (int step = 0; step < kSteps; ++step) {
      if constexpr (kClass == 2) {
        const Signed w = load_opened(codes + 64 * step);
#pragma GCC unroll 8
        for (int m = 0; m < kIntTile; ++m) dots[m] = dot_signed(dots[m], w, load_four(x + 4 * (kTileRows * step + m)));
      } else {
        const Codes w = load_codes(codes + 64 * step);
#pragma GCC unroll 8
        for (int m = 0; m < kIntTile; ++m) dots[m] = dot(dots[m], w, load_four(x + 4 * (kTileRows * step + m)));
      }
    }
  } else {
    constexpr int kHeld = kDotSteps < kClass == 0 ? 4 : 6 > < kSteps ? kDotSteps < kClass == 0 ? 4 : 6 > : kSteps;
    for (int m = 0; m < kIntTile; ++m) dots[m] = set_int(start[m]);
#pragma GCC unroll 4
    for (int first = 0; first < kSteps; first += kHeld) {
      Dot sums[kIntTile];
      for (int m = 0; m < kIntTile; ++m) sums[m] = dot_zero();
#pragma GCC unroll 8
      for (int step = first; step < first + kHeld; ++step) {
        const Codes w = load_codes(codes + 64 * step);
#pragma GCC unroll 8
        for (int m = 0; m < kIntTile; ++m) sums[m] = dot(sums[m], w, load_four(x + 4 * (kTileRows * step + m)));
      }
      for (int m = 0; m < kIntTile; ++m) dots[m] = add(dots[m], widen(sums[m]));
    }
  }
}

// Rows [row, row + kIntTile) of the tile; those from n on are computed and dropped.
template <int kClass, int kParts, bool kSecond>
void tile_rows(const OpenPanel& panel, const Tile& x, int row, int n, const Finish& finish) {
  F sums[kIntTile];
#pragma GCC unroll 8
  for (int m = 0; m < kIntTile; ++m) sums[m] = zero();
  const int8_t* codes = x.codes + 4 * row;
  const float* x_scale = x.scale + row;
  for (int64_t e = 0; e < x.entries; ++e, codes += 32 * kTileRows, x_scale += kTileRows) {
    const int64_t chunk = x.chunk[e];
    const uint8_t* w = panel.codes + 512 * chunk;
    const float* scale = panel.scale + 16 * kParts * chunk;
    const float* second = panel.second + 16 * kParts * chunk;
    const int32_t* start = x.start + kTileRows * kParts * e + row;
    const float* x_sums = x.sums + kTileRows * kParts * e + row;
    I dots[kIntTile];
    tile_dots<kClass, 8 / kParts>(w, codes, start, dots);
    const F s = load(scale);
    if constexpr (kParts == 1) {
#pragma GCC unroll 8
      for (int m = 0; m < kIntTile; ++m) sums[m] = fma(to_float(dots[m]), mul(s, set(x_scale[m])), sums[m]);
    } else {
      F t[kIntTile];
#pragma GCC unroll 8
      for (int m = 0; m < kIntTile; ++m) t[m] = mul(to_float(dots[m]), s);
      tile_dots<kClass, 4>(w + 256, codes + 16 * kTileRows, start + kTileRows, dots);
      const F s1 = load(scale + 16);
#pragma GCC unroll 8
      for (int m = 0; m < kIntTile; ++m) t[m] = fma(to_float(dots[m]), s1, t[m]);
#pragma GCC unroll 8
      for (int m = 0; m < kIntTile; ++m) sums[m] = fma(t[m], set(x_scale[m]), sums[m]);
    }
    if constexpr (kSecond) {
#pragma GCC unroll 2
      for (int part = 0; part < kParts; ++part) {
        const F minimum = load(second + 16 * part);
#pragma GCC unroll 8
        for (int m = 0; m < kIntTile; ++m) sums[m] = fma(minimum, set(x_sums[kTileRows * part + m]), sums[m]);
      }
    }
  }
  for (int m = 0; m < kIntTile && row + m < n; ++m) finish_row(sums[m], finish, row + m);
}

template <int kClass, int kParts, bool kSecond>
void tile(const OpenPanel& panel, const Tile& x, int n, const Finish& finish) {
  for (int row = 0; row < n; row += kIntTile) tile_rows<kClass, kParts, kSecond>(panel, x, row, n, finish);
}

}  // namespace
}  // namespace tersor::linear
