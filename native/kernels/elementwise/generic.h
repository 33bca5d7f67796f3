// The elementwise ops, once, sixteen values at a time. Included by one file per instruction set, after base/simd/.
#pragma once

#include "base/simd/math.h"
#include "kernels/elementwise/kernels.h"

namespace tersor::elementwise {
namespace {

// Calls f(at, count) for runs of 16 values and a shorter last one.
template <typename Function>
inline void each16(int64_t n, Function f) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) f(i, 16);
  if (i < n) f(i, int(n - i));
}

inline F load_some(const float* p, int n) { return n == 16 ? load(p) : load_n(p, n); }
inline void store_some(float* p, const F& x, int n) { n == 16 ? store(p, x) : store_n(p, x, n); }

void rms_norm(const float* x, int64_t d, const float* weight, float eps, float* y) {
  F squares = zero();
  each16(d, [&](int64_t i, int n) {
    const F v = load_some(x + i, n);
    squares = fma(v, v, squares);
  });
  const F factor = set(1.0f / __builtin_sqrtf(sum(squares) / float(d) + eps));
  each16(d, [&](int64_t i, int n) {
    store_some(y + i, mul(mul(load_some(x + i, n), factor), load_some(weight + i, n)), n);
  });
}

void gated(const float* gate, const float* up, int64_t n, Activation activation, float* y) {
  each16(n, [&](int64_t i, int count) {
    const F g = load_some(gate + i, count);
    store_some(y + i, mul(activation == kSilu ? silu(g) : gelu_tanh(g), load_some(up + i, count)), count);
  });
}

void add_to(float* x, const float* y, int64_t n) {
  each16(n, [&](int64_t i, int count) {
    store_some(x + i, add(load_some(x + i, count), load_some(y + i, count)), count);
  });
}

void softcap(float* x, int64_t n, float cap) {
  const F scale = set(cap), inverse = set(1.0f / cap);
  each16(n, [&](int64_t i, int count) {
    store_some(x + i, mul(scale, tanh(mul(load_some(x + i, count), inverse))), count);
  });
}

void rotate(float* x, int64_t half, const float* cosines, const float* sines) {
  each16(half, [&](int64_t i, int n) {
    const F a = load_some(x + i, n), b = load_some(x + half + i, n), c = load_some(cosines + i, n),
            s = load_some(sines + i, n);
    store_some(x + i, sub(mul(a, c), mul(b, s)), n);
    store_some(x + half + i, fma(b, c, mul(a, s)), n);
  });
}

#define TERSOR_ELEMENTWISE_KERNELS {rms_norm, gated, add_to, softcap, rotate}

}  // namespace
}  // namespace tersor::elementwise
