// What every kernel does at the end. Include after a header of base/simd/.
#pragma once

#include "kernels/linear/kernels.h"

namespace tersor::linear {
namespace {

// Of panel p of consecutive ones, when f is of the first and f.rows counts the rows of all.
inline Finish finish_of(const Finish& f, int p) {
  const int at = p * kPanelRows, left = f.rows - at;
  return {f.scale + at, f.bias ? f.bias + at : nullptr,       f.residual ? f.residual + at : nullptr, f.y + at,
          f.stride,     left < kPanelRows ? left : kPanelRows};
}

inline F scaled(const F& sums, const Finish& f) {
  const F y = mul(sums, load(f.scale));
  return f.bias ? add(y, load(f.bias)) : y;
}

inline void finish_row(const F& sums, const Finish& f, int64_t row) {
  F y = scaled(sums, f);
  const int64_t at = row * f.stride;
  if (f.rows == kPanelRows) {
    if (f.residual) y = add(y, load(f.residual + at));
    store(f.y + at, y);
  } else {
    if (f.residual) y = add(y, load_n(f.residual + at, f.rows));
    store_n(f.y + at, y, f.rows);
  }
}

}  // namespace
}  // namespace tersor::linear
