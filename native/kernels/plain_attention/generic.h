// A softmax in two passes: all scores, then the values weighted. Included by one file per instruction set, after
// base/simd/. Sums are taken in one order whatever else is computed: 16 lanes of dimensions, or keys ascending.
#pragma once

#include "base/simd/math.h"
#include "kernels/plain_attention/kernels.h"

namespace tersor::plain_attention {
namespace {

inline F load_some(const float* p, int64_t n) { return n >= 16 ? load(p) : load_n(p, int(n)); }

// The scores of N keys.
template <int N>
inline void score(const float* q, const float* keys, int64_t d, float scale, float* to) {
  F sums[N];
  for (int j = 0; j < N; ++j) sums[j] = zero();
  for (int64_t i = 0; i < d; i += 16) {
    const F x = load_some(q + i, d - i);
    for (int j = 0; j < N; ++j) sums[j] = fma(x, load_some(keys + j * d + i, d - i), sums[j]);
  }
  for (int j = 0; j < N; ++j) to[j] = scale * sum(sums[j]);
}

// Columns [0, 16 * N) of the weighted sum, or `columns` < 16 of them if N is 1.
template <int N>
inline void weigh(const float* weights, const float* values, int64_t n, int64_t d, int64_t columns, float factor,
                  float* out) {
  F sums[N];
  for (int j = 0; j < N; ++j) sums[j] = zero();
  for (int64_t k = 0; k < n; ++k, values += d) {
    const F w = set(weights[k]);
    for (int j = 0; j < N; ++j) sums[j] = fma(w, load_some(values + 16 * j, columns - 16 * j), sums[j]);
  }
  for (int j = 0; j < N; ++j) {
    const F y = mul(sums[j], set(factor));
    columns - 16 * j >= 16 ? store(out + 16 * j, y) : store_n(out + 16 * j, y, int(columns - 16 * j));
  }
}

// Turns n scores, in powers of two, into weights; returns their sum.
inline float soften(float* scores, int64_t n) {
  for (int64_t k = n; k % 16; ++k) scores[k] = -1e30f;  // weighs nothing
  F top = load(scores);
  for (int64_t k = 16; k < n; k += 16) top = max(top, load(scores + k));
  const F largest = set(max_of(top));
  F total = zero();
  for (int64_t k = 0; k < n; k += 16) {
    const F weight = exp2(max(set(-127.0f), sub(load(scores + k), largest)));
    total = add(total, weight);
    store(scores + k, weight);
  }
  return sum(total);
}

void attend(const float* q, const float* keys, const float* values, int64_t n, int64_t head_dim, float scale,
            float* weights, float* out) {
  const int64_t d = head_dim;
  int64_t k = 0;
  for (; k + 4 <= n; k += 4) score<4>(q, keys + k * d, d, scale * 1.44269504088896341f, weights + k);
  for (; k < n; ++k) score<1>(q, keys + k * d, d, scale * 1.44269504088896341f, weights + k);
  const float factor = 1.0f / soften(weights, n);
  int64_t i = 0;
  for (; i + 64 <= d; i += 64) weigh<4>(weights, values + i, n, d, 64, factor, out + i);
  for (; i < d; i += 16) weigh<1>(weights, values + i, n, d, d - i, factor, out + i);
}

#define TERSOR_PLAIN_ATTENTION_KERNELS {attend}

}  // namespace
}  // namespace tersor::plain_attention
