// Attention with an online softmax (Milakov & Gimelshein 2018, arXiv 1805.02867; Dao et al. 2022, arXiv 2205.14135):
// keys are seen kKeys at a time, with a running maximum; when it grows, what was summed before is scaled down.
//
// Every sum is taken in one order, keys and dimensions ascending, whatever tile a row is in; keys that a row does not
// see weigh exactly 0. So a row's bits do not depend on the rows beside it.
#pragma once

#include "base/simd/math.h"
#include "kernels/attention/kernels.h"

namespace tersor::attention {
namespace {

const float kIota[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

inline int least(int64_t a, int64_t b) { return int(a < b ? a : b); }

// 16 stored values as floats; codes of int8 without their scale.
template <Type kType>
inline F load_stored(const void* values, int64_t at) {
  if constexpr (kType == kFloat32) return load((const float*)values + at);
  if constexpr (kType == kFloat16) return load_f16((const uint16_t*)values + at);
  return load_i8((const int8_t*)values + at);
}

inline const void* offset(const void* values, int64_t at, Type type) {
  return (const char*)values + at * type_bytes(type);
}

// ---- Products: sums (rows, 16 * vectors) of x (rows, k) times w (k, 16 * vectors) ----

struct Product {
  const void* w;
  int64_t w_step, w_next;  // values from one k to the next, and from one vector to the next
  int k;
  const float* x;
  int64_t x_stride;
  float* sums;
  int64_t sums_stride;
  const float* scale;  // 16 for each vector, scale_next floats apart
  int64_t scale_next;
};

// What becomes of a product: it is the sums, it begins with the sums, or times scale it is added to them.
enum Into { kSet, kAdd, kAddScaled };

template <Type kType, Into kInto, int M, int N>
void multiply_tile(const Product& p) {
  F sums[M][N];
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) sums[m][j] = kInto == kAdd ? load(p.sums + m * p.sums_stride + 16 * j) : zero();
  }
  const float* x = p.x;
  for (int i = 0; i < p.k; ++i, ++x) {
    F w[N];
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) w[j] = load_stored<kType>(p.w, i * p.w_step + j * p.w_next);
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m) {
      const F one = set(x[m * p.x_stride]);
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) sums[m][j] = fma(one, w[j], sums[m][j]);
    }
  }
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) {
      float* to = p.sums + m * p.sums_stride + 16 * j;
      store(to, kInto == kAddScaled ? fma(sums[m][j], load(p.scale + j * p.scale_next), load(to)) : sums[m][j]);
    }
  }
}

template <Type kType, Into kInto, int M, int N>
void multiply_rows(const Product& p, int rows) {
  if constexpr (M > 1) {
    if (rows < M) return multiply_rows<kType, kInto, M - 1, N>(p, rows);
  }
  multiply_tile<kType, kInto, M, N>(p);
}

// All vectors of up to kTallRows rows (floats) or kWideRows rows.
template <Type kType, Into kInto>
void multiply(Product p, int rows, int vectors) {
  const auto advance = [&](int n) {
    p.w = offset(p.w, n * p.w_next, kType);
    p.sums += 16 * n;
    if (kInto == kAddScaled) p.scale += n * p.scale_next;
    vectors -= n;
  };
  if (rows <= kWideRows) {
    for (; vectors >= kWideVectors; advance(kWideVectors))
      multiply_rows<kType, kInto, kWideRows, kWideVectors>(p, rows);
    for (; vectors > 0; advance(1)) multiply_rows<kType, kInto, kWideRows, 1>(p, rows);
  }
  if constexpr (kType == kFloat32) {
    for (; vectors >= kTallVectors; advance(kTallVectors))
      multiply_rows<kType, kInto, kTallRows, kTallVectors>(p, rows);
    for (; vectors > 0; advance(1)) multiply_rows<kType, kInto, kTallRows, 1>(p, rows);
  }
}

// ---- A block of keys ----

