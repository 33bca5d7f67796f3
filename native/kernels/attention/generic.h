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

// 16 stored floats.
template <Type kType>
inline F load_stored(const void* values, int64_t at) {
  if constexpr (kType == kFloat32) return load((const float*)values + at);
  return load_f16((const uint16_t*)values + at);
}

inline const void* offset(const void* values, int64_t at, Type type) {
  return (const char*)values + bytes_of(type, at);
}

// Asks for bytes from memory, into the second-level cache: a core has more reads in flight there than into the first.
// Inlined always: GCC may take a call of this for one without effect and drop it.
template <int kBytes>
[[gnu::always_inline]] inline void prefetch(const char* p) {
#pragma GCC unroll 4
  for (int i = 0; i < kBytes; i += 64) __builtin_prefetch(p + i, 0, 2);
}

// ---- Products: sums (rows, 16 * vectors) of x (rows, k) times w (k, 16 * vectors) ----

struct Product {
  const void* w;
  int64_t w_step, w_next;  // values from one k to the next, and from one vector to the next
  int k;
  const void* x;
  int64_t x_stride;
  float* sums;
  int64_t sums_stride;
  const char* ahead;  // as many bytes as w has, which will be read later, or null; line after line, whatever w's order
  // Of integers: a factor for each row, and if lane_scale one for each lane too, lane_scale_next floats from vector to
  // vector; of int4 lanes have a minimum too, and row_sum is the sum of a row's x, as far apart as row_scale.
  const float* row_scale;
  int64_t row_scale_stride;
  const float* lane_scale;
  int64_t lane_scale_next;
  const float* row_sum;
};

// Floats: the sums are set, or begin with what they are.
template <Type kType, bool kAdd>
struct Floats {
  static constexpr Type kStored = kType;
  static constexpr bool kTall = kType == kFloat32;

  template <int M, int N>
  static void run(const Product& p) {
    F sums[M][N];
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) sums[m][j] = kAdd ? load(p.sums + m * p.sums_stride + 16 * j) : zero();
    }
    const float* x = (const float*)p.x;
    for (int i = 0; i < p.k; ++i, ++x) {
      F w[N];
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) w[j] = load_stored<kType>(p.w, i * p.w_step + j * p.w_next);
      if (N > 1 && p.ahead) prefetch<bytes_of(kType, 16 * N)>(p.ahead + i * bytes_of(kType, 16 * N));
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
      for (int j = 0; j < N; ++j) store(p.sums + m * p.sums_stride + 16 * j, sums[m][j]);
    }
  }
};

template <Type kType>
inline Pairs load_code_pairs(const void* p) {
  if constexpr (kType == kInt8) return load_pairs((const int8_t*)p);
  return load_nibble_pairs((const uint8_t*)p);
}

// int8 or int4 times int16, two k at a time: w is (k / 2, 16 * vectors, 2), x (rows, k). Exact in int32 for 64 k; the
// sums have the product times its scales added.
template <Type kType, bool kLanes>
struct Integers {
  static constexpr Type kStored = kType;
  static constexpr bool kTall = true;

  template <int M, int N>
  static void run(const Product& p) {
    I sums[M][N];
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) sums[m][j] = int_zero();
    }
    const int16_t* x = (const int16_t*)p.x;
    for (int i = 0; i < p.k / 2; ++i, x += 2) {
      Pairs w[N];
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) {
        const int64_t at = i * p.w_step + j * p.w_next;
        w[j] = load_code_pairs<kType>(offset(p.w, at, kType));
      }
      if (N > 1 && p.ahead) prefetch<bytes_of(kType, 32 * N)>(p.ahead + i * bytes_of(kType, 32 * N));
