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

// Outputs [at, at + 16) of one row, but for the residual.
inline F scaled(const F& sums, const Finish& f, int64_t at = 0) {
  const F y = mul(sums, load(f.scale + at));
  return f.bias ? add(y, load(f.bias + at)) : y;
}

inline void finish_row(const F& sums, const Finish& f, int64_t row, int at = 0) {
  F y = scaled(sums, f, at);
  const int64_t i = row * f.stride + at;
  if (const int left = f.rows - at; left >= kPanelRows) {
    if (f.residual) y = add(y, load(f.residual + i));
    store(f.y + i, y);
  } else {
    if (f.residual) y = add(y, load_n(f.residual + i, left));
    store_n(f.y + i, y, left);
  }
}

}  // namespace
}  // namespace tersor::linear
