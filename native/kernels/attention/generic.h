// Attention with an online softmax (Milakov & Gimelshein 2018, arXiv 1805.02867; Dao et al. 2022, arXiv 2205.14135):
// keys are seen kKeys at a time, with a running maximum; when it grows, what was summed before is scaled down.
#pragma once

#include "base/simd/math.h"
#include "base/simd/product.h"
#include "kernels/attention/kernels.h"

namespace tersor::attention {
namespace {

const float kIota[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// scores (rows, kKeys) of keys [begin, begin + keys), keys a multiple of 16. Rows beyond what a tile holds are worth a
// conversion.
template <Float kFloat>
void score(const Head& head, const Queries& q, int64_t begin, int keys, float* scores) {
  alignas(64) float converted[kMaxWidth * 16];
  for (int at = 0; at < keys; at += 16) {
    const void* panel = (const char*)head.keys + (begin + at) * head.head_dim * float_bytes(kFloat);
    for (int row = 0; row < q.rows; ++row) store(scores + row * kKeys + at, zero());
    if (kFloat == kF32 || q.rows <= kFloatTile) {
      product<kFloat>({panel, 16, head.head_dim, q.values, head.head_dim, scores + at, kKeys}, 0, q.rows);
    } else {
      for (int d = 0; d < head.head_dim; ++d) store(converted + 16 * d, load_as<kFloat>(panel, 16 * d));
      product<kF32>({converted, 16, head.head_dim, q.values, head.head_dim, scores + at, kKeys}, 0, q.rows);
    }
  }
}

// Caps and masks the scores of one row, moves its maximum, and turns the scores into weights.
void soften(const Queries& q, int row, int64_t begin, int keys, float* scores, const State& state, int width) {
  const bool partial = q.first[row] > begin || q.end[row] < begin + keys;
  const F cap = set(q.softcap), inverse_cap = set(q.softcap > 0 ? 1.0f / q.softcap : 0.0f), masked = set(kMasked);
  F largest = set(state.largest[row]);
  for (int at = 0; at < keys; at += 16) {
    F s = load(scores + at);
    if (q.softcap > 0) s = mul(cap, tanh(mul(s, inverse_cap)));
    if (partial) {
      const F offset = load(kIota);  // positions relative to this vector: small, exact floats
      const int64_t base = begin + at;
      s = select_less(offset, set(float(q.end[row] - base)), s, masked);
      s = select_less(offset, set(float(q.first[row] - base)), masked, s);
    }
    store(scores + at, s);
    largest = max(largest, s);
  }
  const float top = max_of(largest);
  const F top16 = set(top);
  F total = zero();
  for (int at = 0; at < keys; at += 16) {
    const F p = exp(sub(load(scores + at), top16));
    total = add(total, p);
    store(scores + at, p);
  }
  if (top > state.largest[row]) {
    alignas(64) float factor[16];
    store(factor, exp(set(state.largest[row] - top)));
    state.total[row] *= factor[0];
    const F f = set(factor[0]);
    for (int i = 0; i < width; i += 16) store(state.out + row * width + i, mul(load(state.out + row * width + i), f));
    state.largest[row] = top;
  }
  state.total[row] += sum(total);
}

template <Float kFloat>
void attend(const Head& head, const Queries& q, int64_t begin, int64_t end, const State& state) {
  alignas(64) float scores[kMaxRows * kKeys];
  alignas(64) float converted[kKeys * 16];
  for (int64_t at = begin; at < end; at += kKeys) {
    const int keys = int(end - at < kKeys ? end - at : kKeys), padded = (keys + 15) / 16 * 16;
    score<kFloat>(head, q, at, padded, scores);
    for (int row = 0; row < q.rows; ++row) soften(q, row, at, padded, scores + row * kKeys, state, head.width);
    for (int i = 0; i < head.width; i += 16) {
      const void* values = (const char*)head.values + (at * head.width + i) * float_bytes(kFloat);
      float* out = state.out + i;
      if (kFloat == kF32 || q.rows <= kFloatTile) {
        product<kFloat>({values, head.width, keys, scores, kKeys, out, head.width}, 0, q.rows);
      } else {
        for (int k = 0; k < keys; ++k) store(converted + 16 * k, load_as<kFloat>(values, int64_t(k) * head.width));
        product<kF32>({converted, 16, keys, scores, kKeys, out, head.width}, 0, q.rows);
      }
    }
  }
}

template <Float kFloat>
void append(const float* key, const float* value, int64_t position, int head_dim, int width, void* keys, void* values) {
  const int64_t panel = position / 16 * head_dim * 16, lane = position % 16;
  for (int i = 0; i < head_dim; i += 16) {
    const int n = head_dim - i < 16 ? head_dim - i : 16;
    const F k = load_n(key + i, n), v = load_n(value + i, n);
    if constexpr (kFloat == kF32) {
      store((float*)values + position * width + i, v);
      float* out = (float*)keys + panel + lane;
      for (int j = 0; j < n; ++j) out[(i + j) * 16] = key[i + j];
    } else {
      store_f16((uint16_t*)values + position * width + i, v);
      uint16_t halves[16];
      store_f16(halves, k);
      uint16_t* out = (uint16_t*)keys + panel + lane;
      for (int j = 0; j < n; ++j) out[(i + j) * 16] = halves[j];
    }
  }
}

void scale(float* x, int n, float factor) {
  const F f = set(factor);
  int i = 0;
  for (; i + 16 <= n; i += 16) store(x + i, mul(load(x + i), f));
  if (i < n) store_n(x + i, mul(load_n(x + i, n - i), f), n - i);
}

void blend(float* x, float a, const float* y, float b, int n) {
  const F fa = set(a), fb = set(b);
  for (int i = 0; i < n; i += 16) store(x + i, fma(load(x + i), fa, mul(load(y + i), fb)));
}

#define TERSOR_ATTENTION_KERNELS {{attend<kF32>, attend<kF16>}, {append<kF32>, append<kF16>}, scale, blend}

}  // namespace
}  // namespace tersor::attention