#pragma GCC unroll 12
      for (int m = 0; m < M; ++m) {
        const Pairs one = set_pair(x + m * p.x_stride);
#pragma GCC unroll 4
        for (int j = 0; j < N; ++j) sums[m][j] = dot_pairs(sums[m][j], w[j], one);
      }
    }
    F scales[N], minima[N];
    for (int j = 0; kLanes && j < N; ++j) {
      const float* lanes = p.lane_scale + j * p.lane_scale_next;
      scales[j] = kType == kInt4 ? load_f16((const uint16_t*)lanes) : load(lanes);
      if constexpr (kType == kInt4) minima[j] = load_f16((const uint16_t*)lanes + 16);
    }
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m) {
      const F row_scale = set(p.row_scale[m * p.row_scale_stride]);
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) {
        float* to = p.sums + m * p.sums_stride + 16 * j;
        if constexpr (kLanes && kType == kInt4) {
          const F least = mul(minima[j], set(p.row_sum[m * p.row_scale_stride]));
          store(to, fma(row_scale, fma(to_float(sums[m][j]), scales[j], least), load(to)));
        } else {
          const F scale = kLanes ? mul(row_scale, scales[j]) : row_scale;
          store(to, fma(to_float(sums[m][j]), scale, load(to)));
        }
      }
    }
  }
};

template <typename Kind, int M, int N>
void multiply_rows(const Product& p, int rows) {
  if constexpr (M > 1) {
    if (rows < M) return multiply_rows<Kind, M - 1, N>(p, rows);
  }
  Kind::template run<M, N>(p);
}