// Keys [at, at + keys), and what they and their values are multiplied with: the cache or its floats.
struct Block {
  int64_t at;
  int keys;
  const void* k;
  const void* v;
  const float* key_scales;  // (panels, key groups, 16); likewise of the values
  const float* value_scales;
};

// Keys of a block, counted from its first, that any of some rows see.
struct Range {
  int begin, end;
};

inline Range seen(const Queries& q, int row, int rows, const Block& b) {
  const int64_t first = q.first[row] - b.at;
  return {first > 0 ? int(first) : 0, least(b.keys, q.end[row + rows - 1] - b.at)};
}

// Caps and masks 16 * N scores of one row from key `at` on, moves its maximum, and turns the scores into weights.
template <int N>
void soften(const Queries& q, int row, int64_t at, float* scores, const State& state, int width) {
  F s[N];
  for (int j = 0; j < N; ++j) s[j] = load(scores + 16 * j);
  if (q.softcap > 0) {
    const F cap = set(q.softcap), inverse = set(1.0f / q.softcap);
    for (int j = 0; j < N; ++j) s[j] = mul(cap, tanh(mul(s[j], inverse)));
  }
  if (q.first[row] > at || q.end[row] < at + 16 * N) {
    const F masked = set(kMasked), position = load(kIota);  // relative to a vector: small, exact floats
    for (int j = 0; j < N; ++j) {
      const int64_t base = at + 16 * j;
      s[j] = select_less(position, set(float(q.end[row] - base)), s[j], masked);
      s[j] = select_less(position, set(float(q.first[row] - base)), masked, s[j]);
    }
  }
  F largest = s[0];
  for (int j = 1; j < N; ++j) largest = max(largest, s[j]);
  F total = load(state.total + 16 * row), top = set(state.largest[row]);
  if (any_less(top, largest)) {
    const float now = max_of(largest);
    const F f = exp2(set(state.largest[row] - now));
    total = mul(total, f);
    for (int i = 0; i < width; i += 16) {
      float* out = state.out + int64_t(row) * width + i;
      store(out, mul(load(out), f));
    }
    state.largest[row] = now;
    top = set(now);
  }
  for (int j = 0; j < N; ++j) {
    const F weight = exp2(sub(s[j], top));
    total = add(total, weight);
    store(scores + 16 * j, weight);
  }
  store(state.total + 16 * row, total);
}

// Weights (rows, kKeys) of the keys that rows [row, row + rows) see.
template <Type kType, bool kScaled>
void weigh_keys(const Head& head, const Queries& q, const Block& b, int row, int rows, float* weights,
                const State& state) {
  const Range range = seen(q, row, rows, b);
  if (range.begin >= range.end) return;
  const int first = range.begin / 16, panels = (range.end + 15) / 16 - first, head_dim = head.head_dim;
  float* scores = weights + int64_t(row) * kKeys + 16 * first;
  Product p = {offset(b.k, int64_t(first) * 16 * head_dim, kType),
               16,
               int64_t(16) * head_dim,
               head_dim,
               q.values + int64_t(row) * head_dim,
               head_dim,
               scores,
               kKeys,
               nullptr,
               0};
  if constexpr (kScaled) {
    const int groups = key_groups(head_dim);
    for (int m = 0; m < rows; ++m) {
      for (int j = 0; j < panels; ++j) store(scores + int64_t(m) * kKeys + 16 * j, zero());
    }
    p.scale_next = 16 * groups;
    for (int g = 0; g < groups; ++g) {
      p.k = least(kKeyGroup, head_dim - g * kKeyGroup);
      p.scale = b.key_scales + 16 * (first * groups + g);
      multiply<kType, kAddScaled>(p, rows, panels);
      p.w = offset(p.w, 16 * kKeyGroup, kType);
      p.x += kKeyGroup;
    }
  } else {
    multiply<kType, kSet>(p, rows, panels);
  }
  const int64_t at = b.at + 16 * first;
  for (int m = 0; m < rows; ++m) {
    float* one = scores + int64_t(m) * kKeys;
    static_assert(kKeys == 64);
    if (panels == 4) soften<4>(q, row + m, at, one, state, head.width);
    if (panels == 3) soften<3>(q, row + m, at, one, state, head.width);
    if (panels == 2) soften<2>(q, row + m, at, one, state, head.width);
    if (panels == 1) soften<1>(q, row + m, at, one, state, head.width);
  }
}

