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
  if constexpr (kStepColumns == 8) {
    joined_dots<kSteps / 2, kTileRows>(codes, x, dots);
    for (int m = 0; m < kIntTile; ++m) dots[m] = add(dots[m], set_int(start[m]));
  } else if constexpr (kClass == 2 || kDotIsInt) {
#pragma GCC unroll 8
    for (int m = 0; m < kIntTile; ++m) dots[m] = set_int(start[m]);
#pragma GCC unroll 1
    for (int step = 0; step < kSteps; ++step) {
      if constexpr (kClass == 2) {
        const Opened w = load_opened(codes + 64 * kSignedBytes * step);
#pragma GCC unroll 8
        for (int m = 0; m < kIntTile; ++m)
          dots[m] = dot_opened(dots[m], w, x + 4 * kSignedBytes * (kTileRows * step + m));
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
#pragma GCC unroll 8
      for (int step = first; step < first + kHeld; ++step) {
        const Codes w = load_codes(codes + 64 * step);
#pragma GCC unroll 8
        for (int m = 0; m < kIntTile; ++m) {
          const Four q = load_four(x + 4 * (kTileRows * step + m));
          sums[m] = step == first ? dot(w, q) : dot(sums[m], w, q);
        }
      }
      for (int m = 0; m < kIntTile; ++m) dots[m] = add(dots[m], widen(sums[m]));
    }
  }
}

// Entries of all tiles, at most, that are multiplied before the next come: their part of the panel is in L1 then. About
// 1.05 times the speed on a Zen 3; where one register tile holds all rows of a tile this has not been measured.
inline constexpr int64_t kEntries = kIntTile < kTileRows ? 24 : INT64_MAX / 2;

// Adds the entries [first, last) to the sums of rows [row, row + kIntTile) of the tile.
template <int kClass, int kParts, bool kSecond>
inline void tile_rows(const OpenPanel& panel, const Tile& x, int row, int64_t first, int64_t last, F* row_sums) {
  F sums[kIntTile];
#pragma GCC unroll 8
  for (int m = 0; m < kIntTile; ++m) sums[m] = row_sums[m];
  constexpr int kBytes = kOpenBytes<kClass>;
  const int8_t* codes = x.codes + kBytes * (32 * kTileRows * first + kStepColumns * row);
  const float* x_scale = x.scale + kTileRows * first + row;
  for (int64_t e = first; e < last; ++e, codes += 32 * kBytes * kTileRows, x_scale += kTileRows) {
    const int64_t chunk = x.chunk[e];
    const uint8_t* w = panel.codes + 512 * kBytes * chunk;
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
      tile_dots<kClass, 4>(w + 256 * kBytes, codes + 16 * kBytes * kTileRows, start + kTileRows, dots);
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
#pragma GCC unroll 8
  for (int m = 0; m < kIntTile; ++m) row_sums[m] = sums[m];
}

// The first n rows of the tiles. Of the last kIntTile of them those that miss are computed and dropped.
template <int kClass, int kParts, bool kSecond>
void tile(const OpenPanel& panel, const Tile* tiles, int n, const Finish& finish) {
  F sums[kTilesHeld * kTileRows];
  for (int row = 0; row < n; row += kIntTile)
    for (int m = 0; m < kIntTile; ++m) sums[row + m] = zero();
  int64_t entries = 0;
  for (int t = 0; t * kTileRows < n; ++t) entries = tiles[t].entries > entries ? tiles[t].entries : entries;
  const int64_t pieces = (entries + kEntries - 1) / kEntries;
  for (int64_t piece = 0; piece < pieces; ++piece) {
    const int64_t first = entries * piece / pieces, last = entries * (piece + 1) / pieces;
    for (int row = 0; row < n; row += kIntTile) {
      const Tile& x = tiles[row / kTileRows];
      tile_rows<kClass, kParts, kSecond>(panel, x, row % kTileRows, first, last < x.entries ? last : x.entries,
                                         sums + row);
    }
  }
  for (int row = 0; row < n; ++row) finish_row(sums[row], finish, row);
}

}  // namespace
}  // namespace tersor::linear