// All vectors of up to kTallRows rows, or of kWideRows if a kind has no tall tiles. Wide tiles ask for what is ahead.
template <typename Kind>
void multiply(Product p, int rows, int vectors) {
  const auto advance = [&](int n) {
    p.w = offset(p.w, n * p.w_next, Kind::kStored);
    p.sums += 16 * n;
    p.lane_scale += n * p.lane_scale_next;
    if (p.ahead) p.ahead += bytes_of(Kind::kStored, int64_t(16) * n * p.k);
    vectors -= n;
  };
  if (rows <= kWideRows) {
    for (; vectors >= kWideVectors; advance(kWideVectors)) multiply_rows<Kind, kWideRows, kWideVectors>(p, rows);
    if constexpr (kWideVectors > 2 && Kind::kStored == kInt4) {  // a group of values is two vectors
      for (; vectors >= 2; advance(2)) multiply_rows<Kind, kWideRows, 2>(p, rows);
    }
    for (; vectors > 0; advance(1)) multiply_rows<Kind, kWideRows, 1>(p, rows);
  }
  if constexpr (Kind::kTall) {
    p.ahead = nullptr;
    for (; vectors >= kTallVectors; advance(kTallVectors)) multiply_rows<Kind, kTallRows, kTallVectors>(p, rows);
    for (; vectors > 0; advance(1)) multiply_rows<Kind, kTallRows, 1>(p, rows);
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
  const uint16_t* anchor;  // of the keys, or null
  const char* after_k;     // what will be read after the keys, as many bytes, or null; likewise the values
  const char* after_v;
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

// The same of some rows, 16 * panels scores of each.
inline void soften_rows(const Queries& q, int row, int rows, int64_t at, int panels, float* scores, int stride,
                        const State& state, int width) {
  static_assert(kKeys == 64);
  for (int m = 0; m < rows; ++m, scores += stride) {
    if (panels == 4) soften<4>(q, row + m, at, scores, state, width);
    if (panels == 3) soften<3>(q, row + m, at, scores, state, width);
    if (panels == 2) soften<2>(q, row + m, at, scores, state, width);
    if (panels == 1) soften<1>(q, row + m, at, scores, state, width);
  }
}

// The sum of x times float16 values, n of each, a multiple of 16.
inline float dot_halves(const float* x, const uint16_t* halves, int n) {
  F total = zero();
  for (int i = 0; i < n; i += 16) total = fma(load(x + i), load_f16(halves + i), total);
  return sum(total);
}

// Scores (rows, kKeys) of the keys that rows [row, row + rows) see, rows of scores_stride floats.
template <Type kType>
void score_keys(const Head& head, const Queries& q, const Block& b, int row, int rows, float* scores,
                int scores_stride) {
  const Range range = seen(q, row, rows, b);
  if (range.begin >= range.end) return;
  const int first = range.begin / 16, panels = (range.end + 15) / 16 - first;
  scores += int64_t(row) * scores_stride + 16 * first;
  const int stride = query_floats(kType, head.width);
  const float* x = q.values + int64_t(row) * stride;
  Product p = {};
  p.sums = scores;
  p.sums_stride = scores_stride;
  if constexpr (is_integer(kType)) {
    const int width = head.width, groups = key_groups(width);
    const char* after = row == 0 ? b.after_k : nullptr;
    for (int m = 0; m < rows; ++m) {
      const F begin = kType == kInt4 ? set(dot_halves(x + m * stride + width + groups, b.anchor, width)) : zero();
      for (int j = 0; j < panels; ++j) store(scores + int64_t(m) * scores_stride + 16 * j, begin);
    }
    p.w_step = 32;
    p.w_next = int64_t(16) * width;
    p.x_stride = 2 * stride;
    p.row_scale_stride = stride;
    p.lane_scale_next = 16 * groups;
    for (int g = 0; g < groups; ++g) {
      p.w = offset(b.k, first * p.w_next + g * kKeyGroup * 16, kType);
      p.k = least(kKeyGroup, width - g * kKeyGroup);
      p.ahead = after ? after + g * bytes_of(kType, kKeys * kKeyGroup) : nullptr;
      p.x = (const int16_t*)x + g * kKeyGroup;
      p.row_scale = x + width + g;
      p.lane_scale = b.key_scales + 16 * (first * groups + g);
      p.row_sum = x + width / 2 + g;
      multiply<Integers<kType, true>>(p, rows, panels);
    }
  } else {
    p.w_step = 16;
    p.w_next = int64_t(16) * head.head_dim;
    p.ahead = row == 0 ? b.after_k : nullptr;
    p.w = offset(b.k, first * p.w_next, kType);
    p.k = head.head_dim;
    p.x = x;
    p.x_stride = stride;
    multiply<Floats<kType, false>>(p, rows, panels);
  }
}

// Turns the scores of the keys that rows [row, row + rows) see into weights.
inline void weigh_keys(const Queries& q, const Block& b, int row, int rows, float* scores, int stride,
                       const State& state, int width) {
  const Range range = seen(q, row, rows, b);
  if (range.begin >= range.end) return;
  const int first = range.begin / 16, panels = (range.end + 15) / 16 - first;
  soften_rows(q, row, rows, b.at + 16 * first, panels, scores + int64_t(row) * stride + 16 * first, stride, state,
              width);
}

// Rounds weights times the values' scales, panels of 16 keys `groups` scales apart, to 16 bits; returns the codes'
// scale.
inline float round_weights(const float* weights, const float* scales, int groups, int panels, int16_t* codes) {
  F products[kKeys / 16], largest = zero();
  for (int j = 0; j < panels; ++j) {
    products[j] = mul(load(weights + 16 * j), load(scales + 16 * j * groups));
    largest = max(largest, products[j]);
  }
  const float top = max_of(largest);
  const F inverse = set(top > 0 ? 32767.0f / top : 0.0f);
  for (int j = 0; j < panels; ++j) store_i16(codes + 16 * j, round_to_int(mul(products[j], inverse)));
  return top * (1.0f / 32767.0f);
}

// The float16 scales of panels of 16 keys, and their minima, `groups` pairs apart.
inline void open_scales(const float* pairs, int groups, int panels, float* scales, float* minima) {
  const auto* halves = (const uint16_t*)pairs;
  for (int j = 0; j < panels; ++j, halves += 32 * groups) {
    store(scales + 16 * j, load_f16(halves));
    store(minima + 16 * j, load_f16(halves + 16));
  }
}

inline float weighted_sum(const float* weights, const float* x, int panels) {
  F total = zero();
  for (int j = 0; j < panels; ++j) total = fma(load(weights + 16 * j), load(x + 16 * j), total);
  return sum(total);
}

inline void add_to_all(float* x, float y, int n) {
  for (int i = 0; i < n; i += 16) store(x + i, add(load(x + i), set(y)));
}

// Adds the values times the weights.
template <Type kType>
void add_values(const Head& head, const Queries& q, const Block& b, int row, int rows, const float* weights, int stride,
                const State& state) {
  const Range range = seen(q, row, rows, b);
  if (range.begin >= range.end) return;
  const int width = head.width;
  const float* w = weights + int64_t(row) * stride;
  Product p = {};
  p.w_next = 16;
  p.sums = state.out + int64_t(row) * width;
  p.sums_stride = width;
  const char* after = row == 0 ? b.after_v : nullptr;
  if constexpr (is_integer(kType)) {
    constexpr int kGroup = value_group(kType);
    alignas(64) int16_t codes[kTallRows * kKeys];
    float scales[kTallRows];
    const int first = range.begin / 16, panels = (range.end + 15) / 16 - first, groups = value_groups(kType, width);
    const int begin = range.begin / 2 * 2, end = (range.end + 1) / 2 * 2;  // weights are 0 beside the range
    p.x = codes + begin;
    p.x_stride = kKeys;
    p.k = end - begin;
    p.w_step = 2 * width;
    p.w_next = 32;
    p.row_scale = scales;
    p.row_scale_stride = 1;
    for (int g = 0; g < groups; ++g) {
      const int columns = least(kGroup, width - g * kGroup);
      const float* group_scales = b.value_scales + 16 * (first * groups + g);
      alignas(64) float opened[kKeys], minima[kKeys];
      if constexpr (kType == kInt4) open_scales(group_scales, groups, panels, opened, minima);
      for (int m = 0; m < rows; ++m) {
        const float* weight = w + m * stride + 16 * first;
        int16_t* to = codes + m * kKeys + 16 * first;
        if constexpr (kType == kInt4) {
          scales[m] = round_weights(weight, opened, 1, panels, to);
          add_to_all(p.sums + m * p.sums_stride, weighted_sum(weight, minima, panels), columns);
        } else {
          scales[m] = round_weights(weight, group_scales, groups, panels, to);
        }
      }
      p.w = offset(b.v, int64_t(begin) * width + g * kGroup * 2, kType);
      p.ahead = after ? after + g * bytes_of(kType, kKeys * kGroup) : nullptr;
      multiply<Integers<kType, false>>(p, rows, columns / 16);
      p.sums += kGroup;
    }
  } else {
    p.w = offset(b.v, int64_t(range.begin) * width, kType);
    p.w_step = width;
    p.k = range.end - range.begin;
    p.x = w + range.begin;
    p.x_stride = stride;
    p.ahead = after;
    multiply<Floats<kType, true>>(p, rows, width / 16);
  }
}

// Calls do(row, rows) for parts of at most `highest` rows, about equally high.
template <typename Do>
inline void for_rows(const Queries& q, int highest, Do&& part) {
  const int tiles = (q.rows + highest - 1) / highest, height = (q.rows + tiles - 1) / tiles;
  for (int row = 0; row < q.rows; row += height) part(row, least(height, q.rows - row));
}

inline void convert(const void* halves, int64_t n, float* to) {
  for (int64_t i = 0; i < n; i += 16) store(to + i, load_f16((const uint16_t*)halves + i));
}

// A Hadamard matrix: its rows are orthogonal.
struct Signs {
  float rows[16][16];
};
constexpr Signs make_signs() {
  Signs h = {};
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 16; ++j) h.rows[i][j] = __builtin_parity(i & j) ? -1.0f : 1.0f;
  }
  return h;
}
alignas(64) constexpr Signs kSigns = make_signs();