// Adds the values times the weights. spare: (rows, kKeys)
template <Type kType, bool kScaled>
void add_values(const Head& head, const Queries& q, const Block& b, int row, int rows, const float* weights,
                float* spare, const State& state) {
  const Range range = seen(q, row, rows, b);
  if (range.begin >= range.end) return;
  const int width = head.width;
  const float* w = weights + int64_t(row) * kKeys;
  Product p = {offset(b.v, int64_t(range.begin) * width, kType),
               width,
               16,
               range.end - range.begin,
               w + range.begin,
               kKeys,
               state.out + int64_t(row) * width,
               width,
               nullptr,
               0};
  if constexpr (kScaled) {
    const int groups = value_groups(head.head_dim);
    p.x = spare + range.begin;
    for (int g = 0; g < groups; ++g) {
      for (int panel = range.begin / 16; panel < (range.end + 15) / 16; ++panel) {
        const F scale = load(b.value_scales + 16 * (panel * groups + g));
        for (int m = 0; m < rows; ++m) {
          const int at = m * kKeys + 16 * panel;
          store(spare + at, mul(load(w + at), scale));
        }
      }
      multiply<kType, kAdd>(p, rows, least(kValueGroup, width - g * kValueGroup) / 16);
      p.w = offset(p.w, kValueGroup, kType);
      p.sums += kValueGroup;
    }
  } else {
    multiply<kType, kAdd>(p, rows, width / 16);
  }
}

template <Type kType, bool kScaled>
void attend_block(const Head& head, const Queries& q, const Block& b, int height, float* scratch, const State& state) {
  float *weights = scratch, *spare = scratch + kMaxRows * kKeys;
  for (int row = 0; row < q.rows; row += height) {
    weigh_keys<kType, kScaled>(head, q, b, row, least(height, q.rows - row), weights, state);
  }
  for (int row = 0; row < q.rows; row += height) {
    add_values<kType, kScaled>(head, q, b, row, least(height, q.rows - row), weights, spare, state);
  }
}

// Rows of a tile, so that all tiles of `rows` are about equally high.
inline int even_height(int rows, int highest) {
  const int tiles = (rows + highest - 1) / highest;
  return (rows + tiles - 1) / tiles;
}

template <Type kType>
void convert(const void* from, int64_t n, float* to) {
  for (int64_t i = 0; i < n; i += 16) store(to + i, load_stored<kType>(from, i));
}

// Few rows multiply what is stored; for more, a block is converted to floats once.
template <Type kType>
void attend(const Head& head, const Queries& q, int64_t begin, int64_t end, const State& state, float* scratch) {
  float* keys = scratch + 2 * kMaxRows * kKeys;
  float* values = keys + kKeys * head.head_dim;
  for (int64_t at = begin; at < end; at += kKeys) {
    const int count = least(kKeys, end - at);
    Block b = {
        at,      count,  offset(head.keys, at * head.head_dim, kType), offset(head.values, at * head.width, kType),
        nullptr, nullptr};
    if constexpr (kType == kInt8) {
      b.key_scales = head.key_scales + at * key_groups(head.head_dim);
      b.value_scales = head.value_scales + at * value_groups(head.head_dim);
    }
    if (q.rows <= kWideRows || (kType != kFloat32 && q.rows <= 2 * kWideRows)) {
      attend_block<kType, kType == kInt8>(head, q, b, even_height(q.rows, kWideRows), scratch, state);
      continue;
    }
    if constexpr (kType != kFloat32) {
      convert<kType>(b.k, int64_t(count + 15) / 16 * 16 * head.head_dim, keys);
      convert<kType>(b.v, int64_t(count) * head.width, values);
      b.k = keys, b.v = values;
    }
    attend_block<kFloat32, kType == kInt8>(head, q, b, even_height(q.rows, kTallRows), scratch, state);
  }
}

