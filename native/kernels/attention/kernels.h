// Attention of a few query rows to the keys of one key-value head: what every instruction set provides.
//
// The cache of a layer and key-value head, in float16 or float32:
//   keys:   panels of 16 positions, [position / 16][head_dim][16], so that 16 scores are sums of whole vectors
//   values: [position][width], width = head_dim rounded up to a multiple of 16, the rest 0
#pragma once

#include <cstdint>

#include "base/float16.h"

namespace tersor::attention {

inline constexpr int kMaxRows = 32;    // query rows (queries x heads that share the keys) of one call
inline constexpr int kKeys = 64;       // keys at a time, a multiple of 16
inline constexpr int kMaxWidth = 512;  // largest head dimension

struct Head {
  const void* keys;
  const void* values;
  int head_dim, width;
};

// Rows of queries, scaled already, and the keys [first, end) that each may see.
struct Queries {
  int rows;
  const float* values;  // (rows, head_dim)
  const int64_t* first;
  const int64_t* end;
  float softcap;  // 0: none
};

// The state of a softmax: the largest score so far, sum of exp(score - largest), and the sums weighted by it, (rows,
// width).
struct State {
  float* largest;
  float* total;
  float* out;
};

// Adds keys [begin, end) to the state, which starts as the caller set it; begin is a multiple of 16.
using Attend = void (*)(const Head& head, const Queries& q, int64_t begin, int64_t end, const State& state);

struct Kernels {
  Attend attend[2];  // [cache type: kF32, kF16]
  // Writes a key (head_dim) and a value at a position of a head's cache.
  void (*append[2])(const float* key, const float* value, int64_t position, int head_dim, int width, void* keys,
                    void* values);
  // out (head_dim) = out * factor
  void (*scale)(float* x, int n, float factor);
  // x (n) = x * a + y * b
  void (*blend)(float* x, float a, const float* y, float b, int n);
};

inline constexpr float kMasked = -1e30f;  // a score that is not seen; finite, so that differences of two are not NaN

extern const Kernels scalar_kernels;
#if defined(__x86_64__)
extern const Kernels avx2_kernels;
extern const Kernels avx512vnni_kernels;
#elif defined(__aarch64__)
extern const Kernels neondot_kernels;
#endif

}  // namespace tersor::attention