// y (width) = x (head_dim) and zeros, every 16 values times the Hadamard matrix, and those times a larger one where
// their number divides by a power of two. Products of two such vectors are the vectors' times rotation_gain(width).
// Channels of keys that are far larger than the others become noise in all (Ashkboos et al. 2024, arXiv 2404.00456), so
// that one scale fits them.
inline void rotate(const float* x, int head_dim, int width, float* y) {
  for (int at = 0; at < width; at += 16) {
    const int n = least(16, head_dim - at);
    F sum = zero();
    for (int i = 0; i < n; ++i) sum = fma(set(x[at + i]), load(kSigns.rows[i]), sum);
    store(y + at, sum);
  }
  for (int half = 16; width % (2 * half) == 0; half *= 2) {
    for (int at = 0; at < width; at += at % (2 * half) + 16 == half ? half + 16 : 16) {
      const F a = load(y + at), b = load(y + at + half);
      store(y + at, add(a, b));
      store(y + at + half, sub(a, b));
    }
  }
}

inline float rotation_gain(int width) { return float(width & -width); }

// A power of two near the root of the gain: rotated keys divided by it are about as large as keys, and fit float16.
inline float rotation_root(int width) {
  int root = 4;
  while (4 * root * root <= (width & -width)) root *= 2;
  return float(root);
}