// ---- The cache ----

// Codes (n, at most 64) of int8 and their scale; NaN and infinities make the scale NaN or infinite.
inline float quantize(const float* x, int n, int8_t* codes) {
  F largest = zero(), poison = zero();
  for (int i = 0; i < n; i += 16) {
    const F v = load_n(x + i, least(16, n - i));
    largest = max(largest, abs(v));
    poison = fma(v, zero(), poison);
  }
  const float scale = max_of(largest) / 127.0f + sum(poison);
  const F divisor = set(scale == 0 ? 1.0f : scale);
  for (int i = 0; i < n; i += 16) store_i8(codes + i, round_to_int(div(load_n(x + i, least(16, n - i)), divisor)));
  return scale;
}

template <Type kType>
void append(const float* key, const float* value, int64_t position, const Head& head) {
  const int64_t panel = position / 16, lane = position % 16, keys_at = panel * 16 * head.head_dim + lane;
  if constexpr (kType == kInt8) {
    alignas(64) int8_t codes[kMaxWidth];
    const int groups = key_groups(head.head_dim), value_groups = attention::value_groups(head.head_dim);
    for (int g = 0; g < groups; ++g) {
      const int at = g * kKeyGroup, n = least(kKeyGroup, head.head_dim - at);
      head.key_scales[(panel * groups + g) * 16 + lane] = quantize(key + at, n, codes + at);
    }
    for (int i = 0; i < head.head_dim; ++i) ((int8_t*)head.keys)[keys_at + 16 * i] = codes[i];
    for (int g = 0; g < value_groups; ++g) {
      const int at = g * kValueGroup, n = least(kValueGroup, head.head_dim - at);
      head.value_scales[(panel * value_groups + g) * 16 + lane] =
          quantize(value + at, n, (int8_t*)head.values + position * head.width + at);
    }
    return;
  }
  for (int i = 0; i < head.head_dim; i += 16) {
    const int n = least(16, head.head_dim - i);
    const F v = load_n(value + i, n);
    if constexpr (kType == kFloat32) {
      store((float*)head.values + position * head.width + i, v);
      for (int j = 0; j < n; ++j) ((float*)head.keys)[keys_at + (i + j) * 16] = key[i + j];
    } else {
      store_f16((uint16_t*)head.values + position * head.width + i, v);
      uint16_t halves[16];
      store_f16(halves, load_n(key + i, n));
      for (int j = 0; j < n; ++j) ((uint16_t*)head.keys)[keys_at + (i + j) * 16] = halves[j];
    }
  }
}

void finish(const float* x, const float* total, int n, float* y) {
  const F factor = set(1.0f / sum(load(total)));
  int i = 0;
  for (; i + 16 <= n; i += 16) store(y + i, mul(load(x + i), factor));
  if (i < n) store_n(y + i, mul(load_n(x + i, n - i), factor), n - i);
}

void blend(float* x, float a, const float* y, float b, int n) {
  const F fa = set(a), fb = set(b);
  for (int i = 0; i < n; i += 16) store(x + i, fma(load(x + i), fa, mul(load(y + i), fb)));
}

#define TERSOR_ATTENTION_KERNELS                        \
  {{attend<kFloat32>, attend<kFloat16>, attend<kInt8>}, \
   {append<kFloat32>, append<kFloat16>, append<kInt8>}, \
   finish,                                              \
   blend}

}  // namespace
}  // namespace tersor::attention
