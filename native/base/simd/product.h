// Products of a few rows with a narrow panel of floats, for linear and attention. Include after a header of base/simd/.
#pragma once

#include "base/float16.h"

namespace tersor {
namespace {

template <Float kFloat>
inline F load_as(const void* values, int64_t at) {
  if constexpr (kFloat == kF32) return load((const float*)values + at);
  if constexpr (kFloat == kF16) return load_f16((const uint16_t*)values + at);
  if constexpr (kFloat == kE4M3) return load_e4m3((const uint8_t*)values + at);  // / 256
  return load_bf16((const uint16_t*)values + at);
}

// What is multiplied: sums (n, 16) += x (n, k) w (k, 16), each with its stride in values between rows.
struct Product {
  const void* w;
  int64_t w_stride, k;
  const float* x;
  int64_t x_stride;
  float* sums;
  int64_t sums_stride;
};

template <Float kFloat, int M>
void product_tile(const Product& p, int64_t row) {
  const float* x = p.x + row * p.x_stride;
  float* out = p.sums + row * p.sums_stride;
  F sums[M];
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m) sums[m] = load(out + m * p.sums_stride);
  for (int64_t i = 0; i < p.k; ++i) {
    const F w = load_as<kFloat>(p.w, i * p.w_stride);
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m) sums[m] = fma(set(x[m * p.x_stride + i]), w, sums[m]);
  }
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m) store(out + m * p.sums_stride, sums[m]);
}

// Rows [row, n). Each sum is taken over k in ascending order, whatever n is.
template <Float kFloat, int M = kFloatTile>
void product(const Product& p, int64_t row, int64_t n) {
  for (; n - row >= M; row += M) product_tile<kFloat, M>(p, row);
  if constexpr (M > 1) product<kFloat, M - 1>(p, row, n);
}

}  // namespace
}  // namespace tersor