// Codes in [-kLargest, kLargest] of x (n, a multiple of 16), and their scale. NaN and infinities make the scale NaN.
template <typename Code>
inline float round_codes(const float* x, int n, Code* codes) {
  constexpr float kLargest = sizeof(Code) == 1 ? 127 : 32767;
  F largest = zero(), poison = zero();
  for (int i = 0; i < n; i += 16) {
    const F v = load(x + i);
    largest = max(largest, abs(v));
    poison = fma(v, zero(), poison);
  }
  const float scale = max_of(largest) / kLargest + sum(poison);
  const F divisor = set(scale == 0 ? 1.0f : scale);
  for (int i = 0; i < n; i += 16) {
    const I rounded = round_to_int(div(load(x + i), divisor));
    if constexpr (sizeof(Code) == 1) {
      store_i8(codes + i, rounded);
    } else {
      store_i16(codes + i, rounded);
    }
  }
  return scale;
}

// Keys [at, at + keys) of the cache.
template <Type kType>
inline Block block_at(const Head& head, int64_t at, int keys) {
  const int64_t held = at - head.first;
  Block b = {};
  b.at = at;
  b.keys = keys;
  b.k = offset(head.keys, held * (is_integer(kType) ? head.width : head.head_dim), kType);
  b.v = offset(head.values, held * head.width, kType);
  if constexpr (is_integer(kType)) {
    b.key_scales = head.key_scales + held * key_groups(head.width);
    b.value_scales = head.value_scales + held * value_groups(kType, head.width);
    if constexpr (kType == kInt4) b.anchor = head.anchors + held / kKeys * head.width;
  }
  return b;
}

// Of few rows, which wait for the memory: many keys, then their values, so that both are read in long runs.
template <Type kType>
void attend_few(const Head& head, const Queries& q, int64_t begin, int64_t end, const State& state, float* weights) {
  constexpr int kStride = 4 * kKeys;
  static_assert(2 * kWideRows * kStride <= kMaxRows * kKeys);
  for (int64_t at = begin; at < end; at += kStride) {
    Block blocks[5] = {};  // one more than there are: what comes next, or nothing
    int n = 0;
    for (; n < 4 && at + n * kKeys < end; ++n) {
      const int64_t first = at + n * kKeys;
      blocks[n] = block_at<kType>(head, first, least(kKeys, end - first));
    }
    if (at + n * kKeys < head.wanted) blocks[n] = block_at<kType>(head, at + n * kKeys, kKeys);
    for (int i = 0; i < n; ++i) {
      blocks[i].after_k = (const char*)(i + 1 < n ? blocks[i + 1].k : blocks[0].v);
      blocks[i].after_v = (const char*)(i + 1 < n ? blocks[i + 1].v : blocks[n].k);
      for_rows(q, kWideRows, [&](int row, int rows) {
        score_keys<kType>(head, q, blocks[i], row, rows, weights + i * kKeys, kStride);
      });
    }
    for (int i = 0; i < n; ++i) {
      for_rows(q, kWideRows, [&](int row, int rows) {
        weigh_keys(q, blocks[i], row, rows, weights + i * kKeys, kStride, state, head.width);
        add_values<kType>(head, q, blocks[i], row, rows, weights + i * kKeys, kStride, state);
      });
    }
  }
}

template <Type kType>
void attend_block(const Head& head, const Queries& q, const Block& b, const State& state, float* weights) {
  for_rows(q, kTallRows, [&](int row, int rows) {
    score_keys<kType>(head, q, b, row, rows, weights, kKeys);
    weigh_keys(q, b, row, rows, weights, kKeys, state, head.width);
  });
  for_rows(q, kTallRows, [&](int row, int rows) { add_values<kType>(head, q, b, row, rows, weights, kKeys, state); });
}

// Of many rows, float16 is converted once.
template <Type kType>
void attend(const Head& head, const Queries& q, int64_t begin, int64_t end, const State& state, float* scratch) {
  if (q.rows <= 2 * kWideRows) return attend_few<kType>(head, q, begin, end, state, scratch);
  for (int64_t at = begin; at < end; at += kKeys) {
    Block b = block_at<kType>(head, at, least(kKeys, end - at));
    if constexpr (kType == kFloat16) {
      float *keys = scratch + kMaxRows * kKeys, *values = keys + kKeys * head.head_dim;
      convert(b.k, int64_t(b.keys + 15) / 16 * 16 * head.head_dim, keys);
      convert(b.v, int64_t(b.keys) * head.width, values);
      b.k = keys, b.v = values;
      attend_block<kFloat32>(head, q, b, state, scratch);
    } else {
      attend_block<kType>(head, q, b, state, scratch);
    }
  }
}

// ---- The cache ----

// int8 are written two dimensions of a key, and two positions of a value, together.
inline void append_codes(const float* key, const float* value, int64_t position, const Head& head) {
  alignas(64) float x[kMaxWidth];
  alignas(64) int8_t codes[kMaxWidth];
  const int64_t panel = position / 16, lane = position % 16;
  const int width = head.width;
  rotate(key, head.head_dim, width, x);
  for (int g = 0; g < key_groups(width); ++g) {
    const int at = g * kKeyGroup;
    head.key_scales[(panel * key_groups(width) + g) * 16 + lane] =
        round_codes(x + at, least(kKeyGroup, width - at), codes + at);
  }
  auto* keys = (int8_t*)head.keys + panel * 16 * width + 2 * lane;
  for (int i = 0; i < width; ++i) keys[i / 2 * 32 + i % 2] = codes[i];
  for (int i = 0; i < width; i += 16) store(x + i, load_n(value + i, least(16, head.head_dim - i)));
  constexpr int kGroup = value_group(kInt8);
  for (int g = 0; g < value_groups(kInt8, width); ++g) {
    const int at = g * kGroup;
    head.value_scales[(panel * value_groups(kInt8, width) + g) * 16 + lane] =
        round_codes(x + at, least(kGroup, width - at), codes + at);
  }
  auto* values = (int8_t*)head.values + position / 2 * 2 * width + position % 2;
  for (int i = 0; i < width; ++i) values[2 * i] = codes[i];
}

// Codes in [0, 15] of x (n, a multiple of 16), x ~ code * scale + minimum; both into `halves`, 16 apart. NaN,
// infinities and what float16 cannot hold make the scale NaN.
inline void round_nibbles(const float* x, int n, int8_t* codes, uint16_t* halves) {
  F top = set(-3.4e38f), bottom = set(3.4e38f), poison = zero();
  for (int i = 0; i < n; i += 16) {
    const F v = load(x + i);
    top = max(top, v);
    bottom = min(bottom, v);
    poison = fma(v, zero(), poison);
  }
  const float lowest = -max_of(sub(zero(), bottom));
  alignas(64) uint16_t rounded[16];
  store_f16(rounded, set(lowest));
  halves[16] = rounded[0];
  const F minimum = load_f16(rounded);
  const F step = add(mul(sub(set(max_of(top)), minimum), set(1.0f / 15)), set(sum(poison)));
  store_f16(rounded, step);
  halves[0] = rounded[0];
  const F scale = load_f16(rounded), divisor = select_less(zero(), scale, scale, set(1.0f));
  for (int i = 0; i < n; i += 16) {
    const F code = div(sub(load(x + i), minimum), divisor);
    store_i8(codes + i, round_to_int(max(min(code, set(15.0f)), zero())));
  }
}

// A byte of a key is two of its dimensions; one of the values belongs to two positions. What keys have in common (a
// large bias in some models) is not rounded: the first of a block is subtracted from all, as Zhang et al. 2024 (arXiv
// 2410.02367, section 4.2) do with the mean.
inline void append_nibbles(const float* key, const float* value, int64_t position, const Head& head) {
  alignas(64) float x[kMaxWidth];
  alignas(64) int8_t codes[kMaxWidth];
  const int64_t panel = position / 16, lane = position % 16;
  const int width = head.width, groups = key_groups(width), some = value_groups(kInt4, width);
  const auto halves = [&](float* scales, int64_t group) { return (uint16_t*)(scales + 16 * group) + lane; };
  rotate(key, head.head_dim, width, x);
  const F smaller = set(1.0f / rotation_root(width));
  uint16_t* anchor = head.anchors + position / kKeys * width;
  for (int i = 0; i < width; i += 16) {
    const F v = mul(load(x + i), smaller);
    if (position % kKeys == 0) store_f16(anchor + i, v);
    store(x + i, sub(v, load_f16(anchor + i)));
  }
  for (int g = 0; g < groups; ++g) {
    const int at = g * kKeyGroup;
    round_nibbles(x + at, least(kKeyGroup, width - at), codes + at, halves(head.key_scales, panel * groups + g));
  }
  auto* keys = (uint8_t*)head.keys + panel * 8 * width + lane;
  for (int i = 0; i < width; i += 2) keys[i * 8] = uint8_t(codes[i] | codes[i + 1] << 4);
  for (int i = 0; i < width; i += 16) store(x + i, load_n(value + i, least(16, head.head_dim - i)));
  for (int g = 0; g < some; ++g) {
    const int at = g * value_group(kInt4);
    round_nibbles(x + at, least(value_group(kInt4), width - at), codes + at,
                  halves(head.value_scales, panel * some + g));
  }
  auto* values = (uint8_t*)head.values + position / 2 * width;
  const int shift = position % 2 * 4, kept = 0xf0 >> shift;
  for (int i = 0; i < width; ++i) values[i] = uint8_t((values[i] & kept) | codes[i] << shift);
}

template <Type kType>
void append(const float* key, const float* value, int64_t position, const Head& head) {
  if constexpr (kType == kInt8) return append_codes(key, value, position, head);
  if constexpr (kType == kInt4) return append_nibbles(key, value, position, head);
  const int64_t keys_at = position / 16 * 16 * head.head_dim + position % 16;
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

// y (n) = x * factor
inline void scale(const float* x, float factor, int n, float* y) {
  const F f = set(factor);
  int i = 0;
  for (; i + 16 <= n; i += 16) store(y + i, mul(load(x + i), f));
  if (i < n) store_n(y + i, mul(load_n(x + i, n - i), f), n - i);
}

void load_floats(const float* x, float factor, int head_dim, int width, float* to) { scale(x, factor, head_dim, to); }

// Rotated as keys are.
void load_codes(const float* x, float factor, int head_dim, int width, float* to) {
  alignas(64) float rotated[kMaxWidth];
  rotate(x, head_dim, width, rotated);
  for (int g = 0; g < key_groups(width); ++g) {
    const int at = g * kKeyGroup;
    to[width + g] =
        round_codes(rotated + at, least(kKeyGroup, width - at), (int16_t*)to + at) * (factor / rotation_gain(width));
  }
}

// The same for keys that are smaller by the root, with the sums of the codes, and the floats for the anchors.
void load_code_sums(const float* x, float factor, int head_dim, int width, float* to) {
  load_codes(x, factor * rotation_root(width), head_dim, width, to);
  alignas(64) float rotated[kMaxWidth];
  rotate(x, head_dim, width, rotated);
  scale(rotated, factor * rotation_root(width) / rotation_gain(width), width, to + width + key_groups(width));
  const auto* codes = (const int16_t*)to;
  for (int g = 0; g < key_groups(width); ++g) {
    int32_t sum = 0;
    for (int i = g * kKeyGroup; i < least(width, (g + 1) * kKeyGroup); ++i) sum += codes[i];
    to[width / 2 + g] = float(sum);
  }
}

void finish(const float* x, const float* total, int n, float* y) { scale(x, 1.0f / sum(load(total)), n, y); }

void blend(float* x, float a, const float* y, float b, int n) {
  const F fa = set(a), fb = set(b);
  for (int i = 0; i < n; i += 16) store(x + i, fma(load(x + i), fa, mul(load(y + i), fb)));
}

#define TERSOR_ATTENTION_KERNELS TERSOR_ATTENTION_KERNELS_WITH(attend<kFloat16>)
#define TERSOR_ATTENTION_KERNELS_WITH(attend_many_halves)                \
  {{attend<kFloat32>, attend<kFloat16>, attend<kInt8>, attend<kInt4>},   \
   {attend<kFloat32>, attend_many_halves, attend<kInt8>, attend<kInt4>}, \
   {append<kFloat32>, append<kFloat16>, append<kInt8>, append<kInt4>},   \
   {load_floats, load_floats, load_codes, load_code_sums},               \
   finish,                                                               \
   blend}

}  // namespace
}  // namespace tersor::attention
